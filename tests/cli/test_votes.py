"""``ask`` where records vote, ``budget plan --questions``, and the door in Python."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

import securefedcollm as sfc
from securefedcollm.study import dump_study
from tests.support.inputs import invoke
from tests.support.polling import CHOICES, QUESTION, RECORDS, Voters

ASKED = json.dumps({"question": QUESTION, "choices": list(CHOICES)})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a study, its model, and the records of every silo."""
    directory = tmp_path_factory.mktemp("place")
    voters = Voters(directory)
    (directory / "study.yaml").write_text(dump_study(voters.study))
    for name, own in RECORDS.items():
        rows = [{"question": q.prompt, "choices": q.choices, "answer": q.answer} for q in own]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def common(place: Path) -> list[str]:
    files = [word for n in RECORDS for word in ("--records", f"{n}={place / n}.jsonl")]
    return ["--study", str(place / "study.yaml"), "--data", str(place), *files]


def test_ask_and_verify(place, tmp_path):
    run = ["--out", str(tmp_path / "run")]
    made = CliRunner().invoke(app, ["ask", "-", *common(place), *run, "--json"], input=ASKED)
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    assert said["choice"] == "w50"
    assert list(said["votes"]) == list(CHOICES)
    assert said["counted"] == list(RECORDS)
    assert (said["questions"], said["epsilon"]) == (3, 40.0)
    assert said["bytes_sent"] > said["bytes_received"] > 0
    choices = [word for choice in CHOICES for word in ("--choice", choice)]
    shown = CliRunner().invoke(app, ["ask", QUESTION, *choices, *common(place), *run])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[0].split()[1] == "w50"
    assert "4 of 4 silos voted" in shown.stdout
    assert "a record can answer 3 questions within ε = 40" in shown.stdout
    bundle = CliRunner().invoke(app, ["audit", "bundle", run[1], "--out", str(tmp_path / "e.zip")])
    assert bundle.exit_code == 0, bundle.output
    assert sfc.verify(tmp_path / "e.zip").holds


def test_from_python(place, tmp_path):
    records = {name: place / f"{name}.jsonl" for name in RECORDS}
    vote = sfc.ask_records(
        *(QUESTION, CHOICES, place / "study.yaml"),
        records=records,
        out=tmp_path / "run",
        data=place,
    )
    assert vote.choice == "w50"
    assert vote.doubt < 0.01
    mixed = vote.mixed({"w50": 0.1, "w51": 0.1, "w52": 0.8}, 0.0)
    assert mixed["w52"] == pytest.approx(0.8)
    assert max(vote.mixed({"w50": 0.1, "w51": 0.1, "w52": 0.8}, 0.9), key=str) in CHOICES
    assert sfc.verify(vote.bundle()).holds


@pytest.mark.parametrize(
    ("words", "content", "what"),
    [
        (["-"], b"w1 w2", "--choice: nothing to choose from"),
        (["-"], b'{"question": "w1"}', "QUESTION: is no question with choices"),
        (["-"], b'{"question": "w1", "choices": [1, 2]}', "QUESTION: is no question with choices"),
        (["-", "--choice", "w2"], ASKED.encode(), "QUESTION: has choices of its own"),
        (["-", "--choice", "w2"], b"w1 w2", "choices: 1 choices"),
        (["-", "--shelf", "silo-1=x"], b"w1", "--shelf: records are asked"),
        (["-", "--generate", "slm"], b"w1", "--generate: records are asked"),
        (["-", "--records", "silo-1"], ASKED.encode(), "--records: 'silo-1' is not NAME=FILE"),
        (["-", "--as", "mallory"], ASKED.encode(), "--as: 'mallory' takes no part"),
    ],
)
def test_what_cannot_be_asked_is_refused(place, tmp_path, words, content, what):
    line = ["ask", *words, *common(place), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, line, input=content)
    assert isinstance(result.exception, sfc.ConfigError)
    assert what in str(result.exception)


def test_documents_are_asked_without_choices():
    line = ["ask", "-", "--study", "retrieval", "--shelf", "silo-1=x", "--choice", "a"]
    result = CliRunner().invoke(app, line, input=b"w1")
    assert "--choice: this study asks documents" in str(result.exception)


def test_a_terminal_is_asked_for_the_choices(monkeypatch):
    from securefedcollm_cli.votes import _parsed

    said = iter(["w50", "w51", ""])
    monkeypatch.setattr(
        "securefedcollm_cli.votes.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    )
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(said))
    assert _parsed("w1", None) == ("w1", ["w50", "w51"])


def test_the_plan_of_a_study_that_asks_records():
    plans = invoke("budget", "plan", "answers", "--questions", 100, "--questions", 1000, "--json")
    few, many = plans
    assert (few["questions"], few["epsilon"], few["vote"]) == (100, 8.0, 1.0)
    # n Gaussians are one of z/√n. Each is charged with a little less noise than it has (rounding).
    assert many["noise_multiplier"] / few["noise_multiplier"] == pytest.approx(10**0.5, rel=0.04)
    assert few["lead_95"] < few["lead_99"]
    assert few["reversed"]["1"] > few["reversed"]["100"]
    shown = CliRunner().invoke(
        app, ["budget", "plan", "answers", "--questions", "9", "--set", "retrieval.reader=model"]
    )
    assert "a lead is 4 at most" in " ".join(shown.output.split())
    other = CliRunner().invoke(app, ["budget", "plan", "quickstart", "--questions", "9"])
    assert "retrieval.mode: this study asks no records" in str(other.exception)


def test_whoever_signs_a_study_reads_what_questions_cost():
    said = CliRunner().invoke(app, ["study", "check", "answers"]).output
    assert "records answer" in said
    assert "100 of them cost a record ε = 8 at δ = 1e-05" in " ".join(said.split())
    silent = CliRunner().invoke(app, ["study", "check", "retrieval"]).output
    assert "records answer" not in silent


def test_records_go_on_no_shelf(tmp_path):
    line = ["index", "build", "builtin:silo-1", "--study", "answers", "--out", str(tmp_path / "x")]
    result = CliRunner().invoke(app, line)
    assert "retrieval.mode: this study asks records" in str(result.exception)
    with pytest.raises(sfc.ConfigError, match="this study asks records"):
        sfc.ask("w1", "answers", shelves={"silo-1": tmp_path / "x"}, out=tmp_path / "run")


@pytest.mark.soak
def test_the_example_of_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """Makes the built-in encoder if it is not there: about a minute."""
    page = Path(__file__).parents[2] / "docs" / "retrieval.md"
    example, *_ = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "crimson" in capsys.readouterr().out
