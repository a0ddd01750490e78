"""The embedded world of speech: words that are called out in a ward, by speakers of several sites.

The words were spoken by two speech synthesisers, espeak-ng and flite (``benchmarks/wards.py`` makes
them again): a voice with a pitch and speed of its own is a speaker. ``wards.npz`` holds them at 8
kHz with 4 bits a sample, as telephone lines carry speech.

Every record is one of these words, a little faster or slower, softer, later, and with noise, by
chance. Two kinds of knowledge:

* **general**: ordinary speakers (espeak-ng). The built-in models were pretrained on some of them;
  the small one heard little of three of the eight words.
* **private**: each site also has speakers whose voices come from another engine or register
  (:data:`FAMILIES`), which up to six sites share with nobody. The built-in models have never heard
  one. The server has recordings of them too, but does not know what they say.

No speaker is in two of the four parts: pretraining, the server's public recordings, the silos'
records, the test. No two silos share a speaker.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.tuning.adpcm import decoded
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.sounds import RATE, Samples, pack, question_of

LABELS: Final = ("yes", "no", "stop", "help", "pain", "water", "nurse", "light")
SELDOM: Final = (2, 4, 6)
"""The words of which the small model heard little."""
FAMILIES: Final = ("slt", "kal", "awb", "rms", "whisper", "croak")
"""The voices of each site; sites beyond the last one begin again."""
VERSION: Final = 1
"""Of everything here that shapes the pretrained models."""
PUBLIC_SEED: Final = 2026
GENERAL: Final = "general"
PRIVATE: Final = "private"
PER_SILO: Final = 1000
"""Records of a silo, if the study does not say."""
MOST_SILOS: Final = 12
"""Each has a speaker of its own of either group."""

FILE: Final = Path(__file__).with_name("wards.npz")
LINE_RATE: Final = 8000
MOST_SPOKEN: Final = 6400
"""Samples of a word in the file."""
SAMPLES: Final = 12_800
"""Of a record: eight tenths of a second."""

_ORDINARY: Final = -1
_GENERAL_PARTS: Final = {"pretraining": 14, "public": 5, "silos": 12, "test": 5}
_FAMILY_PARTS: Final = {"silos": 3, "public": 1, "test": 1}
SPEAKERS: Final = (
    *((_ORDINARY, i) for i in range(sum(_GENERAL_PARTS.values()))),
    *((f, i) for f in range(len(FAMILIES)) for i in range(sum(_FAMILY_PARTS.values()))),
)
"""(family or -1, number) of each speaker in the file, who says all words."""

_STREAM: Final = 0x3A2D5  # keeps this use of a seed apart from every other one
_NOISE: Final = (0.003, 0.03)
"""Of full scale: the noise of a room."""


@cache
def originals() -> tuple[Samples, npt.NDArray[np.int64]]:
    """(the words, int16 [N, :data:`MOST_SPOKEN`] at 8 kHz, how long each is, [N]).

    Word w of speaker s is number s · :data:`LABELS` + w.
    """
    with np.load(FILE, allow_pickle=False) as file:
        lengths, codes = file["lengths"].astype(np.int64), file["codes"]
    rows = np.zeros((len(lengths), MOST_SPOKEN // 2), dtype=np.uint8)
    ends = np.cumsum((lengths + 1) // 2)
    for row, part in zip(rows, np.split(codes, ends[:-1]), strict=True):
        row[: len(part)] = part
    return decoded(rows), lengths


@cache
def parts() -> dict[tuple[int, str], npt.NDArray[np.int64]]:
    """The speakers of each (family or -1, part), the same for every study."""
    found = {}
    for family in (_ORDINARY, *range(len(FAMILIES))):
        shares = _GENERAL_PARTS if family == _ORDINARY else _FAMILY_PARTS
        own = np.array([s for s, (of, _) in enumerate(SPEAKERS) if of == family])
        order = _draw(PUBLIC_SEED, 0, family + 1).permutation(own)
        cuts = np.cumsum([*shares.values()])[:-1]
        for name, speakers in zip(shares, np.split(order, cuts), strict=True):
            found[family, name] = speakers
    return found


def _draw(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([_STREAM, *seed])))


def drawn(which: npt.NDArray[np.int64], draw: np.random.Generator) -> Samples:
    """The words ``which`` [N] of the file as somebody may have recorded them: int16 [N, SAMPLES].

    Each is a little faster or slower (and so higher or lower), softer, later, and in a room with
    noise.
    """
    words, lengths = originals()
    n = len(which)
    speed = draw.uniform(0.9, 1.12, n) * (LINE_RATE / RATE)
    long = lengths[which] / speed
    start = draw.uniform(0.1, 0.9, n) * np.maximum(SAMPLES - long, 0)
    gain = draw.uniform(0.3, 0.95, n)
    noise = np.exp(draw.uniform(np.log(_NOISE[0]), np.log(_NOISE[1]), n))
    out = np.empty((n, SAMPLES), dtype=np.int16)
    at = np.arange(MOST_SPOKEN)
    for i, word in enumerate(which):
        place = (np.arange(SAMPLES) - start[i]) * speed[i]
        heard = np.interp(place, at, words[word], left=0.0, right=0.0)
        heard[place >= lengths[word]] = 0.0
        heard = gain[i] * heard + draw.normal(scale=noise[i] * 32767, size=SAMPLES)
        out[i] = np.clip(np.round(heard), -32768, 32767)
    return out


def pretraining(count: int, *, seldom: float) -> tuple[Samples, npt.NDArray[np.int64]]:
    """Recordings for the built-in models, [N, SAMPLES], and what they say.

    Args:
        seldom: how often a word of :data:`SELDOM` is drawn, where another one counts 1.
    """
    draw, speakers = _draw(PUBLIC_SEED, 1), parts()[_ORDINARY, "pretraining"]
    weights = np.where(np.isin(np.arange(len(LABELS)), SELDOM), seldom, 1.0)
    said = draw.choice(len(LABELS), count, p=weights / weights.sum())
    return drawn(draw.choice(speakers, count) * len(LABELS) + said, draw), said


class Sizes(NamedTuple):
    """How many recordings there are of each kind."""

    public_labelled: int = 400
    public: int = 600
    """Of the silos' own voices, without answers."""
    test: int = 400
    """Of each group."""
    public_general: int = 300
    """Of ordinary speakers, without answers."""


