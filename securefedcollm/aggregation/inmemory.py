"""A round of secure aggregation in one process: real silos and coordinator, frames in memory.

For trials, tests and audits. Between organisations the federation's engines carry the frames. Here
all roles share one process, so nobody is protected from the person who runs it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.header import RingParameters, Roster, RoundHeader
from securefedcollm.aggregation.roles import CoordinatorSide, RoundResult, SiloSide
from securefedcollm.aggregation.scheme import coordinator_side, silo_side
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.primitives import SigningKey, sha256

Integers = npt.NDArray[np.int64]
Hook = Callable[[Step, str, bytes], bytes | None]
"""``hook(step, silo, frame)``: the frame as it arrives, altered or not; None: it is lost."""


class MemoryJournal:
    """A journal that lasts as long as its object."""

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}

    def record(self, key: bytes, value: bytes) -> bytes:
        return self.entries.setdefault(key, value)


def unaltered(step: Step, name: str, frame: bytes) -> bytes | None:
    """The hook of a perfect network."""
    return frame


def play(
    silos: Mapping[str, SiloSide],
    coordinator: CoordinatorSide,
    *,
    request: Hook = unaltered,
    reply: Hook = unaltered,
) -> RoundResult:
    """Run a round to its end.

    Args:
        request, reply: what happens to frames on their way to and from a silo.

    Raises:
        ProtocolError: the round failed.
    """
    while True:
        step = coordinator.step
        for name, frame in coordinator.requests().items():
            asked = request(step, name, frame)
            if asked is None:
                coordinator.lost(name, "request lost")
                continue
            try:
                answer = reply(step, name, silos[name].handle(asked))
            except RemoteProtocolError as error:
                coordinator.lost(name, error.message)
                continue
            if answer is None:
                coordinator.lost(name, "reply lost")
                continue
            try:
                coordinator.receive(name, answer)
            except RemoteProtocolError:
                continue  # it is named in coordinator.excluded
        if not coordinator.advance():
            return coordinator.result


def sum_of(vectors: Mapping[str, Integers], bound: int, colluders: int) -> RoundResult:
    """The exact sum of the silos' vectors by one masked round, under fresh keys.

    Args:
        vectors: int64 [d] each, all of one length, every entry q with abs(q) ≤ ``bound``.
        colluders: c, silos that may work with the server and learn no more than the sum.

    Raises:
        ConfigError: fewer than 3 silos, too many colluders, or an impossible length or bound.
    """
    names = sorted(vectors)
    keys = {name: SigningKey.generate() for name in names}
    roster = Roster({name: key.public for name, key in keys.items()})
    header = RoundHeader(
        study_digest=sha256(b"securefedcollm in memory"),
        run_id=secrets.token_bytes(16),
        round=0,
        attempt=0,
        model_digest=sha256(b""),
        parameters=RingParameters.smallest(
            values=max(map(len, vectors.values()), default=0),
            bound=bound,
            silos=len(vectors),
            colluders=colluders,
        ),
        roster_root=roster.root,
    )
    silos = {
        name: silo_side(
            "masking",
            header=header,
            roster=roster,
            name=name,
            signing_key=keys[name],
            vector=vectors[name],
            vector_id=sha256(vectors[name].tobytes()),
            journal=MemoryJournal(),
        )
        for name in names
    }
    return play(silos, coordinator_side("masking", header=header, roster=roster))
