"""``--silo NAME=FILE`` of ``simulate`` and ``experiment``: nothing is dealt out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.experiment.experiment import Experiment
from securefedcollm.federation.dealing import given_files
from securefedcollm.simulation.plan import ExperimentPlan
from securefedcollm.study import load_study
from tests.support.inputs import make_inputs

BARE = ["--set", "task.data={}"]


def invoke(*words: Any) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, SecureFedCoLLMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of four silos and a server, and the study that they were dealt out of."""
    directory = tmp_path_factory.mktemp("inputs")
    study = make_inputs(directory)
    invoke("study", "deal", study, "--data", directory, "--out", directory / "dealt")
    return directory


def simulate(inputs: Path, out: Path, *more: Any) -> dict[str, Any]:
    options = ["--data", inputs, "--out", out, "--no-baselines", "--json", *more]
    found: dict[str, Any] = json.loads(invoke("simulate", inputs / "tiny.yaml", *options).stdout)
    assert found["evidence"]["holds"]
    return found


def given(inputs: Path, names: list[str]) -> list[Any]:
    dealt = inputs / "dealt"
    files = [f"{name}={dealt / f'silo-{i}.jsonl'}" for i, name in enumerate(names, start=1)]
    silos = [word for file in files for word in ("--silo", file)]
    return [*silos, "--public", dealt / "public.jsonl", "--test", dealt / "test.jsonl"]


def test_files_that_were_dealt_out_make_the_same_run(inputs: Path, tmp_path: Path) -> None:
    plain = ["--workers", "0", "--set", "privacy=none"]
    whole = simulate(inputs, tmp_path / "whole", *plain)
    names = [silo["name"] for silo in whole["silos"]]
    parts = simulate(inputs, tmp_path / "parts", *plain, *BARE, *given(inputs, names))
    assert parts["table"] == whole["table"]
    assert [s["records"] for s in parts["silos"]] == [s["records"] for s in whole["silos"]]
    mine, theirs = (
        load_file(tmp_path / run / "adapters" / "slm" / "adapter_model.safetensors")
        for run in ("whole", "parts")
    )
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def experiment(inputs: Path, out: Path, *more: Any) -> dict[str, Any]:
    options = ["--data", inputs, "--out", out, "--seeds", "1", "--workers", "0", "--json"]
    changes = [word for key in EXPERIMENT for word in ("--set", key)]
    command = ["experiment", inputs / "tiny.yaml", *options, *changes, *more]
    found: dict[str, Any] = json.loads(invoke(*command).stdout)
    return found


EXPERIMENT = ("privacy=none", "rounds=1", "models.llm=none", "distillation={}")


def test_an_experiment_on_files_that_were_dealt_out_has_the_same_table(
    inputs: Path, tmp_path: Path
) -> None:
    names = [f"silo-{i}" for i in range(1, 5)]
    whole = experiment(inputs, tmp_path / "whole")
    parts = experiment(inputs, tmp_path / "parts", *BARE, *given(inputs, names))
    for key in ("groups", "rows", "differences", "questions"):
        assert parts[key] == whole[key]
    words = [*BARE, *given(inputs, [*names[1:], names[0]]), "--resume"]
    with pytest.raises(SecureFedCoLLMError, match="or to other files"):
        experiment(inputs, tmp_path / "parts", *words)
    with pytest.raises(SecureFedCoLLMError, match="files are tuned on as they are"):
        experiment(inputs, tmp_path / "new", *BARE, *given(inputs, names), "--noisy-silos", "1")


@pytest.mark.parametrize("answered", ["some", "none", "all"])
def test_the_rows_of_an_experiment_follow_from_the_public_file(
    inputs: Path, tmp_path: Path, answered: str
) -> None:
    words = given(inputs, [f"silo-{i}" for i in range(1, 5)])
    public = [json.loads(line) for line in Path(words[9]).read_text().splitlines()]
    right = next(row["answer"] for row in public if row["answer"] is not None)
    if answered != "some":
        answer = None if answered == "none" else right
        public = [row | {"answer": answer} for row in public]
    file = tmp_path / "public.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in public))
    study = load_study(inputs / "tiny.yaml", ["task.data={}"])
    silos = [(name, Path(path)) for name, _, path in (w.partition("=") for w in words[1:8:2])]
    files = given_files(study, silos, file, Path(words[11]))
    found = Experiment(study, ExperimentPlan(out=tmp_path / "x", data=inputs, files=files))
    both = {"auxiliary", "prompts"}
    expected = {"some": both, "none": set(), "all": {"auxiliary"}}[answered]
    assert both & {arm.key for arm in found._arms} == expected


