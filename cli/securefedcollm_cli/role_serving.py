"""How the parties of a real run reach each other over FLARE, and when they leave."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from securefedcollm.federation.authority import AuthoritySession
    from securefedcollm.federation.engines import SiloPort
    from securefedcollm.federation.engines.flare.engine import FlareEngine, Kits
    from securefedcollm.federation.engines.flare.kit import Kit
    from securefedcollm.federation.engines.flare.presence import Waits
    from securefedcollm.federation.engines.link import SiloInbox
    from securefedcollm.federation.questions.port import QuestionPort
    from securefedcollm.federation.roles import Member
    from securefedcollm.federation.silo import SiloSession
    from securefedcollm_cli.progress import Bars

    Session = SiloSession | AuthoritySession | QuestionPort


def serve(
    session: Session,
    member: Member,
    kit: Kit,
    limit: int,
    bars: Bars,
    idle: Callable[[], None] = lambda: None,
    port: SiloPort | None = None,
) -> None:
    """Answer the server, through FLARE's process, until the run is over.

    ``idle`` is called between requests, and several times a second while there are none. ``port``
    answers them, if it is not the session itself.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.door import Door
    from securefedcollm.federation.engines.flare.processes import DOOR, FlareProcess
    from securefedcollm.federation.engines.link import answer_calls

    inbox = roles.inbox_for(member, port or session, limit, session.pace)
    leave = _Leaving(session, inbox)
    with (
        Door(answer_calls(inbox)) as door,
        FlareProcess(
            "client", kit.workspace, name=kit.name, org=kit.org, env={DOOR: str(door.path)}
        ) as flare,
    ):
        say_what_is_lacking(bars)
        bars.say("waiting for the server")

        def stop() -> bool:
            idle()
            return not flare.running or leave.now

        inbox.serve(stop)
        if not session.over:
            flare.require_running()


def flare_engine(
    member: Member, kits: Kits, waits: Waits, largest: int, bars: Bars, *, extra: Sequence[str] = ()
) -> FlareEngine:
    """FLARE, from the server to all silos of the study.

    Args:
        largest: bytes of a silo's longest reply.
        extra: names of other parties, whose replies are short.
    """
    from securefedcollm.federation import roles
    from securefedcollm.federation.engines.flare.engine import FlareEngine

    silos = member.roster.names
    engine = FlareEngine(
        (*silos, *extra),
        kits=kits,
        waits=waits,
        sign=roles.sign_for(member),
        session=roles.session_of(member),
        progress=bars.report,
        say=bars.say,
        largest=dict.fromkeys(silos, largest),
    )
    say_what_is_lacking(bars)
    bars.say(f"waiting for {', '.join((*silos, *extra))}")
    return engine


def own_kits(member: Member) -> Kits:
    """The server's start-up kits, for a port that nobody else uses.

    Raises:
        ConfigError: they are not installed, or the port is taken.
    """
    from securefedcollm.federation.engines.flare.engine import Kits
    from securefedcollm.federation.engines.flare.kit import installed
    from securefedcollm.federation.engines.flare.ready import require_free_port

    home, name = member.home, member.name
    kits = Kits(installed(home, name), installed(home, name, lead=True))
    require_free_port(kits.server.workspace)
    return kits


def say_what_is_lacking(bars: Bars) -> None:
    from securefedcollm.federation.engines.flare.sandbox import shortcoming

    if lacking := shortcoming():
        bars.say(f"WARNING: {lacking}; docs/deploy.md says what to do")


class _Leaving:
    """When to leave: the run is over and the server has the answer, or had a minute to fetch it."""

    def __init__(self, session: Session, inbox: SiloInbox) -> None:
        self._session, self._inbox = session, inbox
        self._since: float | None = None

    @property
    def now(self) -> bool:
        if not self._session.over:
            return False
        self._since = self._since or time.monotonic()
        return not self._inbox.attended or time.monotonic() - self._since > 60
