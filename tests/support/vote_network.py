"""Members of a signed study whose records answer each other, with the test as the carrier."""

from __future__ import annotations

import contextlib
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from securefedcollm.federation import roles
from securefedcollm.federation.questions import letters as post
from securefedcollm.federation.questions.polling import Opinion
from securefedcollm.federation.questions.polls import make_poll
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


def begun(signed: SignedVoters, place: Path, **records: Any) -> VoteNetwork:
    """Everybody's processes, with homes of their own in ``place``, and :data:`~.polling.RECORDS`
    unless ``records`` has others (by silo)."""
    shutil.copytree(signed.homes["server"].parent, place / "homes")
    homes = {name: place / "homes" / path.name for name, path in signed.homes.items()}
    return VoteNetwork(signed, homes, {**RECORDS, **records})


def called(network: VoteNetwork, words: str, askers: tuple[str, ...]) -> list[str]:
    """The kinds of letters with which silo-2 answers all of them in one call."""
    port, study = network.ports["silo-2"], network.members["silo-2"].study
    polls = [
        make_poll(study, port._run, network.members[who].key, words, CHOICES) for who in askers
    ]
    letters = [
        post.Letter(who, os.urandom(16), "poll", poll.encode())
        for who, poll in zip(askers, polls, strict=True)
    ]
    reply = port.step(post.encode(post.Carry(port._run, letters)))
    return [letter.kind for letter in post.decode_carried(reply, "silo-2").letters]
