"""``index build``, ``index reduce`` and ``ask``, and their doors in Python."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from securefedcollm_cli.main import app
from typer.testing import CliRunner

import securefedcollm as sfc
from securefedcollm.api import questions as asking
from securefedcollm.errors import DataError
from securefedcollm.study import dump_study
from tests.support.asking import SHELF, TEXTS
from tests.support.inputs import invoke
from tests.support.small import small_study

HOSTILE = "w15 w16 \x1b[31mw17 [red]w18[/red] \u202ew19"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a study, its model and every silo's documents."""
    directory = tmp_path_factory.mktemp("place")
    study = small_study(directory, retrieval=SHELF)
    (directory / "study.yaml").write_text(dump_study(study))
    for name, texts in TEXTS.items():
        (directory / f"{name}.md").write_text("\n\n".join(texts))
    (directory / "silo-3.md").write_text(HOSTILE)
    return directory


def common(place: Path) -> list[str]:
    return ["--study", str(place / "study.yaml"), "--data", str(place), "--json"]


def test_build_ask_and_verify(place, tmp_path):
    made = {}
    for name in TEXTS:
        index = tmp_path / f"{name}.index"
        made[name] = invoke("index", "build", place / f"{name}.md", "--out", index, *common(place))
    assert made["silo-1"]["passages"] == len(TEXTS["silo-1"])
    assert made["silo-1"]["bytes"] == (tmp_path / "silo-1.index").stat().st_size
    assert re.fullmatch("[0-9a-f]{64}", made["silo-1"]["fingerprint"])
    assert (
        made["silo-1"]["encoder"]
        == invoke("model", "digest", place / "slm", "--encoder", "--json")["sha256"]
    )
    shelves = [word for name in TEXTS for word in ("--shelf", f"{name}={made[name]['index']}")]
    run = ["--out", str(tmp_path / "run")]
    said = invoke("ask", TEXTS["silo-2"][1], *shelves, *run, *common(place))
    best = said["passages"][0]
    assert (best["silo"], best["id"], best["text"]) == ("silo-2", "silo-2.md:3", "w12 w13 w14")
    assert said["answered"] == list(TEXTS)
    assert said["spent"] == dict.fromkeys(TEXTS, 1)
    assert said["bytes_sent"] > said["bytes_received"] > 0
    words = [w for w in common(place) if w != "--json"]
    shown = CliRunner().invoke(app, ["ask", HOSTILE, *shelves, *run, *words])
    assert shown.exit_code == 0, shown.output
    assert "\x1b[31m" not in shown.stdout  # another party's words are data
    assert "\u202e" not in shown.stdout
    assert r"silo-3: silo-3.md:1" in shown.stdout
    assert r"\x1b[31mw17 [red]w18[/red] \u202ew19" in shown.stdout
    assert "3 of 3 silos answered" in shown.stdout
    assert "2 of 3 questions are spent" in shown.stdout
    invoke("ask", "w1", *shelves, *run, *common(place))
    spent = CliRunner().invoke(app, ["ask", "w1", *shelves, *run, *words])
    assert spent.exit_code == 1
    assert "nothing from silo-1: server has asked all of its 3 questions" in spent.stdout
    with_answer = ["--as", "silo-1", "--generate", "slm", "--max-tokens", "3"]
    said = invoke("ask", "w9 w10 w11", *shelves[2:], *run, *with_answer, *common(place))
    assert said["answer"]["given"] == [1]  # the other is less alike than an empty place
    assert said["spent"] == {"silo-2": 1, "silo-3": 1}
    bundle = CliRunner().invoke(
        app, ["audit", "bundle", run[1], "--out", str(tmp_path / "evidence.zip")]
    )
    assert bundle.exit_code == 0, bundle.output
    verdict = sfc.verify(tmp_path / "evidence.zip")
    assert verdict.holds
    (answers,) = (row for row in verdict.results if row.name == "answers")
    assert answers.evidence == "11 answers the same at both ends"


def asked(monkeypatch, words, **how):
    """(what the command was about to ask, its result)."""
    seen: list[str] = []

    def stop(question: str, *_: object, **__: object) -> None:
        seen.append(question)
        raise sfc.ConfigError("seen", where="here", hint="none")

    monkeypatch.setattr(asking, "ask", stop)
    line = ["ask", *words, "--study", "retrieval", "--shelf", "silo-1=x"]
    return seen, CliRunner().invoke(app, line, **how)


@pytest.mark.parametrize(
    ("content", "question"),
    [
        (b"w1 w2\n", "w1 w2"),
        (b"w1 w2\r\n", "w1 w2"),
        (b"w1\n\nw2", "w1\n\nw2"),
        ("Übel\n\n".encode(), "Übel\n"),
    ],
)
def test_a_question_need_not_be_an_argument(monkeypatch, content, question):
    """Every local user may read the arguments of a process."""
    seen, _ = asked(monkeypatch, ["-"], input=content)
    assert seen == [question]


