"""A consortium of three silos with small shelves, whose members ask each other."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from securefedcollm.aggregation import Roster
from securefedcollm.evidence.entries import Entry
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.questions.desk import Desk
from securefedcollm.federation.questions.inquiry import Inquiry
from securefedcollm.federation.questions.quota import StoredQuota
from securefedcollm.federation.questions.shelves import build_index, passages_of
from securefedcollm.federation.questions.space import Space, plan_of, space_of, terms_of
from securefedcollm.federation.records.common import opened
from securefedcollm.primitives import SigningKey
from securefedcollm.retrieval import Index, PreparedShelf
from securefedcollm.simulation.asking import Questions
from securefedcollm.study import Study, digest, study_from_tree
from tests.support.small import small_study

SHELF = {
    "encoder": {"source": "path:slm", "layer": 0},
    "dimension": 6,
    "documents": 4,
    "block_bytes": 96,
    "fetched": 2,
    "questions": 3,
}
TEXTS = {
    "silo-1": ("w1 w2 w3 w4", "w5 w6 w7 w8"),
    "silo-2": ("w9 w10 w11", "w12 w13 w14"),
    "silo-3": ("w15 w16 w17 w18", "w19 w20", "w21 w22 w23"),
}


class Members:
    """A study in a directory, its encoder, and an index of every silo.

    Args:
        changes: of the section ``retrieval``.
    """

    def __init__(self, directory: Path, **changes: object) -> None:
        directory.mkdir(exist_ok=True)
        self.data = self.place = directory
        self.study: Study = small_study(directory, retrieval=SHELF | changes)
        self.space: Space = space_of(self.study, directory)
        self.indexes = {name: self.index(name) for name in TEXTS}

    def index(self, name: str, space: Space | None = None) -> Path:
        """The silo's documents as an index; by default in the study's space."""
        guide = self.data / f"{name}.txt"
        guide.write_text("\n\n".join(TEXTS[name]))
        passages = passages_of(self.study, [guide])
        made = build_index(space or self.space, passages, plan_of(self.study).block_bytes)
        (self.place / f"{name}.index").write_bytes(made.encode())
        return self.place / f"{name}.index"

    def afresh(self, place: Path) -> Members:
        """The same with copies of all indexes, of which nobody has asked anything."""
        place.mkdir()
        members = copy.copy(self)
        members.place = place
        members.indexes = {
            name: Path(shutil.copy(path, place)) for name, path in self.indexes.items()
        }
        return members

    def questions(self, run: Path, asker: str = "server", **shelves: Path) -> Questions:
        """Everybody's roles in ``run``. ``shelves``: default, all that are not the asker's."""
        return Questions(
            self.study,
            shelves=shelves or {n: path for n, path in self.indexes.items() if n != asker},
            asker=asker,
            directory=run,
            space=self.space,
        )


def rostered(
    directory: Path, *, questions: int, asked: int
) -> tuple[Study, dict[str, list[Entry]]]:
    """A study whose roster calls the server ``hub``, and the logs of ``server`` and ``silo-1``.

    Args:
        questions: the study's limit.
        asked: questions of the server that silo-1 answers, whatever the study says.
    """
    members = Members(directory)
    keys = {name: SigningKey.generate() for name in ("hub", *TEXTS)}
    file = directory / "map"
    file.write_bytes(members.space.reduction.encode())
    tree = members.study.tree
    tree["roster"] = [
        {"name": name, "role": "server" if name == "hub" else "silo", "key": key.public.hex()}
        for name, key in keys.items()
    ]
    tree["retrieval"]["questions"] = questions
    tree["retrieval"]["encoder"]["sha256"] = members.space.encoder.digest
    pinned = {"source": "path:map", "sha256": members.space.reduction.digest.hex()}
    tree["retrieval"]["reduction"] = pinned
    study = study_from_tree(tree)
    roster = Roster({name: keys[name].public for name in TEXTS})
    owners = {"server": keys["hub"], "silo-1": keys["silo-1"]}
    first = opened(
        digest(study),
        bytes(16),
        roster,
        server=keys["hub"].public,
        authority=b"",
        sbom=None,
    )
    logs = {
        name: EvidenceLog(directory / f"{name}.sqlite", study=digest(study), owner=name, key=key)
        for name, key in owners.items()
    }
    for log in logs.values():
        log.append(first)
    terms = terms_of(study, members.space.digest)
    desk = Desk(
        study=digest(study),
        run=bytes(16),
        key=keys["silo-1"],
        askers={"server": keys["hub"].public},
        shelf=PreparedShelf(Index.load(members.indexes["silo-1"]), terms),
        quota=StoredQuota(directory / "count.sqlite", asked),
        log=logs["silo-1"],
    )
    for _ in range(asked):
        conversation = desk.open("server")
        Inquiry(
            study=digest(study),
            run=bytes(16),
            key=keys["hub"],
            silos={"silo-1": keys["silo-1"].public},
            terms=terms,
            log=logs["server"],
            embed=members.space.embed,
        ).ask(members.space.embed(["w1 w2"])[0], lambda _, frame, to=conversation: to.handle(frame))
    return study, {name: list(log.entries) for name, log in logs.items()}


def desk_of(members: Members, home: Path, key: SigningKey, asker: bytes) -> Desk:
    home.mkdir()
    terms = terms_of(members.study, members.space.digest)
    log = EvidenceLog(home / "evidence.sqlite", study=bytes(32), owner="silo-1", key=key)
    return Desk(
        study=bytes(32),
        run=bytes(16),
        key=key,
        askers={"ann": asker},
        shelf=PreparedShelf(Index.load(members.indexes["silo-1"]), terms),
        quota=StoredQuota(home / "count.sqlite", 3),
        log=log,
    )
