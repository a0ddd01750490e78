"""A consortium of three silos with small shelves, whose members ask each other."""

from __future__ import annotations

from pathlib import Path

from securefedcollm.federation.questions.shelves import build_index, passages_of
from securefedcollm.federation.questions.space import Space, plan_of, space_of
from securefedcollm.simulation.asking import Questions
from securefedcollm.study import Study
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
        self.data = directory
        self.study: Study = small_study(directory, retrieval=SHELF | changes)
        self.space: Space = space_of(self.study, directory)
        self.indexes = {name: self.index(name) for name in TEXTS}

    def index(self, name: str, space: Space | None = None) -> Path:
        """The silo's documents as an index; by default in the study's space."""
        guide = self.data / f"{name}.txt"
        guide.write_text("\n\n".join(TEXTS[name]))
        passages = passages_of(self.study, [guide])
        made = build_index(space or self.space, passages, plan_of(self.study).block_bytes)
        made.save(self.data / f"{name}.index")
        return self.data / f"{name}.index"

    def questions(self, run: Path, asker: str = "server", **shelves: Path) -> Questions:
        """Everybody's roles in ``run``. ``shelves``: default, all that are not the asker's."""
        return Questions(
            self.study,
            shelves=shelves or {n: path for n, path in self.indexes.items() if n != asker},
            asker=asker,
            directory=run,
            space=self.space,
        )