@pytest.mark.parametrize("words", [[], ["-"]])
def test_a_terminal_is_asked_for_the_question(monkeypatch, words):
    def terminal(what: str, *, err: bool) -> str:
        assert (what, err) == ("question", True)  # the answer goes to standard output
        return "w1 w2"

    monkeypatch.setattr("securefedcollm_cli.questions.sys", SimpleNamespace(stdin=Terminal()))
    monkeypatch.setattr("typer.prompt", terminal)
    assert asked(monkeypatch, words)[0] == ["w1 w2"]


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "content", "what"),
    [
        ([], b"w1", "QUESTION: no question"),
        (["-"], b"\xff enters ward", "QUESTION: is not UTF-8 text"),
        (["-"], b"w1 " * 2**19, "QUESTION: is too long"),
    ],
)
def test_what_is_no_question_is_refused(monkeypatch, words, content, what):
    seen, result = asked(monkeypatch, words, input=content)
    assert not seen
    assert isinstance(result.exception, sfc.ConfigError)
    assert what in str(result.exception)


def test_the_risk_of_the_argument_is_told():
    said = " ".join(CliRunner().invoke(app, ["ask", "--help"]).output.replace("│", " ").split())
    assert "can be read by every user of this machine" in said


NOT_UTF_8 = "\udcff enters ward"
"""What Python makes of the argument $'\\xff enters ward'."""


def test_a_question_that_is_not_unicode_is_refused(place, tmp_path):
    line = ["ask", NOT_UTF_8, "--shelf", "silo-1=x", "--out", str(tmp_path / "run"), *common(place)]
    result = CliRunner().invoke(app, line)
    assert isinstance(result.exception, sfc.ConfigError)
    assert "QUESTION: is not valid Unicode" in str(result.exception)


def test_paths_that_are_none_are_refused(place, tmp_path):
    file = place / "study.yaml"
    study = sfc.load_study(file)
    with pytest.raises(DataError, match=r"a\\x00b.md: cannot be read as text"):
        sfc.build_index(study, ["a\0b.md"], tmp_path / "x", data=place)
    with pytest.raises(DataError, match=r"a\\x00b.jsonl: cannot be opened"):
        sfc.build_index(study, ["a\0b.jsonl"], tmp_path / "x", data=place)
    with pytest.raises(sfc.ConfigError, match="no path has"):
        sfc.build_index(study, [place / "silo-1.md"], "a\0b", data=place)
    with pytest.raises(sfc.ConfigError, match=r"a\\x00b: holds a character that no path has"):
        sfc.ask("w1", study, shelves={"silo-1": "a\0b"}, out=tmp_path / "run", data=place)
    named = {"source": "path:~nosuchuser/r.map", "sha256": "0" * 64}
    for key, value, where in (
        ("retrieval.reduction", named, "retrieval.reduction.source"),
        ("retrieval.encoder", {"source": "path:~nosuchuser"}, "path:~nosuchuser"),
    ):
        other = sfc.load_study(file, {key: value})
        with pytest.raises(sfc.ConfigError, match=f"{where}: begins with `~` and a user without"):
            sfc.build_index(other, [place / "silo-1.md"], tmp_path / "x", data=place)
    assert not (tmp_path / "x").exists()