@pytest.mark.soak
def test_one_model_needs_no_public_file(inputs: Path, tmp_path: Path) -> None:
    names = [f"silo-{i}" for i in range(1, 5)]
    words = given(inputs, names)
    at = words.index("--public")
    alone = ["--set", "models.llm=none", "--set", "distillation={}", *BARE]
    with pytest.raises(SecureFedCoLLMError, match="--public: this file is missing"):
        simulate(inputs, tmp_path / "both", *BARE, *words[:at], *words[at + 2 :])
    found = simulate(inputs, tmp_path / "one", *alone, *words[:at], *words[at + 2 :])
    assert {row["model"] for row in found["table"]} == {"slm"}


@pytest.mark.soak
def test_silos_have_names_of_their_own(inputs: Path, tmp_path: Path) -> None:
    names = ["north", "clinic-2", "a.b", "west"]
    more = ["--workers", "2", "--drop", "clinic-2@upload", *BARE, *given(inputs, names)]
    found = simulate(inputs, tmp_path / "run", *more)
    assert [silo["name"] for silo in found["silos"]] == sorted(names)
    assert all(0 < silo["epsilon_spent"] <= 8 for silo in found["silos"])
    command = ["model", "evaluate", "--run", tmp_path / "run", "--data", inputs, "--json"]
    test = inputs / "dealt" / "test.jsonl"
    scores = json.loads(invoke(*command, "--test", test).stdout)["all"]
    (row,) = [r for r in found["table"] if (r["model"], r["method"]) == ("llm", "FedCoLLM")]
    assert scores["accuracy"] == pytest.approx(row["accuracy"][""], abs=1e-6)
    with pytest.raises(SecureFedCoLLMError, match="--test: no records"):
        invoke(*command)


@pytest.mark.parametrize(
    ("names", "more", "says"),
    [
        (["a", "b", "c"], BARE, "--silo: 3 silos are named, the study has 4"),
        (["a", "a", "b", "c"], BARE, "--silo: a silo is named twice"),
        (["a", "b", "c", "server"], BARE, "--silo: 'server' is no name"),
        (["a", "b", "c", "D e"], BARE, "--silo: 'D e' is no name"),
        ([], BARE, "--silo: this file is missing"),
        (["a", "b", "c", "d"], ["--set", "task.data={builtin: hospitals}"], "--silo: the built-in"),
        (["a", "b", "c", "d"], [*BARE, "--silo", "e"], "--silo: 'e' is not NAME=FILE"),
        (["a", "b", "c", "d"], [*BARE, "--drop", "silo-1@upload"], "--drop: "),
    ],
)
def test_files_that_do_not_fit_are_refused_before_a_run_is_made(
    inputs: Path, tmp_path: Path, names: list[str], more: list[str], says: str
) -> None:
    with pytest.raises(SecureFedCoLLMError) as caught:
        simulate(inputs, tmp_path / "run", *given(inputs, names), *more)
    assert str(caught.value).startswith(says)
    assert caught.value.hint
    assert not (tmp_path / "run").exists()


def test_a_study_without_records_says_what_to_give(inputs: Path, tmp_path: Path) -> None:
    assert "the study is sound" in invoke("study", "check", inputs / "tiny.yaml", *BARE).stdout
    with pytest.raises(SecureFedCoLLMError, match=r"task.data: this study names no records") as c:
        simulate(inputs, tmp_path / "run", *BARE)
    assert "--silo NAME=FILE" in c.value.hint
    options = [*BARE, "--silo", "a=x.jsonl"]
    with pytest.raises(SecureFedCoLLMError, match="--public: this file is missing"):
        simulate(inputs, tmp_path / "run", *options)
