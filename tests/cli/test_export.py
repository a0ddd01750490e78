"""What lies beside an adapter is enough to use it without this program."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.federation.export import model_card, task_contract
from securefedcollm.study import load_study
from tests.support.inputs import COLOURS, invoke, make_inputs, tuned

SCRIPT = Path(__file__).parents[2] / "examples" / "plain_peft.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    for name in ("train", "test"):  # the same as a classification
        rows = [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]
        lines = [
            json.dumps({"text": row["question"], "label": row["choices"][row["answer"]]}) + "\n"
            for row in rows
        ]
        (directory / f"{name}-labels.jsonl").write_text("".join(lines))
    return directory


def plain_peft(*words):
    """What the example prints, in this process: torch takes seconds to import."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of transformers
        runpy.run_path(str(SCRIPT))["main"](*map(str, words))
    return json.loads(said.getvalue())


def test_the_example_needs_nothing_of_this_program():
    imports = [n for n in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(n, ast.ImportFrom)]
    assert {"peft", "transformers"} <= {node.module for node in imports}
    assert "securefedcollm" not in SCRIPT.read_text().partition('"""')[2].partition('"""')[2]


@pytest.mark.parametrize(
    "task",
    [
        {"score": "plain"},
        {"score": "pmi-length", "score_temperature": 0.5, "max_tokens": 6},  # prompts are cut
        {"kind": "classification", "labels": [*COLOURS, "light blue"], "score": "length"},
        {"columns": {"question": "asked"}, "template": "Answer: {} colour"},
    ],
)
@pytest.mark.parametrize("role", ["slm"])
def test_plain_peft_gives_the_same_accuracy_to_the_digit(inputs, tmp_path, task, role):
    test = tuned(inputs, tmp_path / "run", **task)
    run = ["--run", tmp_path / "run", "--data", inputs, "--role", role, "--json"]
    ours = invoke("model", "evaluate", *run)["all"]
    theirs = plain_peft(tmp_path / "run" / "adapters" / role, inputs / role, test)
    assert theirs == {"accuracy": ours["accuracy"], "count": ours["count"]}
    base = invoke("model", "evaluate", *run, "--base")["all"]
    assert base["accuracy"] != ours["accuracy"]  # else the adapter could be left out unseen


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("role", ["slm", "llm"])
def test_virtual_tokens_give_plain_peft_the_same_accuracy_to_the_digit(
    inputs, tmp_path, method, role
):
    adapter = {"method": method, "virtual_tokens": 3}
    test = tuned(inputs, tmp_path / "run", adapter, score="pmi-length")
    run = ["--run", tmp_path / "run", "--data", inputs, "--role", role]
    ours = invoke("model", "evaluate", *run, "--json")["all"]
    beside = tmp_path / "run" / "adapters" / role
    assert plain_peft(beside, inputs / role, test) == {
        "accuracy": ours["accuracy"],
        "count": ours["count"],
    }
    base = invoke("model", "evaluate", *run, "--base", "--json")["all"]
    assert base["gold_log_prob"] != ours["gold_log_prob"]
    card = (beside / "README.md").read_text()
    assert f"| adapter | {method}, 3 virtual tokens |" in card
    assert f"tags: [federated-learning, {method}-tuning]" in card
    words = ["model", "generate", "--prompt", "colour of thing1", *run, "--max-tokens", "3"]
    assert invoke(*words, "--json")["prompt"] == "colour of thing1"
    merge = ["model", "merge", *run, "--out", tmp_path / "merged"]
    with pytest.raises(ConfigError, match="virtual tokens stand before every input"):
        CliRunner().invoke(app, [str(word) for word in merge], catch_exceptions=False)
    assert not (tmp_path / "merged").exists()


