"""``data check``: every kind of finding by its line, and no value anywhere."""

from __future__ import annotations

import json

import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from tests.support.inputs import make_inputs

CHOICES = ["red", "blue"]
ROWS = [
    {"question": "colour of thing1", "choices": CHOICES, "answer": 0},
    {"question": "colour  of thing1", "choices": CHOICES[::-1], "answer": 1},  # the same record
    {"question": "colour of thing1", "choices": CHOICES, "answer": 1},  # against both
    {"question": "", "choices": CHOICES, "answer": 0},
    {"question": "colour of thing2", "choices": CHOICES, "answer": 7},
    {"question": "colour of thing3", "choices": CHOICES},
    {"question": "of " * 300 + "thing4", "choices": CHOICES, "answer": 0},
    {"question": "of thing5", "choices": ["red " * 300, "blue"], "answer": 0},
    {"question": "of thing6", "choices": CHOICES, "answer": 1},
]


def check(path, *more):
    return CliRunner().invoke(app, ["data", "check", str(path), *more])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    (directory / "mine.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n"
    )
    return directory


def test_every_finding_has_its_line(inputs):
    path = inputs / "mine.jsonl"
    study = ["--study", str(inputs / "tiny.yaml"), "--data", str(inputs)]
    result = check(path, *study, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    line = [f"{path}:{n}" for n in range(11)]
    assert (found["rows"], found["usable"]) == (10, 7)
    assert [place for place, _ in found["unusable"]] == [line[4], line[5], line[10]]
    assert "empty" in found["unusable"][0][1]
    assert found["unlabelled"] == [line[6]]
    assert found["duplicates"] == [[line[1], line[2]]]
    assert found["conflicts"] == [[line[1], line[2], line[3]]]
    assert (found["shortened"], found["unfit"]) == ([line[7]], [line[8]])
    assert found["stops_a_run"]
    shown = check(path, *study)
    assert "1 × duplicates" in shown.stdout
    assert not any(word in shown.stdout for word in ("thing1", "blue"))


def test_a_clean_file_passes_without_a_study(inputs, tmp_path):
    result = check(inputs / "test.jsonl")
    assert result.exit_code == 0
    assert result.stdout.endswith("nothing found\n")
    path = tmp_path / "two.csv"
    row = 'colour?,"[""red"", ""blue""]",{}\n'
    path.write_text("question,choices,answer\n" + row.format(0) + row.format(1))
    result = check(path)
    assert result.exit_code == 0  # a conflict does not stop a run
    assert f"{path}:2 ≠ {path}:3" in result.stdout


def test_options_say_what_the_rows_are(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("note;ward;case\na;calm;7\nb;urgent;8\nc;other;9\nd;calm;\n")
    options = ["--task", "classification", "--label", "calm", "--label", "urgent"]
    options += ["--column", "text=note", "--column", "label=ward", "--subject", "case"]
    result = check(path, *options)
    assert result.exit_code == 1
    assert f"{path}:4: field 'ward' is none of the study's task.labels\n" in result.stdout
    assert f"{path}:5: field 'case' is missing\n" in result.stdout
    assert "4 rows, 2 usable" in result.stdout
    assert "→ give one of calm, urgent, or an index from 0 to 1\n" in result.stdout
    path.write_text("note;ward;case\na;calm;7\nb;urgent;8\n")
    assert check(path, *options).stdout.endswith("nothing found\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "classification"], "--label: a classification needs labels"),
        (["--label", "a"], "--label: a classification needs labels"),
        (["--column", "text"], "--column: 'text' is not FIELD=NAME"),
        (["--column", "text=note"], "task.columns.text: kind: multiple_choice reads no such"),
        (["--study", "configs/quickstart.yaml", "--task", "text"], "--study: the study says what"),
        (["--set", "rounds=2"], "--set: there is no study to change"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, options, says):
    result = check(tmp_path / "mine.csv", *options)
    assert str(result.exception).startswith(says)
    assert result.exception.hint


def test_classification_labels_and_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"text": ["a", "a", "b"], "label": ["x", "y", "z"]}), path)
    study = ["--study", "configs/quickstart.yaml", "--json"]
    for change in (
        "task.kind=classification",
        "task.labels=[x, y]",
        "task.data={train: a.csv, test: b.csv, public: 1, per_silo: 1}",
    ):
        study += ["--set", change]
    found = json.loads(check(path, *study).stdout)
    assert [place for place, _ in found["unusable"]] == [f"{path}, row 3"]
    assert found["conflicts"] == [[f"{path}, row 1", f"{path}, row 2"]]
