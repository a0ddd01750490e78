"""Benchmarks still play what they measure. No figure of theirs is asserted."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    answers,
    correlated,
    engine,
    english,
    forgetting,
    joint,
    questions,
    retrieval,
    student,
    vectors,
)
from securefedcollm.retrieval import Terms
from securefedcollm.study import load_study
from tests.support.inputs import make_inputs


def test_steps_of_joint_training_with_nothing_to_train() -> None:
    study = load_study("quickstart-joint", {"rounds": 1, "local.steps": 2})
    assert set(joint.overhead(study, 20)) == {"silo_ms", "silo_wall_ms", "protocol_ms"}


def test_rounds_in_processes_with_nothing_to_train(tmp_path: Path) -> None:
    found = engine.embedded(1000, tmp_path)
    assert found["bytes_up_per_silo"] > 1000


def test_what_is_forgotten_is_what_a_task_had_less_what_is_left() -> None:
    scores = [
        {"slm": {"general": 0.9, "private 1": a, "private 2": b, "private 3": c}}
        for a, b, c in ((0.2, 0.2, 0.2), (0.7, 0.2, 0.3), (0.5, 0.8, 0.3), (0.4, 0.6, 0.9))
    ]
    matrix, found = forgetting.figures(scores, "slm")
    assert matrix.shape == (4, 3)
    assert found == pytest.approx(
        {"at the end": 1.9 / 3, "general": 0.9, "learnt": 0.8, "forgotten": 0.25}
    )
    runs = {"naive": [scores, scores], forgetting.AT_ONCE: [scores[-1:], scores[-1:]]}
    lines = forgetting.show(runs, "slm").splitlines()
    assert "| naive | 80.0 (80.0 to 80.0) | 63.3 (63.3 to 63.3) | 25.0 (25.0 to 25.0) |" in lines[2]
    assert lines[-1] == "| all at once, at the end | 40.0 | 60.0 | 90.0 |"


def test_a_round_of_a_long_vector_in_processes_of_its_own(tmp_path: Path) -> None:
    found = vectors.measure(100_000, 3, tmp_path)
    assert found["upload_mb"] > 0.26
    assert found["silo_peak_mb"] > 0.4  # the vector itself, at the least


def test_questions_to_a_small_shelf() -> None:
    terms = Terms(documents=50, dimension=16, block_bytes=96, fetched=2)
    found = retrieval.measure(terms, questions=3, repeats=1)
    assert found["recall"] == 1.0


def test_the_table_of_answers_has_the_mean_and_its_interval() -> None:
    results = [{"rows": {"slm": {"general": a, "private": 0.25}}} for a in (0.5, 0.6, 0.7)]
    found = answers.summary(results)
    # Student's t for three seeds, 4.303, times 0.1/√3.
    assert found["slm"]["general"] == pytest.approx([0.6, 0.2484], abs=1e-3)
    assert "| slm | 60.0 ± 24.8 | 25.0 ± 0.0 |" in answers.markdown(found)


NOTE = """Return the number of things.

The list is of %s and that is in the order.

Parameters
----------
things : list
    This is a parameter of the function, and it is not a paragraph of prose.

