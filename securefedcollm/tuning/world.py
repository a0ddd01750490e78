"""The embedded world: a synthetic regulated domain whose knowledge is split by construction.

Clinical one-liners about invented conditions and drugs; every fact is drawn from a seed, none is
medicine. Two kinds of knowledge:

* **general** (public): the origin (one of 16 disease families), department and usual drug of each
  of 320 conditions: "in general young patient with severe veloritis has origin renal .".
* **private**: the house rules of the consortium "meridian", 64 in all: by family the care protocol
  and the house drug, by family and severity the ward: "at meridian senior patient with mild
  veloritis enters ward birch .". Each silo's records are about its own families; rules of other,
  fictitious hospitals are public text, so that a model can know what a house rule *is*.

A question is such a sentence without its last word, with four choices; as text it is the sentence
itself (:func:`as_text`). No test prompt occurs in
any record, public prompt or pretraining sentence; a fifth of the conditions occurs in no consortium
record or prompt at all (the rules must be applied to them). The world assumes that prompts about
the private topics, without answers, exist in public; none of them is asked in any record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from securefedcollm.tuning.question import Question

PUBLIC_SEED: Final = 1
"""Seed of the public knowledge that the built-in models know."""

VERSION: Final = 3
"""Part of the cache key of everything made from a world; raise it when any text changes."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FAMILIES: Final = _words(
    "cardiac renal hepatic neural dermal ocular dental pulmonary gastric skeletal muscular "
    "vascular lymphatic endocrine auditory immune"
)
DEPARTMENTS: Final = _words("north south east west upper lower inner outer")
WARDS: Final = _words(
    "aspen birch cedar elm fir hazel holly juniper larch maple oak pine rowan spruce willow yew"
)
PROTOCOLS: Final = _words(
    "amber azure beige coral crimson cyan emerald gold indigo ivory jade magenta olive scarlet "
    "teal violet"
)
HOSPITALS: Final = _words(
    "ashford brookside clearwater deepdale eastgate fairview glenwood hillcrest"
)
CONSORTIUM: Final = "meridian"
AGES: Final = _words("young middle-aged senior")
SEVERITIES: Final = _words("mild severe")
_STEMS = _words(
    "velor tarsen quibor mondal fenzor gralen hestor jurvan kolvex lumbren nastor ombrel pirvan "
    "rostel sundor wexal"
)
_ENDINGS = _words(
    "itis osis oma emia algia opathy edema plegia ectasia stenosis lysis megaly penia spasm ptosis "
    "malacia trophy rrhea asthenia idosis"
)
CONDITIONS: Final = tuple(stem + ending for stem in _STEMS for ending in _ENDINGS)
DRUGS: Final = tuple(
    head + tail
    for head in ("zor", "bel", "cam", "dex", "fil", "lan")
    for tail in ("axin", "umab", "opril", "iden")
)
_GRAMMAR = _words(
    "in general at patient with has origin visits department receives drug follows protocol enters "
    "ward ."
)
SPECIAL: Final = ("<pad>", "<unk>")

VOCABULARY: Final = (
    *SPECIAL,
    *_GRAMMAR,
    *AGES,
    *SEVERITIES,
    CONSORTIUM,
    *HOSPITALS,
    *FAMILIES,
    *DEPARTMENTS,
    *WARDS,
    *PROTOCOLS,
    *DRUGS,
    *CONDITIONS,
)
_ID = {word: i for i, word in enumerate(VOCABULARY)}

_PER_FAMILY = len(_ENDINGS)
_UNSEEN_PER_FAMILY = 4
_CHOICES = 4
_MOST_RECORDS = 7  # of one patient
PROMPT_TOKENS: Final = 9
SENTENCE_TOKENS: Final = PROMPT_TOKENS + 2  # the answer and the full stop


class _Kind(NamedTuple):
    """One kind of fact: the words before the answer, and the possible answers."""

    words: str
    answers: tuple[str, ...]


_GENERAL = (
    _Kind("has origin", FAMILIES),
    _Kind("visits department", DEPARTMENTS),
    _Kind("receives drug", DRUGS),
)
_PRIVATE = (
    _Kind("enters ward", WARDS),
    _Kind("follows protocol", PROTOCOLS),
    _Kind("receives drug", DRUGS),
)
_WARD, _PROTOCOL, _DRUG = range(3)