LISTED = tuple(f"{letter}{dot}" for letter in "ABCD" for dot in (".", ""))
TURNS = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.mark.parametrize("chat", [None, TURNS], ids=["plain", "chat"])
def test_a_model_that_names_letters_is_asked_alike_by_plain_peft(tmp_path, chat):
    """Each model of the run is asked in its own form; the other one's accuracy is the control."""
    make_inputs(tmp_path, (*LISTED, "<user>", "<assistant>", "Answer", "with", "only."), chat)
    test = tuned(tmp_path, tmp_path / "run", models={"slm": {"ask": "letters", "temperature": 2.0}})
    run = ["--run", tmp_path / "run", "--data", tmp_path, "--role", "slm", "--json"]
    ours = invoke("model", "evaluate", *run)["all"]
    contract = json.loads((tmp_path / "run" / "adapters" / "slm" / "task.json").read_text())
    assert (contract["ask"], contract["score_temperature"]) == ("letters", 2.0)
    other = json.loads((tmp_path / "run" / "adapters" / "llm" / "task.json").read_text())
    assert (other["ask"], other["letters"], other["before_answer"]) == ("cloze", None, " ")
    theirs = plain_peft(tmp_path / "run" / "adapters" / "slm", tmp_path / "slm", test)
    assert theirs == {"accuracy": ours["accuracy"], "count": ours["count"]}
    cloze = invoke("model", "evaluate", *run, "--ask", "cloze")["all"]
    assert cloze["gold_log_prob"] != ours["gold_log_prob"]
    table = json.loads((tmp_path / "run" / "results.json").read_text())["table"]
    tuned_slm = [row for row in table if (row["model"], row["method"]) == ("slm", "FedCoLLM")]
    assert [[*row["accuracy"].values()] for row in tuned_slm] == [[ours["accuracy"]]]


def test_the_large_model_names_letters_where_the_small_ones_score_needs_a_prior(tmp_path):
    """Letters have no prior: distillation asks each model by its own score."""
    make_inputs(tmp_path, LISTED)
    tuned(tmp_path, tmp_path / "run", models={"llm": {"ask": "letters"}}, score="pmi-length")
    table = json.loads((tmp_path / "run" / "results.json").read_text())["table"]
    found = [row for row in table if (row["model"], row["method"]) == ("llm", "FedCoLLM")]
    run = ["--run", tmp_path / "run", "--data", tmp_path, "--role", "llm", "--json"]
    ours = invoke("model", "evaluate", *run)["all"]["accuracy"]
    assert [[*row["accuracy"].values()] for row in found] == [[ours]]


@pytest.mark.soak
def test_the_template_matters(inputs, tmp_path):
    """The control: with other prompts the same adapter has other accuracies."""
    test = tuned(inputs, tmp_path / "run")
    run = ["--run", tmp_path / "run", "--data", inputs, "--role", "slm", "--json"]
    ours = invoke("model", "evaluate", *run)["all"]["accuracy"]
    adapter = tmp_path / "run" / "adapters" / "slm"
    task = json.loads((adapter / "task.json").read_text())
    assert task["template"] == "Question: {}\nAnswer:"
    words = (adapter, inputs / "slm", test)
    command = [sys.executable, *map(str, (SCRIPT, *words))]  # as its user runs it, once
    program = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(program.stdout)["accuracy"] == ours
    theirs = []
    for template in ("{}", "Text: {}\nLabel:", "{} {} {}"):
        (adapter / "task.json").write_text(json.dumps(task | {"template": template}))
        theirs.append(plain_peft(*words)["accuracy"])
    # One or two of them may answer as many questions by chance.
    assert sum(accuracy != ours for accuracy in theirs) >= 1, (ours, theirs)


def test_the_card_says_what_the_adapter_is(inputs):
    study = load_study(inputs / "tiny.yaml", ["task.score=pmi"])
    contract = task_contract(study, study.models.slm, b"\xab" * 32, chat=False)
    card = model_card(study, contract)
    assert study.digest.hex() in card
    assert "ab" * 32 in card
    assert "(ε = 8, δ = 1e-05) differential privacy of one record, over all rounds" in card
    assert contract["prior_prompt"] == "Answer:"
    silo = load_study(
        inputs / "tiny.yaml",
        ["privacy.unit=silo", "privacy.noise=distributed", "silos.colluders=1"],
    )
    assert "of one silo, over all rounds, against everybody, of the silos at most 1" in model_card(
        silo, contract
    )
    none = load_study(inputs / "tiny.yaml", ["privacy=null"])
    assert "| privacy | none: the adapter may reveal records |" in model_card(none, contract)


def test_names_in_the_card_are_data(inputs):
    """Adversary: the study's author, whose label would open a table row, a link or a new line."""
    study = load_study(inputs / "tiny.yaml")
    contract = task_contract(study, study.models.slm, b"\xab" * 32, chat=False)
    evil = "a`|[x](http://evil)\n# owned\x1b[2J"
    card = model_card(study, contract | {"labels": [evil, "fine"]})
    assert "\n# owned" not in card
    assert "\x1b" not in card
    (row,) = (line for line in card.splitlines() if line.startswith("| task |"))
    assert row.count("`") == 4
    assert row.count("|") == 3
