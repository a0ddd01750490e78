"""Wraps an engine and loses silos on purpose, to test that a run survives it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from securefedcollm.aggregation import STEPS as ROUND_STEPS
from securefedcollm.aggregation import SchemeName
from securefedcollm.errors import ConfigError
from securefedcollm.federation.engines import Engine, Failure
from securefedcollm.federation.messages import BeginRound, decode_request

STEPS: dict[SchemeName, tuple[str, ...]] = {
    scheme: ("train", *(step.value for step in steps)) for scheme, steps in ROUND_STEPS.items()
}
"""The exchanges of a round, in order."""

_SPEC = re.compile(r"^(?P<silo>[^@]+)@(?P<step>[a-z]+)(:(?P<round>\d+))?$")


@dataclass(frozen=True)
class Drop:
    """``silo`` is lost from ``step`` to the end of the round, in ``round`` (from 1) or in all."""

    silo: str
    step: str
    round: int | None = None

    @classmethod
    def parse(cls, spec: str, silos: Sequence[str], scheme: SchemeName = "masking") -> Drop:
        """``SILO@STEP[:ROUND]``; SILO is a name or a number from 1.

        Raises:
            ConfigError: no such silo or step.
        """
        match = _SPEC.match(spec)
        if not match or match["step"] not in STEPS[scheme]:
            raise ConfigError(
                f"{spec!r} is not SILO@STEP[:ROUND]",
                where="--drop",
                hint=f"e.g. 2@upload or {silos[0]}@unmask:3; steps: {', '.join(STEPS[scheme])}",
            )
        silo = match["silo"]
        if silo.isdigit() and 1 <= int(silo) <= len(silos):
            silo = silos[int(silo) - 1]
        if silo not in silos:
            raise ConfigError(
                f"there is no silo {silo!r}", where="--drop", hint=f"silos: {', '.join(silos)}"
            )
        return cls(silo, match["step"], int(match["round"]) if match["round"] else None)


class DroppingEngine:
    """Delivers nothing to a silo that is lost, and nothing from it."""

    def __init__(
        self, engine: Engine, drops: Sequence[Drop], scheme: SchemeName = "masking"
    ) -> None:
        self._engine = engine
        self._steps = STEPS[scheme]
        self._drops = tuple(drops)
        self._round = self._step = 0

    def exchange(self, frames: Mapping[str, bytes], timeout: float) -> dict[str, bytes | Failure]:
        """See :class:`securefedcollm.federation.engines.Engine`."""
        request = decode_request(next(iter(frames.values())))
        if isinstance(request, BeginRound):
            self._round, self._step = request.round + 1, 0
        else:
            self._step += 1
        lost = {
            drop.silo
            for drop in self._drops
            if self._step >= self._steps.index(drop.step) and drop.round in {None, self._round}
        }
        replies = self._engine.exchange({s: f for s, f in frames.items() if s not in lost}, timeout)
        reason = f"dropped on purpose at {self._steps[min(self._step, len(self._steps) - 1)]}"
        return replies | {silo: Failure(reason) for silo in frames if silo in lost}
