"""Records that are set aside: answered each by itself, and without a trace in what is tuned.

Adversary: a server whose adapter amplifies the last bits of floating-point sums until they decide
an answer; one that learns from one record about another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from securefedcollm_audits.privacy.coupling import hostile_adapters

from securefedcollm.errors import ConfigError, LocalProtocolError
from securefedcollm.federation.cotuning import SiloTuning
from securefedcollm.privacy.aside import SparingNoise, set_aside
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.study import Study
from securefedcollm.tuning.adapters import full_layout, layout_of, load_vector, to_vector
from securefedcollm.tuning.data import read_questions
from securefedcollm.tuning.evaluate import evaluate
from securefedcollm.tuning.heldout import right_shares
from securefedcollm.tuning.local import sampled_gradients
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import PLAIN, EncodedQuestions, encode
from tests.support.models import WORDS, word_level
from tests.support.plans import attached
from tests.support.small import small_study

TOKENIZER = word_level(["<s>", "<unk>", *WORDS])
LONG = Question(" ".join(WORDS[:12]), ("w1 w2 w3 w4", "w5", "w6 w7"), 1)
LOSS = LossPlan(kind="choices", scoring=PLAIN, micro_batch=4)


def tensors(asked: list[Question]) -> EncodedQuestions:
    return encode(asked, TOKENIZER, 32)


def tie(question: Question) -> Question:
    return Question(question.prompt, (question.choices[0], question.choices[0]), 1)


def hostile(model: Any) -> list[np.ndarray]:
    layout = full_layout(model)
    draw = np.random.default_rng(7)
    return list(hostile_adapters(to_vector(model, layout), layout, 10, None, draw))


def together(model: Any, data: EncodedQuestions) -> np.ndarray:
    """The control: one batch, as long as its longest record."""
    found = evaluate(model, data, scoring=PLAIN, batch_size=64)
    return np.where(np.isfinite(found.gold_log_prob), found.correct, 0.0)


def by_itself(model: Any, data: EncodedQuestions) -> np.ndarray:
    return right_shares(model, data, np.arange(len(data)), PLAIN)


def test_no_records_answer_follows_from_another_record(toy: Any) -> None:
    """Others are longer, fewer, or in another order. Each has a tie between two choices, which last
    bits decide; in one padded batch, the control, some of them then change."""
    model = attached(toy.model(hidden=32), "lora", rank=2, alpha=4)
    asked, layout = [tie(question) for question in toy.questions(24)], full_layout(model)
    sets = {"with": [*asked, LONG], "few": asked[:5], "back": asked[::-1]}
    changed = 0
    for adapter in hostile(model):
        load_vector(model, layout, adapter)
        alone = by_itself(model, tensors(asked))
        assert (by_itself(model, tensors(sets["with"]))[:24] == alone).all()
        assert (by_itself(model, tensors(sets["few"])) == alone[:5]).all()
        assert (by_itself(model, tensors(sets["back"]))[::-1] == alone).all()
        before = together(model, tensors(asked))
        changed += int((together(model, tensors(sets["with"]))[:24] != before).sum())
    assert changed > 0


def test_what_is_counted_is_what_an_evaluation_says(toy: Any) -> None:
    model = attached(toy.model(), "ffa-lora", rank=2, alpha=4)
    asked = toy.questions(40)
    data, rows = tensors(asked), np.array([3, 17, 4])
    correct = evaluate(model, data, scoring=PLAIN).correct
    assert right_shares(model, data, rows, PLAIN).tolist() == correct[rows].tolist()
    texts = tensors([Question("w1 w2", (" ".join(WORDS[i : i + 6]),), 0) for i in range(9)])
    shares = by_itself(model, texts)
    assert shares == pytest.approx(evaluate(model, texts).correct, abs=1e-6)
    assert len(set(shares.tolist())) > 1


def test_a_model_that_says_nothing_finite_is_wrong_and_no_failure(toy: Any) -> None:
    model = attached(toy.model(), "ffa-lora", rank=2, alpha=4)
    layout = full_layout(model)
    load_vector(model, layout, np.full(layout.size, 3e38, dtype=np.float32))
    assert by_itself(model, tensors(toy.questions(9))).tolist() == [0.0] * 9


def test_one_record_that_fails_takes_no_other_with_it(toy: Any, caplog: Any) -> None:
    """Adversary: a server that makes the answer to a certain record fail. The control is a batch,
    which fails as a whole."""
    model = attached(toy.model(), "ffa-lora", rank=2, alpha=4)
    data = tensors(toy.questions(20))
    alone = by_itself(model, data)
    poisoned = 5
    longest = int((data.segments[poisoned] >= 0).sum())

    def fail(module: Any, given: Any, kept: Any) -> None:
        tokens = kept["input_ids"]
        row = data.tokens[poisoned, :longest]
        width = tokens.shape[1]
        if width >= longest and bool((tokens[:, :longest] == row).all(1).any()):
            raise RuntimeError("no answer to this record")

    hook = model.base_model.model.model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        alone[poisoned] = 0.0
        assert by_itself(model, data).tolist() == alone.tolist()
        assert "cannot be answered" in caplog.text
        with pytest.raises(RuntimeError):
            together(model, data)
    finally:
        hook.remove()


@pytest.mark.soak
def test_a_held_out_record_leaves_no_bit_in_the_gradients_of_a_step(toy: Any) -> None:
    """Its words, its length, whether it is there: the step of the others is the same to the bit.
    The control is the same record on the other side."""
    model = attached(toy.model(), "ffa-lora", rank=2, alpha=4)
    layout, asked = layout_of(model, "ffa-lora"), toy.questions(30)
    key = b"n" * 32

    def step(questions: list[Question], aside: np.ndarray) -> list[bytes]:
        gradients = sampled_gradients(
            model, layout, tensors(questions), LOSS, q=0.5, noise=SparingNoise(aside, key)
        )
        return [gradient.tobytes() for gradient in gradients]

    aside = np.arange(31) % 5 == 0
    without = step(asked, aside[:30])
    assert 5 < len(without) < 24
    assert step([*asked, LONG], aside) == without
    replaced = [LONG if i == 10 else question for i, question in enumerate(asked)]
    assert step(replaced, aside[:30]) == without
    taken = NoiseSource(key).poisson_batch(31, 0.5)
    tuned = int(next(i for i in taken if not aside[i]))
    other = [LONG if i == tuned else question for i, question in enumerate(asked)]
    assert step(other, aside[:30]) != without


# --- The silo's whole workload --------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> Any:
    directory = tmp_path_factory.mktemp("small")
    small_study(directory)
    return directory


def validated(directory: Any, **changes: Any) -> Study:
    privacy = {"epsilon": 8.0, "delta": 1e-5}
    return small_study(directory, **{"validation": {"share": 0.2}, "privacy": privacy} | changes)


def silo(directory: Any, study: Study, count: int = 120, owners: int = 0) -> SiloTuning:
    questions = read_questions(directory / "train.jsonl")[:count]
    if owners:
        questions = [replace(q, subject=f"p{i % owners}") for i, q in enumerate(questions)]
    return SiloTuning(study, "silo-1", questions, data=directory)


def test_the_units_that_are_set_aside_follow_from_their_words_and_the_key(small: Any) -> None:
    study = validated(small)
    mine, fewer = silo(small, study), silo(small, study, 100)
    for made in (mine, fewer):
        made.set_aside(b"k" * 32)
    assert (mine.aside()[:100] == fewer.aside()).all()
    names = [content.words for content in mine.contents()]
    assert (mine.aside() == set_aside(b"k" * 32, names, 0.2)).all()
    assert mine.right_shares(mine.adapter()).shape == (mine.aside().sum(),)


def test_nothing_is_tuned_before_the_parts_are_known(small: Any) -> None:
    mine = silo(small, validated(small))
    with pytest.raises(LocalProtocolError, match="none was"):
        mine.fit(mine.adapter(), 0, lambda *_: None)


def test_without_privacy_a_held_out_record_changes_no_bit_of_the_update(small: Any) -> None:
    """Other words in its place leave the update as it is; in the place of a tuned one they do
    not."""
    study = validated(small, privacy=None)
    questions = read_questions(small / "train.jsonl")
    first, spare = list(questions[:60]), questions[60:]

    def made(asked: list[Question]) -> SiloTuning:
        tuning = SiloTuning(study, "silo-1", asked, data=small)
        tuning.set_aside(b"k" * 32)
        return tuning

    def update(asked: list[Question]) -> bytes:
        tuning = made(asked)
        return tuning.fit(tuning.adapter(), 0, lambda *_: None).tobytes()

    aside, others = made(first).aside(), made(list(spare)).aside()
    plain = update(first)
    for part in (True, False):
        place = int(np.flatnonzero(aside == part)[0])
        other = spare[int(np.flatnonzero(others == part)[0])]
        changed = [other if i == place else question for i, question in enumerate(first)]
        assert (update(changed) == plain) == part


def test_a_subject_is_one_unit_whose_questions_are_averaged(small: Any) -> None:
    privacy = {"epsilon": 8.0, "delta": 1e-5, "unit": "subject", "subject": "patient"}
    local = {"steps": 2, "batch_size": 10, "learning_rate": 0.01}
    study = validated(small, privacy=privacy, local=local)
    mine = silo(small, study, owners=40)
    mine.set_aside(b"k" * 32)
    aside = mine.aside()
    assert (aside[:40] == aside[40:80]).all()
    assert (aside[:40] == aside[80:]).all()
    shares = mine.right_shares(mine.adapter())
    assert len(shares) == int(aside[:40].sum())
    assert set(np.round(shares * 3).tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert np.allclose(shares * 3, np.round(shares * 3))


def test_too_few_and_too_many_are_refused_by_their_number(small: Any) -> None:
    few = silo(small, validated(small, validation={"share": 1e-9}))
    with pytest.raises(ConfigError, match="sets 0 aside") as refused:
        few.set_aside(b"k" * 32)
    assert refused.value.where == "validation.share"
    narrow = validated(small, aggregation={"clip_norm": 4.0, "value_bits": 10})
    with pytest.raises(ConfigError, match="room for"):
        silo(small, narrow, 700).set_aside(b"k" * 32)
