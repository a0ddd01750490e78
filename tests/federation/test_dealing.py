"""How a simulation deals the records out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.federation.dealing import deal, noisy_answers
from securefedcollm.study import load_study
from securefedcollm.tuning.data import read_questions, write_questions
from securefedcollm.tuning.digits import Digits
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.world import World, as_text
from tests.support.inputs import make_inputs

QUICKSTART = Path("configs/quickstart.yaml")


def dealt(*overrides, noisy=0):
    return deal(load_study(QUICKSTART, ["task.data.per_silo=400", *overrides]), None, noisy)


def stems(questions):
    """By disease family (four letters of a condition say it)."""
    return Counter(q.prompt.split()[6][:4] for q in questions)


def test_the_built_in_hospitals_own_their_families_unless_told_otherwise():
    own = [stems(q) for q in dealt().silos.values()]
    assert all(sum(sorted(c.values())[-4:]) > 0.9 * 400 for c in own)
    iid = dealt("task.data.partition=iid").silos.values()
    assert all(len(stems(q)) == 16 and max(stems(q).values()) < 60 for q in iid)

    def largest(alpha):
        parts = dealt("task.data.partition=dirichlet", f"task.data.alpha={alpha}").silos.values()
        whole = sum((stems(q) for q in parts), Counter())
        return np.mean([max(stems(q)[f] for q in parts) / whole[f] for f in whole])

    assert largest(0.05) > 0.8 > 0.4 > largest(1000)


def test_the_built_in_hospitals_as_text_are_the_same_records(tmp_path):
    alone = ("models.llm=none", "distillation={}")
    questions, texts = dealt(*alone), dealt(*alone, "task.kind=text")
    for name, records in questions.silos.items():
        assert texts.silos[name] == tuple(map(as_text, records))
    assert texts.test == tuple(map(as_text, questions.test))
    assert all(q.answer == 0 and q.group == "general" for q in texts.public)
    path = tmp_path / "silo.jsonl"  # what `study deal` writes is what a silo reads
    silo = texts.silos["silo-1"]
    write_questions(path, silo, "patient", "text")
    assert read_questions(path, kind="text", owner="patient") == list(silo)


def test_the_default_deal_is_the_worlds_own():
    study = load_study(QUICKSTART)
    world = World(seed=study.seed, silos=4)
    found = deal(study, None).silos
    assert [list(q) for q in found.values()] == [world.records(i) for i in range(4)]


def test_skewed_hospitals():
    sizes = [len(q) for q in dealt("task.data.skew=4").silos.values()]
    assert sizes == sorted(sizes)
    assert 3.9 < sizes[-1] / sizes[0] < 4.1


def test_alpha_without_dirichlet_is_refused():
    with pytest.raises(ConfigError, match="Dirichlet"):
        load_study(QUICKSTART, ["task.data.alpha=0.1"])


def test_noisy_silos_have_the_same_questions_and_meaningless_answers():
    clean, noisy = dealt().silos, dealt(noisy=1).silos
    assert [clean[n] == noisy[n] for n in clean] == [True, True, True, False]
    before, after = clean["silo-4"], noisy["silo-4"]
    assert [(q.prompt, q.choices) for q in before] == [(q.prompt, q.choices) for q in after]
    right = sum(a.answer == b.answer for a, b in zip(before, after, strict=True)) / len(before)
    assert 0.15 < right < 0.35  # of four choices
    same = [Question(f"what {i}?", ("yes", "no"), 0) for i in range(400)]
    assert 160 < sum(q.answer == 0 for q in noisy_answers(same, 1)) < 240


def test_a_test_question_is_never_dealt_out(tmp_path):
    make_inputs(tmp_path)
    study = load_study(tmp_path / "tiny.yaml", ["task.data.public=8", "task.data.per_silo=8"])
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:80]))
    found = deal(study, tmp_path)
    trained = {q.prompt for part in (found.public, *found.silos.values()) for q in part}
    assert len(found.test) == 80
    assert not trained & {q.prompt for q in found.test}


def test_responses_change_hands_and_texts_have_none():
    said = [Question(f"say {i}", (f"word {i}",), 0) for i in range(20)]
    mixed = noisy_answers(said, 1)
    assert [q.prompt for q in mixed] == [q.prompt for q in said]
    assert {q.choices for q in mixed} == {q.choices for q in said}
    assert sum(a != b for a, b in zip(said, mixed, strict=True)) > 10
    with pytest.raises(ConfigError, match="no answers"):
        noisy_answers([Question("", ("text",), 0)], 1)


def test_only_what_is_asked_for_is_made(monkeypatch):
    study = load_study(Path("configs/vision.yaml"), ["task.data.per_silo=40"])
    whole, made, own = dict(deal(study, None).silos), [], Digits.records

    def records(self, silo, count, *, mixed=False):
        made.append(silo)
        return own(self, silo, count, mixed=mixed)

    monkeypatch.setattr(Digits, "records", records)
    found = deal(study, None).silos
    assert (*found,) == ("silo-1", "silo-2", "silo-3", "silo-4")
    assert found["silo-3"] == found["silo-3"] == whole["silo-3"]
    assert made == [2]
