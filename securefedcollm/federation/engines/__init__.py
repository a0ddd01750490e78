"""Engines carry frames between one coordinator and its silos, and know nothing of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Failure:
    """Why a silo gave no reply. It counts as a dropout of this exchange.

    ``waited``: seconds that were lost on this very silo, if the engine knows: not those in which
    another was let in.
    """

    reason: str
    waited: float | None = None


class SiloPort(Protocol):
    """The silo's side of an engine: one request frame in, one reply frame out."""

    def step(self, frame: bytes) -> bytes: ...


class Engine(Protocol):
    """The coordinator's side."""

    def exchange(self, frames: Mapping[str, bytes], timeout: float) -> dict[str, bytes | Failure]:
        """Send each silo its frame and collect the replies.

        Args:
            frames: silo name → request frame.
            timeout: seconds after which a silo that has not replied counts as a dropout.

        Returns:
            One entry for every key of ``frames``.
        """
        ...