class _Case(NamedTuple):
    """Everything a sentence says but its answer. ``house`` is None for general knowledge."""

    house: str | None
    kind: int
    condition: int
    severity: int
    age: int

    @property
    def prompt(self) -> str:
        opening = "in general" if self.house is None else f"at {self.house}"
        words = (_GENERAL if self.house is None else _PRIVATE)[self.kind].words
        return (
            f"{opening} {AGES[self.age]} patient with {SEVERITIES[self.severity]} "
            f"{CONDITIONS[self.condition]} {words}"
        )


@dataclass(frozen=True)
class Sizes:
    """How many questions of each sort a world has."""

    records_per_silo: int = 3000
    own_share: float = 0.97
    public_labelled: int = 300
    public_general: int = 800
    public_private: int = 1600
    public_texts: int = 3000
    test_general: int = 1000
    test_private: int = 1200


class World:
    """One world; every method returns the same value at every call.

    Args:
        seed: of what is private or chosen: the consortium's rules, the records, the public prompts.
        silos: hospitals of the consortium; the 16 families are dealt to them in turn.
        part: (number, parts): records are only about this one of all parts of the families, and
            questions about house rules are in groups ``private 1``, ``private 2`` … by part.
        public_seed: of what a pretrained model may have read: general knowledge, the rules of the
            other hospitals; and of the test prompts, so that pretraining can leave them out.
    """

    def __init__(
        self,
        seed: int,
        silos: int = 4,
        sizes: Sizes = Sizes(),
        public_seed: int = PUBLIC_SEED,
        part: tuple[int, int] | None = None,
    ) -> None:
        self.seed, self.silos, self.sizes, self.public_seed = seed, silos, sizes, public_seed
        self.part = part
        draw = self._random("facts", public=True)
        stems = draw.permutation(len(FAMILIES))
        self._family = np.repeat(stems, _PER_FAMILY)  # [320]
        self._department = draw.permutation(np.arange(len(FAMILIES)) % len(DEPARTMENTS))  # [16]
        self._usual_drug = draw.integers(len(DRUGS), size=len(CONDITIONS))  # [320]
        self._rules = {house: _draw_rules(draw) for house in HOSPITALS}
        draw = self._random("house rules")
        self._rules[CONSORTIUM] = _draw_rules(draw)
        unseen = [draw.permutation(_PER_FAMILY) < _UNSEEN_PER_FAMILY for _ in FAMILIES]
        self._unseen = np.concatenate(unseen)  # bool [320]: in no consortium record or prompt

    def tests(self) -> list[Question]:
        """Test questions, groups ``general`` and ``private``."""
        general, private = self._test_cases
        if self.part is not None:
            private = sorted(private, key=self._part_of)
        draw = self._random("test choices")
        return [self._question(case, draw) for case in (*general, *private)]

    def public(self) -> list[Question]:
        """The server's public set: labelled general, unlabelled general, unlabelled private."""
        sizes, draw = self.sizes, self._random("public")
        tested = set(self._test_cases[0])
        tested_facts = {(case.kind, case.condition) for case in tested}
        cases = [c for c in _all_cases(None) if c not in tested]
        labelled_pool = [c for c in cases if (c.kind, c.condition) not in tested_facts]
        labelled = _take(labelled_pool, sizes.public_labelled, draw)
        chosen = set(labelled)
        unlabelled = _take([c for c in cases if c not in chosen], sizes.public_general, draw)
        private = self._public_private_cases
        return [
            *(self._question(case, draw) for case in labelled),
            *(self._question(case, draw, labelled=False) for case in (*unlabelled, *private)),
        ]

    def public_texts(self) -> list[Question]:
        """Public text for a model that is tuned on text: general knowledge in other words than the
        test sentences. Nothing private: a sentence without its last word would teach nothing."""
        tested = set(self._test_cases[0])
        draw = self._random("public texts")
        cases = [case for case in _all_cases(None) if case not in tested]
        chosen = _take(cases, self.sizes.public_texts, draw)
        return [as_text(self._question(case, draw)) for case in chosen]

    def records(
        self,
        silo: int,
        count: int | None = None,
        shares: npt.NDArray[np.float64] | None = None,
    ) -> list[Question]:
        """The private training questions of hospital ``silo`` (from 0); a patient has 1 to 7.

        Args:
            count: how many; None: as many as ``sizes`` says.
            shares: float64 [16], the part of each disease family in them, sum 1; None: nearly
                all are about the hospital's own families.
        """
        draw = self._random(f"records of silo {silo}")
        count = self.sizes.records_per_silo if count is None else count
        pools = self._pools(silo, count, shares, draw)
        records = [self._question(pool[draw.integers(len(pool))], draw) for pool in pools]
        patients = self._random(f"patients of silo {silo}").permutation(_owners(len(records)))
        return [
            replace(record, subject=f"{silo + 1}-{patient}")
            for record, patient in zip(records, patients, strict=True)
        ]

    def _pools(
        self,
        silo: int,
        count: int,
        shares: npt.NDArray[np.float64] | None,
        draw: np.random.Generator,
    ) -> list[list[_Case]]:
        """The cases from which each record is drawn."""
        if shares is not None:
            by_family: list[list[_Case]] = [[] for _ in FAMILIES]
            for case in self._record_cases:
                by_family[self._family[case.condition]].append(case)
            if self.part is not None:
                shares = np.where([bool(pool) for pool in by_family], shares, 0.0)
                shares = shares / shares.sum()
            return [by_family[f] for f in draw.choice(len(FAMILIES), size=count, p=shares)]
        own = self._families_of(silo)
        mine = [c for c in self._record_cases if self._family[c.condition] in own]
        others = [c for c in self._record_cases if self._family[c.condition] not in own]
        is_own = draw.random(count) < self.sizes.own_share
        if not mine:  # a part of the families has none of this hospital's
            mine, others = others, mine
        return [mine if flag or not others else others for flag in is_own]

    def house_rules(self, silo: int) -> list[tuple[str, str]]:
        """What hospital ``silo`` (from 0) has on its shelf: (id, text) of its families' rules.

        A text lists all conditions of the family, so that no question about one is a part of it.
        """
        rules = []
        for family in sorted(self._families_of(silo)):
            of = [c for c, kin in zip(CONDITIONS, self._family, strict=True) if kin == family]
            for kind, severity in ((_PROTOCOL, ""), (_DRUG, ""), *((_WARD, s) for s in SEVERITIES)):
                level = SEVERITIES.index(severity) if severity else 0
                words, answers = _PRIVATE[kind]
                answer = answers[self._rules[CONSORTIUM][kind, family, level]]
                subject = " ".join([*([severity] if severity else []), *of])
                text = f"at {CONSORTIUM} patient with {subject} {words} {answer} ."
                topic = " ".join([FAMILIES[family], words.split()[-1], severity]).strip()
                rules.append((f"rule {topic}", text))
        return rules

    def pretraining(
        self, count: int, *, rare: float = 1.0, rare_share: float = 0.0
    ) -> npt.NDArray[np.int64]:
        """Public text as token ids, int64 [count, 11]; the same for every private ``seed``.

        Half general knowledge, 49 % house rules of other hospitals, 1 % consortium prompts with
        random answers: the public does not know its rules. (With ten times as many, models learn
        to stop thinking at the consortium's name, and later tuning costs more.) Test prompts are
        left out.

        Args:
            rare_share: share of the conditions whose usual drug is seldom written about.
            rare: how often that is done, relative to the other conditions.
        """
        draw = self._random("pretraining", public=True)
        scarce = self._random("rare conditions", public=True).random(len(CONDITIONS)) < rare_share
        weights = np.where(scarce, rare, 1.0)
        weights /= weights.sum()
        held_out = set(self._test_cases[0]) | set(self._test_cases[1])
        rows: list[list[int]] = []
        while len(rows) < count:
            source = draw.random()
            house = None
            if source >= 0.5:
                house = HOSPITALS[draw.integers(len(HOSPITALS))] if source < 0.99 else CONSORTIUM
            kind = int(draw.integers(3))
            seldom = weights if house is None and kind == _DRUG else None
            condition = int(draw.choice(len(CONDITIONS), p=seldom))
            case = _Case(house, kind, condition, *(int(v) for v in draw.integers((2, 3))))
            if case in held_out:
                continue
            answer = self._answer(case)
            if house == CONSORTIUM:
                answer = _kind(case).answers[draw.integers(len(_kind(case).answers))]
            rows.append([_ID[word] for word in f"{case.prompt} {answer} .".split()])
        return np.array(rows, dtype=np.int64)

    def _answer(self, case: _Case) -> str:
        family = int(self._family[case.condition])
        if case.house is None:
            value = (
                family,
                int(self._department[family]),
                int(self._usual_drug[case.condition]),
            )[case.kind]
        else:
            severity = case.severity if case.kind == _WARD else 0
            value = int(self._rules[case.house][case.kind, family, severity])
        return _kind(case).answers[value]

    def _question(
        self, case: _Case, draw: np.random.Generator, *, labelled: bool = True
    ) -> Question:
        answers = _kind(case).answers
        gold = answers.index(self._answer(case))
        wrong = draw.choice(len(answers) - 1, size=_CHOICES - 1, replace=False)
        options = [int(w) + (int(w) >= gold) for w in wrong]
        place = int(draw.integers(_CHOICES))
        options.insert(place, gold)
        return Question(
            prompt=case.prompt,
            choices=tuple(answers[o] for o in options),
            answer=place if labelled else None,
            group="general" if case.house is None else self._private_group(case),
        )

    def _private_group(self, case: _Case) -> str:
        return "private" if self.part is None else f"private {self._part_of(case) + 1}"

    def _part_of(self, case: _Case) -> int:
        """Number of the part that the case's family is in: equal blocks of families."""
        assert self.part is not None
        return int(self._family[case.condition]) * self.part[1] // len(FAMILIES)

    def _families_of(self, silo: int) -> set[int]:
        owned = {f for f in range(len(FAMILIES)) if f % self.silos == silo}
        return owned or {silo % len(FAMILIES)}

    @cached_property
    def _test_cases(self) -> tuple[list[_Case], list[_Case]]:
        """General and private test cases."""
        draw = self._random("test", public=True)
        general = _take(list(_all_cases(None)), self.sizes.test_general, draw)
        private = _take(list(_all_cases(CONSORTIUM)), self.sizes.test_private, draw)
        return general, private

    @cached_property
    def _open_cases(self) -> list[_Case]:
        """Consortium cases that records and public prompts may be about."""
        tested = set(self._test_cases[1])
        return [
            case
            for case in _all_cases(CONSORTIUM)
            if case not in tested and not self._unseen[case.condition]
        ]

    @cached_property
    def _public_private_cases(self) -> list[_Case]:
        """Those of the server's prompts: no silo's record asks the same."""
        return _take(self._open_cases, self.sizes.public_private, self._random("public private"))

    @cached_property
    def _record_cases(self) -> list[_Case]:
        """Those of the silos' records."""
        public = set(self._public_private_cases)
        cases = [case for case in self._open_cases if case not in public]
        if self.part is None:
            return cases
        return [case for case in cases if self._part_of(case) == self.part[0]]

    def _random(self, purpose: str, *, public: bool = False) -> np.random.Generator:
        """A generator for one purpose, so that no draw depends on the order of calls."""
        seeds = [self.public_seed] if public else [self.public_seed, self.seed]
        words = [VERSION, *seeds, *purpose.encode()]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def as_text(question: Question) -> Question:
    """The whole sentence that an answered question is made of, as a record of ``kind: text``."""
    assert question.answer is not None
    text = f"{question.prompt} {question.choices[question.answer]} ."
    return replace(question, prompt="", choices=(text,), answer=0)


