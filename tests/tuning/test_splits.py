"""Who gets which question, and what a set of questions is known by."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from securefedcollm.errors import ConfigError, DataError
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.splits import (
    SplitPlan,
    dataset_fingerprint,
    record_id,
    silo_sizes,
    split_questions,
    without,
)


def pool(count: int, groups: int = 4) -> list[Question]:
    return [
        Question(f"Question: number {i}?\nAnswer:", ("yes", "no", f"{i}"), i % 3, f"g{i % groups}")
        for i in range(count)
    ]


def test_the_fingerprint_knows_records_not_files() -> None:
    questions = pool(50)
    print_of = dataset_fingerprint(questions)
    shuffled = random.Random(1).sample(questions, len(questions))
    assert dataset_fingerprint(shuffled) == print_of
    assert dataset_fingerprint(questions + questions[:3]) == print_of
    turned = [
        replace(q, choices=q.choices[::-1], answer=2 - q.answer, group="other")  # type: ignore[operator]
        for q in questions
    ]
    assert dataset_fingerprint(turned) == print_of
    spaced = [replace(q, prompt=q.prompt.replace(" ", "  ")) for q in questions]
    assert dataset_fingerprint(spaced) == print_of


def test_the_fingerprint_changes_with_a_record() -> None:
    questions = pool(50)
    print_of = dataset_fingerprint(questions)
    assert dataset_fingerprint(questions[1:]) != print_of
    assert dataset_fingerprint([replace(questions[0], answer=1), *questions[1:]]) != print_of
    assert dataset_fingerprint([replace(questions[0], answer=None), *questions[1:]]) != print_of
    assert dataset_fingerprint([replace(questions[0], prompt="?"), *questions[1:]]) != print_of
    # Two texts must not run into each other.
    ab = Question("a b", ("c", "d"), 0)
    assert record_id(ab) != record_id(Question("a", ("b c", "d"), 0))


def test_the_fingerprint_by_subject_knows_who_shares_records_not_their_names() -> None:
    questions = pool(12)
    owned = [replace(q, subject=f"p{i % 4}") for i, q in enumerate(questions)]
    renamed = [replace(q, subject=f"case {i % 4}") for i, q in enumerate(questions)]
    other = [replace(q, subject=f"p{i % 3}") for i, q in enumerate(questions)]
    assert dataset_fingerprint(owned) == dataset_fingerprint(renamed[::-1])
    assert len({dataset_fingerprint(q) for q in (questions, owned, other)}) == 3


def test_a_subject_is_dealt_to_one_silo() -> None:
    """A person in two silos would have two budgets."""
    questions = [replace(q, subject=f"p{i // 5}") for i, q in enumerate(pool(120))]
    questions += [replace(questions[3], subject="p23")]  # a prompt that two of them share
    split = split_questions(questions, SplitPlan(silos=3, per_silo=20, public=30), seed=7)
    parts = [*split.silos, split.public_unlabelled, split.unused]
    assert [len(part) for part in split.silos] == [20, 20, 20]
    owners = [{q.subject for q in part} for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners)) == 24
    (home,) = [part for part in owners if "p0" in part]
    assert "p23" in home


def test_every_question_lands_once_and_independent_of_file_order() -> None:
    questions = pool(120)
    split = split_questions(
        questions, SplitPlan(silos=3, per_silo=20, public=30, public_labelled=10, dev=15), seed=7
    )
    assert [len(part) for part in split.silos] == [20, 20, 20]
    assert (len(split.public_labelled), len(split.public_unlabelled)) == (10, 20)
    assert (len(split.dev), len(split.unused)) == (15, 15)
    parts = [*split.silos, split.public_labelled, split.public_unlabelled, split.dev, split.unused]
    prompts = Counter(q.prompt for part in parts for q in part)
    assert prompts == Counter(q.prompt for q in questions)
    assert all(q.answer is None for q in split.public_unlabelled)
    assert all(q.answer is not None for q in split.public_labelled)

    again = split_questions(
        questions[::-1],
        SplitPlan(silos=3, per_silo=20, public=30, public_labelled=10, dev=15),
        seed=7,
    )
    assert again == split
    other = split_questions(questions, SplitPlan(silos=3, per_silo=20, public=30, dev=15), seed=8)
    assert other.silos != split.silos


def test_questions_of_one_prompt_stay_together() -> None:
    questions = pool(60)
    questions += [replace(q, choices=("left", "right"), answer=1) for q in questions[:25]]
    for seed in range(5):
        split = split_questions(questions, SplitPlan(silos=3, per_silo=18, public=20), seed=seed)
        parts = [*split.silos, split.public_unlabelled, split.unused]
        owners: dict[str, set[int]] = {}
        for number, part in enumerate(parts):
            for q in part:
                owners.setdefault(q.prompt, set()).add(number)
        assert all(len(owner) == 1 for owner in owners.values())


def test_dirichlet_gives_equal_sizes_and_unequal_topics() -> None:
    questions = pool(400)

    def largest_share(concentration: float) -> float:
        split = split_questions(
            questions,
            SplitPlan(silos=4, per_silo=60, public=40, concentration=concentration),
            seed=3,
        )
        assert [len(part) for part in split.silos] == [60] * 4
        tops = [Counter(q.group for q in part).most_common(1)[0][1] / 60 for part in split.silos]
        return sum(tops) / len(tops)

    assert largest_share(0.05) > 0.5 > largest_share(1000.0)


def test_impossible_splits_say_so() -> None:
    with pytest.raises(DataError, match=r"needs 190 training questions .* file has 100"):
        split_questions(pool(100), SplitPlan(silos=3, per_silo=60, public=10), seed=0)
    with pytest.raises(ConfigError, match="public_labelled"):
        split_questions(
            pool(100), SplitPlan(silos=3, per_silo=6, public=10, public_labelled=11), seed=0
        )
    with pytest.raises(ConfigError, match="Dirichlet"):
        split_questions(
            pool(100, groups=1),
            SplitPlan(silos=3, per_silo=6, public=10, concentration=0.1),
            seed=0,
        )
    twins = [replace(q, answer=a) for q in pool(10) for a in (0, 1)]
    with pytest.raises(DataError, match="same prompt"):
        split_questions(twins, SplitPlan(silos=3, per_silo=3, public=3), seed=0)


def test_leaked_test_prompts_are_left_out() -> None:
    questions = pool(20)
    test = [replace(q, choices=("other", "choices"), prompt=q.prompt + " ") for q in questions[:4]]
    assert without(questions, test) == questions[4:]


def test_skewed_silos_keep_the_mean_and_differ_by_the_factor() -> None:
    assert silo_sizes(4, 50, 1.0) == [50] * 4
    sizes = silo_sizes(4, 100, 8.0)
    assert sizes == sorted(sizes)
    assert abs(sizes[-1] / sizes[0] - 8) < 0.3
    assert 396 <= sum(sizes) <= 400
    for concentration in (None, 0.5):
        split = split_questions(
            pool(600),
            SplitPlan(silos=4, per_silo=100, public=40, skew=8.0, concentration=concentration),
            seed=3,
        )
        assert [len(part) for part in split.silos] == sizes


def test_a_dirichlet_split_of_a_classification_is_by_label() -> None:
    questions = [Question(f"Text: {i}\nLabel:", ("a", "b", "c"), i % 3) for i in range(300)]
    split = split_questions(
        questions, SplitPlan(silos=3, per_silo=60, public=3, concentration=0.05), seed=1
    )
    tops = [Counter(q.answer for q in part).most_common(1)[0][1] / 60 for part in split.silos]
    assert sum(tops) / 3 > 0.6
