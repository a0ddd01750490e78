"""How many questions a silo answers each asker.

Adversary: an asker that asks to copy the index. d questions with independent embeddings determine
every embedding of the shelf, and n/k questions fetch every passage. Nothing in the protocol can
tell such questions from others, since questions are secret. Only their number can be bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from securefedcollm.errors import BudgetExceeded, LocalProtocolError


class Quota(Protocol):
    """The silo's count of questions, kept by the caller across restarts."""

    def spend(self, asker: str, number: bytes) -> bool:
        """Count question ``number`` (16 bytes) of ``asker``, durably, before this returns.

        Returns:
            False if this very question was counted before: it must not be answered again, since two
            answers have independent noise, and their average has less.

        Raises:
            BudgetExceeded: this asker has no question left. Nothing was counted.
        """


class CountingQuota:
    """At most ``most`` questions of each asker. Not thread-safe.

    Args:
        most: questions of one asker that are ever answered. A caller that renews them, say each
            month, begins with an empty ``counted``. Old question numbers are then forgotten, so the
            study's digest or the shelf's terms must change with it.
        counted: of earlier processes: asker → question numbers.

    Subclass it with :meth:`persist` to survive a restart.
    """

    def __init__(self, most: int, counted: Mapping[str, Iterable[bytes]] | None = None) -> None:
        if most < 0:
            raise LocalProtocolError("a limit is not negative", hint="0 refuses every question")
        self._most = most
        self._counted = {asker: set(numbers) for asker, numbers in (counted or {}).items()}

    def left(self, asker: str) -> int:
        """Questions that ``asker`` may still ask."""
        return max(0, self._most - len(self._counted.get(asker, ())))

    def spend(self, asker: str, number: bytes) -> bool:
        """As :meth:`Quota.spend` says."""
        counted = self._counted.setdefault(asker, set())
        if number in counted:
            return False
        if not self.left(asker):
            raise BudgetExceeded(
                f"{asker} has asked all of its {self._most} questions",
                hint="the silo's operator sets the limit",
            )
        self.persist(asker, number)
        counted.add(number)
        return True

    def persist(self, asker: str, number: bytes) -> None:
        """Write the question down before it is answered. Here: nowhere."""
