"""Roles of a real run over FLARE whose training is arithmetic: ``… silo|server HOME STUDY [WHEN]``.

Everything but the workload is what ``securefedcollm client`` and ``server`` run. With WHEN the
process kills itself, once, at a bad moment. A server with LINGER in its environment is impatient at
the end, and then stays so many seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

from securefedcollm.aggregation import Step
from securefedcollm.federation import coordinator, roles
from securefedcollm.federation.engines.door import Door
from securefedcollm.federation.engines.flare.engine import FlareEngine, Kits
from securefedcollm.federation.engines.flare.kit import installed
from securefedcollm.federation.engines.flare.presence import Waits
from securefedcollm.federation.engines.flare.processes import DOOR, FlareProcess
from securefedcollm.federation.engines.link import answer_calls
from securefedcollm.federation.hooks import Hooks
from securefedcollm.federation.workload import silent
from securefedcollm.study import load_study
from tests.support.arithmetic import ArithmeticServer, ArithmeticSilo


class Workload(ArithmeticSilo):
    records = 100


class MortalServer(ArithmeticServer):
    """Dies in the server's phase of round ``when``, after the round's sum was opened."""

    def __init__(self, when: int | None) -> None:
        super().__init__()
        self.when = when

    def distil(self, round_, progress):
        if round_ == self.when:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().distil(round_, progress)


class Mortal:
    """Dies when it is asked to unmask round ``when``, after its upload."""

    def __init__(self, session, when: int | None) -> None:
        self.session = session
        self.when = when

    def step(self, frame: bytes) -> bytes:
        side = self.session._side
        if side is not None and side.step is Step.UNMASK and self.session._at[1] == self.when:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.session.step(frame)


def silo(home: Path, study_file: Path, when: int | None) -> None:
    study = load_study(study_file)
    with roles.take_part(study, study_file, home, "silo", str) as member:
        kit = installed(home, member.name)
        session = roles.silo_session(member, Workload(member.name), progress=silent, threads=1)
        inbox = roles.inbox_for(member, Mortal(session, when), 1 << 20)
        with (
            Door(answer_calls(inbox)) as door,
            FlareProcess(
                "client", kit.workspace, name=kit.name, org=kit.org, env={DOOR: str(door.path)}
            ) as flare,
        ):
            inbox.serve(lambda: not flare.running or (session.over and not inbox.attended))
            assert session.over


def server(home: Path, study_file: Path, when: int | None) -> None:
    study = load_study(study_file)
    with roles.take_part(study, study_file, home, "server", str) as member:
        workload = MortalServer(when)
        engine = FlareEngine(
            member.roster.names,
            kits=Kits(installed(home, member.name), installed(home, member.name, lead=True)),
            waits=Waits(minimum=study.minimum, patience=90),
            sign=roles.sign_for(member),
            session=roles.session_of(member),
            progress=silent,
            say=partial(print, flush=True),
            largest=dict.fromkeys(member.roster.names, roles.largest_reply(study, workload)),
        )
        with engine:
            linger = float(os.environ.get("LINGER", "0"))
            if linger:
                coordinator.LAST_CALL = 1.0
            roles.coordinate(
                member,
                engine,
                workload,
                Hooks(rejoined=engine.rejoined, arrived=engine.arrived),
                linger=linger,
            )


if __name__ == "__main__":
    role, place, file, *moment = sys.argv[1:]
    {"silo": silo, "server": server}[role](
        Path(place), Path(file), int(moment[0]) if moment else None
    )