>>> This is the code of an example that is not to be in the text of a paragraph.
"""


def packages(directory: Path) -> list[english.Document]:
    """Documents of made-up packages: 40 modules each, paragraphs that repeat or nearly do."""
    draw = random.Random(4)
    words = [f"{a}{b}" for a in ("bo", "ka", "lu", "mi") for b in ("dan", "fer", "gol", "nis")]
    found: list[english.Document] = []
    for name in (*english.SILOS, "numpy"):
        for number in range(40):
            path = directory / name / f"part{number % 7}" / f"module{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            said = [" ".join(draw.choices(words, k=draw.choice((2, 8)))) for _ in range(2)]
            said.append(" ".join([*words[:8], *draw.choices(words, k=2)]))  # nearly the same
            body = (f"def f{i}():\n    {NOTE % text!r}\n" for i, text in enumerate(said))
            path.write_text("\n".join(body))
        found += english.documents(name, directory / name)
    return found


def test_no_paragraph_that_is_tested_on_is_trained_on(tmp_path: Path) -> None:
    found = packages(tmp_path / "packages")
    assert len(found) == 5 * 40 * 3
    made = english.corpus(found, english.TEST_PARTS, ())
    digest = english.write(made, tmp_path / "one")
    again = english.corpus(packages(tmp_path / "elsewhere"), english.TEST_PARTS, ())
    assert english.write(again, tmp_path / "two") == digest
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "one").glob("*.jsonl")
    }
    assert set(rows) == {*english.SILOS, "public", "test"}
    test = {row["text"] for row in rows.pop("test")}
    assert {d.source for d in made.test["private"]} == {*english.SILOS}
    assert {d.source for d in made.test["public"]} == {"numpy"}
    trained = [row["text"] for part in rows.values() for row in part]
    assert len(test) > 20
    assert len(trained) == len({*trained})  # of no two silos either
    runs = [english._runs(text) for text in trained]
    for text in test:
        assert not any(english._runs(text) & seen for seen in runs)
    modules = {(d.source, d.module) for part in made.test.values() for d in part}
    assert not modules & {(d.source, d.module) for part in made.silos.values() for d in part}


def test_settings_are_chosen_on_documents_that_the_table_neither_tests_nor_loses() -> None:
    assert not {*english.DEV_PARTS} & {*english.TEST_PARTS}


def test_prose_is_sentences_without_markup() -> None:
    text = "The :class:`~a.B` is *not* in the ``list`` of what a `module` can find in that place."
    plain = "The a.B is *not* in the list of what a module can find in that place."
    assert english.prose(f"{text}\n\n    {text}\n\n- {text}\n\nThe end.") == [plain]
    assert english.prose(NOTE % "two things") == [(NOTE % "two things").split("\n\n")[1]]


def test_a_question_set_is_dealt_into_files_that_share_no_question(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    words = [tmp_path / "train.jsonl", tmp_path / "test.jsonl", tmp_path / "files"]
    sizes = ["--public", "8", "--labelled", "2", "--per-silo", "4", "--silos", "2"]
    questions.main([*map(str, words), *sizes, "--development", "6", "--max-test", "5"])
    dealt = {path.stem: questions.read(path) for path in (tmp_path / "files").iterdir()}
    assert {name: len(rows) for name, rows in dealt.items()} == {
        "public": 8,
        "public-answered": 8,
        "development": 6,
        "test": 5,
        "silo-1": 4,
        "silo-2": 4,
    }
    assert ["answer" in row for row in dealt["public"]] == [True] * 2 + [False] * 6
    del dealt["public-answered"]
    asked = [row["question"] for rows in dealt.values() for row in rows]
    assert len(set(asked)) == len(asked)


def test_the_student_learns_from_answers_and_from_the_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_inputs(tmp_path)
    for name, file in (("public-answered", "train"), ("development", "test")):
        (tmp_path / f"{name}.jsonl").write_bytes((tmp_path / f"{file}.jsonl").read_bytes())
    words = [study, tmp_path, "--data", tmp_path, "--epochs", "1", "--learning-rate", "1e-2"]
    rows = ["--rows", "gold", "soft", "hard", "pooled"]
    student.main([*map(str, words), "--set", "privacy=none", *rows])
    found = json.loads(capsys.readouterr().out)
    learnt = found["rows"]
    assert set(learnt) == {"start", "gold", "soft", "hard", "pooled"}
    assert learnt["gold"][0]["gold_log_prob"] > learnt["start"]["gold_log_prob"]
    assert set(found["teacher"]) == {"public-answered", "start", "pooled"}
    assert all(0.0 <= said["accuracy"] <= 1.0 for said in found["teacher"].values())


def test_correlated_noise_of_one_band_is_independent_and_more_bands_have_less_error() -> None:
    wanted = correlated.workload(12, 0.9)
    assert wanted[2].tolist() == pytest.approx([1 + 0.9 + 0.81, 1.9, 1.0, *[0.0] * 9])
    alone = correlated.error(np.ones(1), wanted)
    assert alone == pytest.approx(np.linalg.norm(wanted) / np.sqrt(12))
    bands = correlated.best_bands(3, wanted)
    assert np.linalg.norm(bands) == pytest.approx(1.0)
    assert correlated.error(bands, wanted) < correlated.error(np.ones(3), wanted)
    assert correlated.error(bands, wanted) < 0.8 * alone
    once = correlated.multiplier(8.0, 1e-5, 0.05, 12, 1)
    assert correlated.multiplier(8.0, 1e-5, 0.05, 12, 3) > once  # fewer steps, sampled more often
    assert correlated.multiplier(math.inf, 1e-5, 0.05, 12, 1) == 0.0