def test_only_an_older_file_of_its_kind_is_overwritten(place, tmp_path):
    study = sfc.load_study(place / "study.yaml")
    guide, index, link = tmp_path / "g.md", tmp_path / "g.index", tmp_path / "link"
    guide.write_text("w1 w2\n\nw3")
    link.hardlink_to(guide)
    text = tmp_path / "public.txt"
    text.write_text("\n".join(f"w{i} w{i + 1}" for i in range(40)))
    for _ in range(2):
        sfc.build_index(study, [guide], index, data=place)
        sfc.make_reduction(study, tmp_path / "map", text=[text], data=place)
    (tmp_path / "empty").touch()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for out, what in (
        (guide, "is read by this command"),
        (link, "is read by this command"),
        (text, "is there already"),
        (tmp_path / "map", "is there already"),
        (tmp_path / "empty", "is there already"),
        (tmp_path, "is there already"),
    ):
        with pytest.raises(sfc.ConfigError, match=what):
            sfc.build_index(study, [guide], out, data=place)
    for out, what in (
        (text, "is read by this command"),
        (guide, "is there already"),
        (index, "is there already"),
    ):
        with pytest.raises(sfc.ConfigError, match=what):
            sfc.make_reduction(study, out, text=[text], data=place)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_doors_of_python(place, tmp_path):
    study = sfc.load_study(place / "study.yaml")
    text = tmp_path / "public.txt"
    text.write_text("\n".join(f"w{i} w{i + 1}" for i in range(40)))
    digest = sfc.make_reduction(study, tmp_path / "map", text=[text], data=place)
    made = invoke(*("index", "reduce", "--text", text, "--out", tmp_path / "again"), *common(place))
    assert made["sha256"] == digest
    assert (tmp_path / "map").read_bytes() == (tmp_path / "again").read_bytes()
    pinned = {"source": f"path:{tmp_path / 'map'}", "sha256": digest}
    study = sfc.load_study(place / "study.yaml", {"retrieval.reduction": pinned})
    shelf = sfc.build_index(study, [place / "silo-1.md"], tmp_path / "one.index", data=place)
    assert (shelf.passages, shelf.path) == (2, tmp_path / "one.index")
    answer = sfc.ask(
        "w5 w6 w7 w8",
        study,
        shelves={"silo-1": shelf.path},
        asker="silo-2",
        out=tmp_path / "run",
        data=place,
    )
    assert answer.passages[0].text == "w5 w6 w7 w8"
    assert (answer.spent, answer.limit) == ({"silo-1": 1}, 3)
    assert sfc.verify(answer.bundle()).holds
    other = sfc.load_study(place / "study.yaml")
    with pytest.raises(sfc.ConfigError, match="another encoder or reduction"):
        sfc.ask("w5", other, shelves={"silo-1": shelf.path}, out=tmp_path / "x", data=place)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--shelf", "silo-1"], "is not NAME=INDEX"),
        (["--shelf", "silo-1=a", "--shelf", "silo-1=b"], "is not NAME=INDEX"),
        (["--shelf", "silo-1=absent"], "cannot read"),
    ],
)
def test_a_bad_option_is_named(place, tmp_path, words, what):
    out = ["--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["ask", "w1", *words, *out, *common(place)])
    assert result.exit_code != 0
    assert re.search(what, str(result.exception))


def test_what_does_not_fit_the_shelf_is_refused(place, tmp_path):
    tree = yaml.safe_load((place / "study.yaml").read_text())
    tree["retrieval"]["documents"] = 1
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    words = ["index", "build", place / "silo-1.md", "--out", tmp_path / "x"]
    words += ["--study", tmp_path / "small.yaml", "--data", place]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert "2 passages, and a shelf holds 1" in str(result.exception)
    assert not (tmp_path / "x").exists()
    words[2] = "builtin:silo-1"
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert "no hospital 'silo-1' in an embedded world" in str(result.exception)


@pytest.mark.soak
def test_the_first_example_of_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """Makes the built-in encoder if it is not there: about a minute."""
    page = Path(__file__).parents[2] / "docs" / "retrieval.md"
    _, example, _ = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.startswith("silo-3 rule muscular protocol")


@pytest.mark.soak
def test_the_house_rules_of_the_embedded_world_are_found(tmp_path):
    """With the encoder that the study names, made here if it is not there: about a minute."""
    from securefedcollm.federation.questions.shelves import build_index, passages_of
    from securefedcollm.federation.questions.space import plan_of, space_of
    from securefedcollm.tuning.world import World

    study = sfc.load_study("retrieval")
    space = space_of(study)
    world, rules = World(seed=study.seed, silos=4), []
    vectors = []
    for name in ("silo-1", "silo-2", "silo-3", "silo-4"):
        passages = passages_of(study, [f"builtin:{name}"])
        vectors += list(build_index(space, passages, plan_of(study).block_bytes).entries)
        rules += [passage.text.split() for passage in passages]
    asked = [question for question in world.tests() if question.group == "private"][:400]
    scores = space.embed([q.prompt for q in asked]) @ np.array(vectors).T
    found = {1: 0, 3: 0}
    for question, row in zip(asked, scores, strict=True):
        words = question.prompt.split()
        condition, severity, topic = words[6], words[5], words[-2:]
        right = [
            condition in rule and rule[-4:-2] == topic and (topic[1] != "ward" or severity in rule)
            for rule in rules
        ]
        assert sum(right) == 1
        best = (-row).argsort()
        for count in found:
            found[count] += any(right[at] for at in best[:count])
    assert found[1] >= 0.9 * len(asked)
    assert found[3] >= 0.99 * len(asked)


def test_questions_to_a_finished_run_go_on_with_its_evidence(place, tmp_path):
    changes = {"rounds": 1, "local.steps": 1, "privacy": None, "distillation.steps": 1}
    study = sfc.load_study(place / "study.yaml", changes)
    run = sfc.simulate(study, out=tmp_path / "run", data=place, workers=0)
    assert run.directory == tmp_path / "run"
    shelf = sfc.build_index(study, [place / "silo-2.md"], tmp_path / "two.index", data=place)
    for asker in ("server", "silo-1"):
        sfc.ask(
            "w9", study, shelves={"silo-2": shelf.path}, asker=asker, out=run.directory, data=place
        )
    verdict = sfc.verify(run.bundle())
    assert verdict.holds, verdict.failed
    found = {row.name: row.status for row in verdict.results}
    assert {found[name] for name in ("step-order", "heads", "witnesses", "one-history")} == {"pass"}
    assert {found[name] for name in ("questions", "answers", "transcripts")} == {"pass"}
    assert verdict.rounds_done == 1
