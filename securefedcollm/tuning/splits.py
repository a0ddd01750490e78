"""Which question belongs to whom: identity of records, fingerprint of a set, and dealing it out.

A question's identity is its content (:func:`record_id`), never its place in a file, so that a
re-ordered copy of a file gives the same fingerprint, the same split and the same budget.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from securefedcollm.errors import ConfigError, DataError
from securefedcollm.tuning.content import content_digest, folded
from securefedcollm.tuning.question import Question


def record_id(question: Question) -> bytes:
    """SHA-256 (32 bytes) of the prompt, the choices as a set, and the right choice's text.

    Blind to Unicode normalisation form, to runs of white space, to the order in which the choices
    are listed, and to ``group``: none of them makes a record another person's record.
    """
    right = None if question.answer is None else folded(question.choices[question.answer])
    choices = sorted(folded(choice) for choice in question.choices)
    canonical = json.dumps([folded(question.prompt), choices, right], ensure_ascii=False)
    return hashlib.sha256(b"securefedcollm/record/v1\0" + canonical.encode()).digest()


def record_content(question: Question) -> bytes:
    """SHA-256 (32 bytes) of what makes a record the same in every study; not of its answer.

    For the privacy ledger. See :func:`~.formats.content_of`; a question that came from no file is
    identified by the words of its prompt and its choices.
    """
    return question.content or content_digest([folded(question.prompt)], question.choices)


def dataset_fingerprint(questions: Iterable[Question]) -> str:
    """SHA-256 (hex) of the set of :func:`record_id`: equal for the same records in any order.

    Questions with a ``subject`` are grouped by it, whatever the subjects are called: an account of
    the unit ``subject`` is about one way to divide the records among people, and no other.

    The privacy ledger names a data set by it, and an older ledger keyed the budget by it: order,
    duplicates, layout and file format do not change it. Budgets belong to records
    (:func:`record_content`), because adding, dropping or rewording one gives another fingerprint.
    It is computed from private text without a secret, so a small, guessable set can be confirmed by
    it; it belongs in the silo's own ledger.
    """
    groups: dict[str | None, set[bytes]] = {}
    for question in questions:
        groups.setdefault(question.subject, set()).add(record_id(question))
    if set(groups) <= {None}:
        domain, items = b"securefedcollm/dataset/v1\0", groups.get(None, set())
    else:
        domain = b"securefedcollm/dataset-by-subject/v1\0"
        items = {hashlib.sha256(b"".join(sorted(ids))).digest() for ids in groups.values()}
    return hashlib.sha256(domain + b"".join(sorted(items))).hexdigest()


@dataclass(frozen=True)
class Split:
    """One training file dealt out.

    Attributes:
        silos: the private questions of each silo.
        public_labelled: public questions whose answers are public too.
        public_unlabelled: public questions with ``answer=None``: their answers are nobody's.
        dev: held out for choosing hyper-parameters; no participant trains on it.
        unused: what was left.
    """

    silos: tuple[tuple[Question, ...], ...]
    public_labelled: tuple[Question, ...]
    public_unlabelled: tuple[Question, ...]
    dev: tuple[Question, ...]
    unused: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """How one training file is dealt out.

    Attributes:
        silos: number of silos S.
        per_silo: private questions of each silo; their mean if ``skew`` is not 1.
        public: public questions, of which ``public_labelled`` keep their answers.
        dev: development questions.
        concentration: None deals the silos' questions independently and identically distributed.
            A number α > 0 draws for every ``group`` (of a classification without groups: every
            label) a Dirichlet(α) distribution over the silos (Hsu, Qi and Brown, arXiv
            1909.06335): the smaller α, the more one silo owns a group.
        skew: size of the largest silo over that of the smallest, see :func:`silo_sizes`.
    """

    silos: int
    per_silo: int
    public: int
    public_labelled: int = 0
    dev: int = 0
    concentration: float | None = None
    skew: float = 1.0

    def check(self, questions: int) -> None:
        """Refuse a plan that ``questions`` questions cannot fill.

        Raises:
            DataError: there are too few questions.
            ConfigError: impossible counts.
        """
        if self.public_labelled > self.public:
            raise ConfigError(
                f"{self.public_labelled} labelled of {self.public} public questions",
                where="task.data.public_labelled",
                hint="it counts those public questions that keep their answers",
            )
        needed = self.silos * self.per_silo + self.public + self.dev
        if needed > questions:
            raise DataError(
                f"the study needs {needed} training questions ({self.silos} × {self.per_silo} "
                f"private, {self.public} public, {self.dev} development) but the file has "
                f"{questions}",
                where="task.data",
                hint="lower task.data.per_silo or task.data.public, or give a larger file",
            )


def split_questions(questions: Sequence[Question], plan: SplitPlan, *, seed: int) -> Split:
    """Deal one training file out to the silos, the public set and the development set.

    Deterministic in (the set of records, the plan, the seed). Questions with the same prompt stay
    together, so that no part holds another part's question with other distractors; so do questions
    of the same subject, since a person in two silos would have two budgets.

    Args:
        questions: all labelled.
        seed: of the shuffle (and of the Dirichlet draw).

    Raises:
        DataError: there are too few questions.
        ConfigError: a Dirichlet split of questions that all have one group, or impossible counts.
    """
    plan.check(len(questions))
    rng = np.random.Generator(np.random.Philox(key=[seed, _STREAM]))
    clusters = _clusters(questions)
    order = [clusters[int(i)] for i in rng.permutation(len(clusters))]
    held_dev, order = _take(order, plan.dev)
    held_public, order = _take(order, plan.public)
    sizes = silo_sizes(plan.silos, plan.per_silo, plan.skew)
    if plan.concentration is None:
        private = []
        for size in sizes:
            part, order = _take(order, size)
            private.append(part)
        rest = [question for cluster in order for question in cluster]
    else:
        private, rest = _dirichlet(order, sizes, plan.concentration, rng)
    return Split(
        silos=tuple(tuple(part) for part in private),
        public_labelled=tuple(held_public[: plan.public_labelled]),
        public_unlabelled=tuple(q.unlabelled() for q in held_public[plan.public_labelled :]),
        dev=tuple(held_dev),
        unused=tuple(rest),
    )


def silo_sizes(silos: int, per_silo: int, skew: float) -> list[int]:
    """Records of each silo: a geometric sequence with ``skew`` = last / first.

    The mean stays ``per_silo``, up to rounding down (every silo keeps at least one record).
    """
    if skew == 1:
        return [per_silo] * silos
    weights = skew ** (np.arange(silos) / max(1, silos - 1))
    return [max(1, int(size)) for size in silos * per_silo * weights / weights.sum()]


def without(questions: Iterable[Question], held_out: Iterable[Question]) -> list[Question]:
    """``questions`` less those whose prompt occurs in ``held_out`` (public sets do overlap)."""
    seen = {_asked(question) for question in held_out}
    return [question for question in questions if _asked(question) not in seen]


_STREAM = 0x5EED_5B1175  # keeps this use of a study's seed apart from every other one


def _asked(question: Question) -> str:
    """The text by which two questions are the same, whatever their answers: prompt, or all text."""
    return folded(question.prompt or question.choices[0])


def _clusters(questions: Sequence[Question]) -> list[list[Question]]:
    """Questions linked by prompt or subject, in an order that depends on their content alone."""
    ordered = sorted(questions, key=lambda question: (record_id(question), question.subject or ""))
    parent = list(range(len(ordered)))  # a forest of disjoint sets

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, question in enumerate(ordered):
        parent[root(index)] = root(first.setdefault(("prompt", _asked(question)), index))
        if question.subject is not None:
            parent[root(index)] = root(first.setdefault(("subject", question.subject), index))
    clusters: dict[int, list[Question]] = {}
    for index, question in enumerate(ordered):
        clusters.setdefault(root(index), []).append(question)
    return sorted(clusters.values(), key=lambda cluster: record_id(cluster[0]))


def _take(order: list[list[Question]], count: int) -> tuple[list[Question], list[list[Question]]]:
    """The first ``count`` questions in whole clusters, skipping clusters that overshoot."""
    taken: list[Question] = []
    left: list[list[Question]] = []
    for cluster in order:
        if len(taken) + len(cluster) <= count:
            taken.extend(cluster)
        else:
            left.append(cluster)
    if len(taken) < count:
        raise DataError(
            f"{count} questions cannot be taken without dividing questions of the same prompt",
            where="task.data",
            hint="lower task.data.per_silo or task.data.public, or remove repeated prompts",
        )
    return taken, left


def _dirichlet(
    order: list[list[Question]],
    sizes: Sequence[int],
    concentration: float,
    rng: np.random.Generator,
) -> tuple[list[list[Question]], list[Question]]:
    """Given sizes, unequal topics: each group's questions follow its own draw over the silos."""
    group_of = _grouping([cluster[0] for cluster in order])
    groups = sorted({group_of(cluster[0]) for cluster in order})
    if len(groups) < 2:
        raise ConfigError(
            "a Dirichlet split needs questions of several groups, and all have the same",
            where="task.data",
            hint="add a subject column with at least two values, or split IID",
        )
    shares = {group: rng.dirichlet(np.full(len(sizes), concentration)) for group in groups}
    parts: list[list[Question]] = [[] for _ in sizes]
    rest: list[Question] = []
    for cluster in order:
        room = np.array([len(p) + len(cluster) <= s for p, s in zip(parts, sizes, strict=True)])
        weights = np.where(room, shares[group_of(cluster[0])] + 1e-9, 0.0)
        if not weights.any():
            rest.extend(cluster)
            continue
        parts[int(rng.choice(len(sizes), p=weights / weights.sum()))].extend(cluster)
    return parts, rest


def _grouping(questions: Sequence[Question]) -> Callable[[Question], str]:
    """By group, or by label if all have one group and the same choices (a classification)."""
    if len({q.group for q in questions}) > 1 or len({q.choices for q in questions}) > 1:
        return lambda question: question.group
    return lambda question: str(question.answer)
