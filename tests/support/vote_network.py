"""Members of a signed study whose records answer each other, with the test as the carrier."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from securefedcollm.federation import roles
from securefedcollm.federation.questions.polling import Opinion
from securefedcollm.federation.roles import Member
from securefedcollm.federation.workload import silent
from securefedcollm.study import load_study
from tests.support.members import make_identities, write_signed
from tests.support.network import Network
from tests.support.polling import CHOICES, COPIES, QUESTION, RECORDS, Voters

SILOS = tuple(RECORDS)


class SignedVoters:
    """A study that everybody signed, homes, and every silo's records.

    Args:
        study: changes of the study.
        changes: of the section ``retrieval``.
    """

    def __init__(
        self,
        directory: Path,
        study: dict[str, Any] | None = None,
        homes: dict[str, Path] | None = None,
        **changes: Any,
    ) -> None:
        first = Voters(directory, study, **changes)
        (directory / "map").write_bytes(first.space.reduction.encode())
        pins = {"source": "path:map", "sha256": first.space.reduction.digest.hex()}
        encoder = {"source": "path:slm", "layer": 0, "sha256": first.space.encoder.digest}
        self.voters = Voters(directory, study, **changes, encoder=encoder, reduction=pins)
        self.homes = homes or make_identities(directory / "homes", SILOS)
        self.file = write_signed(self.voters.study, self.homes, directory / "study.yaml")
        self.study = load_study(self.file)


class VoteNetwork(Network):
    """Everybody's processes; ``shelves``: silo → its records."""

    silos = SILOS

    def own(self, member: Member, stack: contextlib.ExitStack) -> Any:
        """What a member answers from."""
        if member.name not in self.shelves:
            return None
        booth = stack.enter_context(roles.RecordBooth(member, self.shelves[member.name]))
        return booth.open(self.signed.voters.data, silent)

    def hand_in(self, asker: str, words: str) -> Future[Any]:
        return self.counters[asker].hand_in((words, CHOICES))

    def poll(self, asker: str = "server", words: str = QUESTION) -> Opinion:
        opinion: Opinion = self.turns(self.hand_in(asker, words), 40)
        return opinion


def votes(opinion: Opinion) -> list[int]:
    """For each choice, in records of :data:`~.polling.RECORDS`."""
    return [round(vote / COPIES) for vote in opinion.tally.votes]