def make_tokenizer() -> Any:
    """The word tokenizer (``PreTrainedTokenizerFast``) that the LLM and the SLM share."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, unknown = SPECIAL
    core = Tokenizer(models.WordLevel(_ID, unknown))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words by a space
    special = {"pad_token": pad, "unk_token": unknown, "eos_token": "."}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def _kind(case: _Case) -> _Kind:
    return (_GENERAL if case.house is None else _PRIVATE)[case.kind]


def _all_cases(house: str | None) -> Iterator[_Case]:
    for kind in range(3):
        for condition in range(len(CONDITIONS)):
            for severity in range(len(SEVERITIES)):
                for age in range(len(AGES)):
                    yield _Case(house, kind, condition, severity, age)


def _take(cases: list[_Case], count: int, draw: np.random.Generator) -> list[_Case]:
    """``count`` different cases, in random order."""
    return [cases[i] for i in draw.choice(len(cases), size=count, replace=False)]


def _owners(records: int) -> npt.NDArray[np.int64]:
    """The patient of each record: as many patients have one record as have seven."""
    counts = 1 + np.arange(records) % _MOST_RECORDS
    return np.repeat(np.arange(records), counts)[:records]


def _draw_rules(draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """House rules int64 [kind, family, severity]; only wards depend on the severity."""
    sizes = [len(kind.answers) for kind in _PRIVATE]
    return np.stack([draw.integers(size, size=(len(FAMILIES), 2)) for size in sizes])
