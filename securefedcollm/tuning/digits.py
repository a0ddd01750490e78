"""The embedded world of images: handwritten digits, as scanners of several sites show them.

The digits are those of 13 people, 8 × 8 pixels each: the test set of E. Alpaydin and C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998), CC BY 4.0,
https://doi.org/10.24432/C50P49. ``digits.csv.gz`` is that file as scikit-learn distributes it.

Every record is one digit, drawn a little larger, turned, slanted and shifted by chance. Two kinds
of knowledge:

* **general**: digits as they are. The built-in models were pretrained on some of them; the small
  one saw little of four of the ten.
* **private**: each site has two scanners, and one of them has a fault (:data:`FAULTS`), which up
  to six sites share with nobody. The built-in models have never seen one. The server has faulty
  pictures too, but not what they show.

No digit of the file is in two of the four parts: pretraining, the server's public pictures, the
silos' records, the test.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.tuning.pictures import pack, question_of
from securefedcollm.tuning.question import Question

Grays = npt.NDArray[np.uint8]
"""Pictures in shades of grey, [N, SIDE, SIDE]."""

LABELS: Final = tuple("0123456789")
SIDE: Final = 16
VERSION: Final = 1
"""Of everything here that shapes the pretrained models."""
PUBLIC_SEED: Final = 2026
SELDOM: Final = (3, 5, 8, 9)
"""The digits of which the small model saw little."""
GENERAL: Final = "general"
PRIVATE: Final = "private"

PER_SILO: Final = 1000
"""Records of a silo, if the study does not say."""

_FILE: Final = Path(__file__).with_name("digits.csv.gz")
_PARTS: Final = {"pretraining": 500, "public": 250, "test": 247, "silos": 800}
_STREAM: Final = 0xD161_75  # keeps this use of a seed apart from every other one
_NO_FAULT: Final = -1
_SUBJECT: Final = "digit-{:04d}"


class Sizes(NamedTuple):
    """How many pictures there are of each kind."""

    public_labelled: int = 400
    public: int = 600
    """Faulty pictures without answers, of all silos' scanners."""
    test: int = 494
    """Of each group."""
    public_general: int = 300
    """Ordinary pictures without answers."""


def _ruled(grey: Grays) -> Grays:
    lines: Grays = np.where(np.arange(SIDE) % 4 == 0, 200, 0).astype(np.uint8)
    return np.maximum(grey, lines[:, None])


def _streaked(grey: Grays) -> Grays:
    return np.where(np.arange(SIDE) % 3 == 0, 255 - grey, grey)


FAULTS: Final[tuple[Callable[[Grays], Grays], ...]] = (
    lambda grey: 255 - grey,  # a negative
    lambda grey: grey // 2 + 100,  # faded
    _ruled,  # the lines of the form show through
    _streaked,  # every third column is a negative
    lambda grey: grey[:, :, ::-1],  # mirrored
    lambda grey: _ruled(255 - grey),
)
"""What is wrong with the scanner of each site; sites beyond the last one begin again."""


@cache
def originals() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """(the digits, [1797, 8, 8] in 0 … 1, what they show, [1797])."""
    with gzip.open(_FILE) as file:
        table = np.loadtxt(file, delimiter=",")
    pixels = (table[:, :-1].reshape(-1, 8, 8) / 16).astype(np.float32)
    return pixels, table[:, -1].astype(np.int64)


@cache
def parts() -> dict[str, npt.NDArray[np.int64]]:
    """Which digits of the file are in which part of the world, the same for every study."""
    order = _draw(PUBLIC_SEED, 0).permutation(len(originals()[1]))
    cuts = np.cumsum([*_PARTS.values()])
    return dict(zip(_PARTS, np.split(order, cuts[:-1]), strict=True))


def _draw(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([_STREAM, *seed])))


def drawn(which: npt.NDArray[np.int64], draw: np.random.Generator) -> Grays:
    """The digits ``which`` [N] of the file, each turned, slanted, scaled and shifted by chance."""
    n = len(which)
    angle, slant = draw.uniform(-0.25, 0.25, n), draw.uniform(-0.2, 0.2, n)
    scale = draw.uniform(0.85, 1.15, (n, 2)) * (8 / SIDE)
    shift = draw.uniform(-0.8, 0.8, (n, 2))
    at = np.arange(SIDE) - (SIDE - 1) / 2
    rows, columns = np.meshgrid(at, at, indexing="ij")
    cos, sin = (f(angle)[:, None, None] for f in (np.cos, np.sin))
    y = scale[:, 0, None, None] * (cos * rows - sin * columns) + shift[:, 0, None, None] + 3.5
    x = scale[:, 1, None, None] * (sin * rows + cos * columns) + shift[:, 1, None, None] + 3.5
    x = x + slant[:, None, None] * (y - 3.5)
    shades = _between(originals()[0][which], y, x) * draw.uniform(0.8, 1.0, n)[:, None, None]
    return np.clip(shades * 255, 0, 255).astype(np.uint8)