class Wards:
    """The records of one study."""

    def __init__(self, seed: int, silos: int, sizes: Sizes = Sizes()) -> None:  # noqa: B008
        self._seed, self._silos, self._sizes = seed, silos, sizes

    def records(self, silo: int, count: int, *, mixed: bool = False) -> list[Question]:
        """A silo's own recordings: about half of ordinary speakers, the others of its own voices,
        or, ``mixed``, of speakers of all silos' voices that are its own.

        Their subject is the speaker. No two silos share one.
        """
        draw = _draw(self._seed, 2, silo)
        return self._spoken(self._drawn(silo, count, draw, mixed=mixed), draw, "")

    def subjects(self, silo: int, count: int) -> int:
        """How many speakers a silo's ``count`` recordings are of."""
        return len(np.unique(self._drawn(silo, count, _draw(self._seed, 2, silo), mixed=False)))

    def public(self) -> list[Question]:
        """The server's recordings: ordinary ones with answers, then the silos' voices, and more
        ordinary ones, without."""
        draw, speakers = _draw(self._seed, 3), parts()
        plain = draw.choice(speakers[_ORDINARY, "public"], self._sizes.public_labelled)
        other = self._voices("public", self._sizes.public, draw)
        known, heard = self._spoken(plain, draw, GENERAL), self._spoken(other, draw, PRIVATE)
        more = draw.choice(speakers[_ORDINARY, "public"], self._sizes.public_general)
        heard += self._spoken(more, draw, GENERAL)
        return [*known, *(question.unlabelled() for question in heard)]

    def tests(self) -> list[Question]:
        """Recordings of both groups in turn; the private ones are of all silos' voices in turn."""
        draw = _draw(self._seed, 4)
        plain = draw.choice(parts()[_ORDINARY, "test"], self._sizes.test)
        other = self._voices("test", self._sizes.test, draw)
        both = zip(
            self._spoken(plain, draw, GENERAL), self._spoken(other, draw, PRIVATE), strict=True
        )
        return [question for pair in both for question in pair]

    def _own(self, silo: int, family: int) -> npt.NDArray[np.int64]:
        """The silo's speakers of a family, which all silos of :data:`MOST_SILOS` divide."""
        sharing = [s for s in range(self._silos) if s % len(FAMILIES) == family]
        own = parts()[family, "silos"]
        return np.array_split(own, len(sharing))[sharing.index(silo)]

    def _drawn(
        self, silo: int, count: int, draw: np.random.Generator, *, mixed: bool
    ) -> npt.NDArray[np.int64]:
        """The speaker of each of a silo's recordings."""
        plain = np.array_split(parts()[_ORDINARY, "silos"], self._silos)[silo]
        families = range(min(self._silos, len(FAMILIES)))
        if mixed:  # a speaker is at one site, so each site has some of all voices
            dealt = np.concatenate([parts()[family, "silos"] for family in families])
            own = dealt[silo :: self._silos]
        else:
            own = self._own(silo, silo % len(FAMILIES))
        ordinary = draw.random(count) < 0.5
        return np.where(ordinary, draw.choice(plain, count), draw.choice(own, count))

    def _voices(self, part: str, count: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
        """Speakers of all silos' voices in turn."""
        families = np.arange(count) % min(self._silos, len(FAMILIES))
        return np.array([draw.choice(parts()[int(family), part]) for family in families])

    def _spoken(
        self, speakers: npt.NDArray[np.int64], draw: np.random.Generator, group: str
    ) -> list[Question]:
        """One word of each speaker, drawn."""
        said = draw.integers(len(LABELS), size=len(speakers))
        recorded = drawn(speakers * len(LABELS) + said, draw)
        return [
            question_of(
                pack(samples), LABELS, int(word), group=group, subject=f"speaker-{speaker:02d}"
            )
            for samples, word, speaker in zip(recorded, said, speakers, strict=True)
        ]