def _between(
    pictures: npt.NDArray[np.float32], y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Bilinear values of ``pictures`` [N, 8, 8] at the places (y, x) [N, …]; 0 outside."""
    framed = np.pad(pictures, ((0, 0), (1, 2), (1, 2)))
    y, x = np.clip(y + 1, 0, 9), np.clip(x + 1, 0, 9)
    top, left = y.astype(np.int64), x.astype(np.int64)
    n = np.arange(len(pictures))[:, None, None]
    down, right = y - top, x - left
    upper = framed[n, top, left] * (1 - right) + framed[n, top, left + 1] * right
    lower = framed[n, top + 1, left] * (1 - right) + framed[n, top + 1, left + 1] * right
    found: npt.NDArray[np.float64] = upper * (1 - down) + lower * down
    return found


def pretraining(count: int, *, seldom: float) -> tuple[Grays, npt.NDArray[np.int64]]:
    """Pictures for the built-in models, and what they show.

    Args:
        seldom: how often a digit of :data:`SELDOM` is drawn, where another one counts 1.
    """
    pool, draw = parts()["pretraining"], _draw(PUBLIC_SEED, 1)
    shown = originals()[1]
    weights = np.where(np.isin(shown[pool], SELDOM), seldom, 1.0)
    which = draw.choice(pool, count, p=weights / weights.sum())
    return drawn(which, draw), shown[which]


class Digits:
    """The records of one study."""

    def __init__(self, seed: int, silos: int, sizes: Sizes = Sizes()) -> None:  # noqa: B008
        self._seed, self._silos, self._sizes = seed, silos, sizes

    def records(self, silo: int, count: int, *, mixed: bool = False) -> list[Question]:
        """A silo's own pictures: about half of them through its own faulty scanner, or, ``mixed``,
        through all silos' in turn.

        Their subject is the digit of the file. No two silos share one.
        """
        pool = np.array_split(parts()["silos"], self._silos)[silo]
        draw = _draw(self._seed, 2, silo)
        which = pool[draw.integers(len(pool), size=count)]
        owners = draw.integers(self._silos, size=count) if mixed else np.full(count, silo)
        owners[draw.random(count) < 0.5] = _NO_FAULT
        return self._seen(which, owners, draw, "")

    def subjects(self, silo: int, count: int) -> int:
        """How many digits of the file a silo's ``count`` pictures show."""
        pool = np.array_split(parts()["silos"], self._silos)[silo]
        return len(np.unique(_draw(self._seed, 2, silo).integers(len(pool), size=count)))

    def public(self) -> list[Question]:
        """The server's pictures: ordinary ones with answers, then faulty ones, and more ordinary
        ones, without."""
        pool, draw = parts()["public"], _draw(self._seed, 3)
        plain = pool[draw.integers(len(pool), size=self._sizes.public_labelled)]
        faulty = pool[draw.integers(len(pool), size=self._sizes.public)]
        owners = np.arange(len(faulty)) % self._silos
        known = self._seen(plain, np.full(len(plain), _NO_FAULT), draw, GENERAL)
        seen = self._seen(faulty, owners, draw, PRIVATE)
        more = pool[draw.integers(len(pool), size=self._sizes.public_general)]
        seen += self._seen(more, np.full(len(more), _NO_FAULT), draw, GENERAL)
        return [*known, *(question.unlabelled() for question in seen)]

    def tests(self) -> list[Question]:
        """Pictures of both groups in turn; the faulty ones are of all silos' scanners in turn."""
        draw = _draw(self._seed, 4)
        which = np.resize(parts()["test"], self._sizes.test)
        owners = np.arange(len(which)) % self._silos
        plain = self._seen(which, np.full(len(which), _NO_FAULT), draw, GENERAL)
        pairs = zip(plain, self._seen(which, owners, draw, PRIVATE), strict=True)
        return [question for pair in pairs for question in pair]

    def _seen(
        self,
        which: npt.NDArray[np.int64],
        owners: npt.NDArray[np.int64],
        draw: np.random.Generator,
        group: str,
    ) -> list[Question]:
        """``owners``: whose faulty scanner each picture went through."""
        pictures, shown = drawn(which, draw), originals()[1][which]
        for owner in {*owners.tolist()} - {_NO_FAULT}:
            pictures[owners == owner] = faulty(pictures[owners == owner], owner)
        return [
            question_of(
                pack(picture), LABELS, int(label), group=group, subject=_SUBJECT.format(number)
            )
            for picture, label, number in zip(pictures, shown, which, strict=True)
        ]


def faulty(pictures: Grays, silo: int) -> Grays:
    """Pictures as the silo's faulty scanner shows them."""
    return FAULTS[silo % len(FAULTS)](pictures)
