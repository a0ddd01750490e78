"""Training code of somebody's own in a masked, accounted, evidence-logged run."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from securefedcollm_cli.main import app
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from typer.testing import CliRunner

import securefedcollm as sfc
from securefedcollm.errors import SecureFedCoLLMError, StateError, TrainingError
from securefedcollm.hf import SiloTrainer
from securefedcollm.simulation.own import Tensors

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
LOOP, TRAINER = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
START = {"w": np.zeros(3, np.float32), "b": np.zeros((), np.float32)}
NAMES = ("north", "south", "west")
STEP = {"steps": 1, "learning_rate": 0.1}
SILO_UNIT = {"unit": "silo", "noise": "distributed", "epsilon": 8, "delta": 1e-5, "clip_norm": 1.0}


def study(**more: Any) -> dict[str, Any]:
    return {
        "study": "mine",
        "rounds": 2,
        "task": {"kind": "own"},
        "models": {"slm": {"source": "own:three-numbers"}},
        "silos": {"count": 3},
        "local": {"steps": 1, "batch_size": 1, "learning_rate": 0.1},
        "aggregation": {"clip_norm": 1.0},
        **more,
    }


def adds(step: float) -> Any:
    return lambda values, round_: {name: value + step for name, value in values.items()}


def all_add(step: float = 0.25) -> dict[str, Any]:
    return {name: adds(step) for name in NAMES}


def lines_of(program: str) -> int:
    return len([line for line in program.splitlines() if line.strip()])


def test_a_pytorch_loop_in_forty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(LOOP) <= 40
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = sfc.Run(Path("runs/linear"), {}).tensors()
    assert {name: value.shape for name, value in results.items()} == {
        "weight": (1, 8),
        "bias": (1,),
    }
    (learnt,) = re.findall(r"method='FedAvg', accuracy=\{'accuracy': ([\d.]+)", done.stdout)
    assert float(learnt) > 0.8
    report = ["audit", "report", "runs/linear/evidence.zip", "--html", "report.html"]
    for command in (["budget", "show"], report):
        told = CliRunner().invoke(app, command)
        assert told.exit_code == 0, told.output
    page = Path("report.html").read_text()
    assert "silos&#39; own" in page or "silos' own" in page
    assert "ffa-lora" not in page


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Whether the words are above 20."""

    def __init__(self, rows: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.words = torch.randint(1, 21, (rows, 6), generator=draw)
        self.labels = torch.randint(0, 2, (rows,), generator=draw)
        self.words += 20 * self.labels[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[at], "labels": self.labels[at]}


def trainers(directory: Path) -> dict[str, Trainer]:
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sure = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=41, num_attention_heads=2, max_position_embeddings=8, **shape, **sure)
    )
    model.bert.embeddings.position_embeddings.requires_grad_(False)
    arguments = TrainingArguments(
        output_dir=str(directory),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-2,
        num_train_epochs=2,
        use_cpu=True,
    )

    def metrics(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    return {
        name: Trainer(
            model=model,
            args=arguments,
            train_dataset=Rows(64, seed),
            eval_dataset=Rows(200, 9),
            compute_metrics=metrics,
        )
        for seed, name in enumerate(NAMES)
    }


def test_a_trainer_in_fifteen_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(TRAINER) <= 15
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"trainers": trainers(tmp_path / "hf")}
    exec(compile(TRAINER, str(PAGE), "exec"), given)
    run = given["run"]
    before, after = (score.accuracy["eval_accuracy"] for score in run.table)
    assert after > before + 0.1
    assert sfc.verify(run.bundle()).holds
    names = set(run.tensors())
    assert names
    assert not any("position_embeddings" in name for name in names)  # frozen: not sent


def test_a_trainer_begins_each_round_afresh(tmp_path: Path) -> None:
    trainer = trainers(tmp_path)["north"]
    silo = SiloTrainer(trainer)
    start = silo.values
    ends = []
    for round_ in range(2):
        torch.manual_seed(3)  # the order of the rows
        ends.append(silo(start, round_))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert not all(torch.equal(ends[0][name], start[name]) for name in start)
    by_hand = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=0.1)
    keeps = Trainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        optimizers=(by_hand, None),
    )
    kept = SiloTrainer(keeps)
    for round_ in range(2):  # its schedule begins anew
        end = kept(start, round_)
        assert not all(torch.equal(end[name], start[name]) for name in start)
    assert getattr(keeps.optimizer, "optimizer", keeps.optimizer) is by_hand
    trainer.model.requires_grad_(False)
    with pytest.raises(sfc.ConfigError, match="requires a gradient"):
        SiloTrainer(trainer)


def test_the_mean_of_the_updates_is_what_comes_out(tmp_path: Path) -> None:
    silos = {name: adds(step) for name, step in zip(NAMES, (0.0, 0.25, 0.5), strict=True)}
    seen: list[dict[str, Any]] = []

    def evaluate(values: dict[str, Any]) -> dict[str, float]:
        seen.append(values)
        return {}

    run = sfc.simulate_own(
        study(aggregation={"clip_norm": 4.0}), START, silos, evaluate=evaluate, out=tmp_path / "r"
    )
    assert {name: value.shape for name, value in run.tensors().items()} == {"w": (3,), "b": ()}
    np.testing.assert_allclose(run.tensors()["w"], 0.5, atol=1e-3)
    assert len(seen) == 3  # before the first round, and after each
    assert run.table == []
    assert set(run.epsilon.values()) == {None}
    found = sfc.verify(run.bundle())
    assert found.holds
    assert found.rounds_done == 2


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    out, calls = tmp_path / "r", [0]

    def evaluate(values: dict[str, Any]) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return {"of_one": min(1.0, max(0.0, float(values["w"][0])))}  # the noise may be below 0

    given = {"evaluate": evaluate, "out": out}
    with pytest.raises(KeyboardInterrupt):
        sfc.simulate_own(study(privacy=SILO_UNIT), START, all_add(), **given)
    with pytest.raises(sfc.ConfigError, match="there is a run in this directory already"):
        sfc.simulate_own(study(privacy=SILO_UNIT), START, all_add(), **given)
    run = sfc.simulate_own(study(privacy=SILO_UNIT), START, all_add(), resume=True, **given)
    assert len(run.results["rounds"]) == 2
    assert all(spent is not None and 0 < spent <= 8 for spent in run.epsilon.values())
    assert sfc.verify(run.bundle()).holds


def fails(values: dict[str, Any], round_: int) -> dict[str, Any]:
    raise KeyError("pa\x1btient 7")


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (fails, r"own training failed in test_own.py, line \d+: KeyError: .*tient 7"),
        (lambda values, round_: None, "own training returned NoneType"),
        (lambda values, round_: {"w": values["w"]}, r"left out 1, such as b"),
        (lambda values, round_: {**values, "extra": values["w"]}, "1 values that nobody knows"),
        (lambda values, round_: {**values, "w": np.zeros(4)}, r"shape \[4\], it came with \[3\]"),
        (lambda values, round_: {**values, "w": ["x"]}, "no floating-point type"),
        (lambda values, round_: {**values, "w": values["w"] * np.nan}, "not finite"),
    ],
)
def test_a_training_that_fails_costs_its_round_and_under_privacy_shows_in_nothing(
    training: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Adversary: the server, which watches whether a record made a training fail."""
    silos = {**all_add(), "west": training}
    with caplog.at_level(logging.WARNING), pytest.raises(SecureFedCoLLMError):
        sfc.simulate_own(study(), START, silos, out=tmp_path / "plain")  # too few are left
    assert re.search(said, caplog.text)
    assert "\x1b" not in caplog.text
    caplog.clear()
    run = sfc.simulate_own(study(privacy=SILO_UNIT), START, silos, out=tmp_path / "private")
    assert re.search(said + ".*; it contributes noise only", caplog.text)
    assert [round_["survivors"] for round_ in run.results["rounds"]] == [[*NAMES]] * 2
    assert sfc.verify(run.bundle()).holds


@pytest.mark.parametrize(
    ("given", "start", "where"),
    [
        ({"privacy": {**SILO_UNIT, "unit": "record"}}, START, "privacy.unit"),
        ({"task": {"kind": "text"}}, START, "models.slm.source"),
        ({"adapter": {"rank": 4}}, START, "adapter"),
        ({"keep": {"rows": 3}}, START, "keep"),
        ({"silos": {"count": 4}}, START, "silos"),
        ({"models": {"slm": {"source": "own:x", "sha256": "00" * 32}}}, START, "models.slm.sha256"),
        ({}, {}, "start"),
        ({}, {"w": np.zeros(3, np.int64)}, r"start\['w'\]"),
        ({}, {"w": torch.zeros(3, dtype=torch.int64)}, r"start\['w'\]"),
    ],
)
def test_what_cannot_be_promised_or_read_is_refused(
    given: dict[str, Any], start: dict[str, Any], where: str, tmp_path: Path
) -> None:
    with pytest.raises(sfc.ConfigError) as refused:
        sfc.simulate_own(study(**given), start, all_add(), out=tmp_path / "r")
    assert re.fullmatch(where, refused.value.where or "")
    assert refused.value.hint
    assert not (tmp_path / "r").exists()


def test_scores_are_shares(tmp_path: Path) -> None:
    with pytest.raises(sfc.ConfigError, match="not shares from 0 to 1"):
        sfc.simulate_own(
            study(), START, all_add(), evaluate=lambda v: {"loss": 3.0}, out=tmp_path / "r"
        )
    assert not (tmp_path / "r").exists()


def test_the_command_line_says_where_such_a_study_runs(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(sfc.dump_study(sfc.load_study(study())))
    for command in (["simulate", str(path)], ["study", "check", str(path), "--estimate"]):
        told = CliRunner().invoke(app, command)
        assert isinstance(told.exception, sfc.ConfigError)
        assert "simulate_own" in told.exception.hint
    told = CliRunner().invoke(app, ["study", "check", str(path)])
    assert "their own code" in told.output
    assert "rank" not in told.output


def test_a_plan_is_of_the_whole_silo_alone() -> None:
    made = sfc.load_study(study(privacy=SILO_UNIT, local={"batch_size": 32, **STEP}))
    (plan,) = sfc.plan_budget(made, values=9)
    assert [option.name for option in plan.options if option.offered] == ["silo/distributed"]
    assert plan.advice.startswith("take silo/distributed")
    with pytest.raises(sfc.ConfigError, match="own code knows how many values") as refused:
        sfc.plan_budget(made)
    assert "--values" in refused.value.hint


def test_tensors_come_back_as_they_were() -> None:
    given = {
        "half": torch.full((2,), 0.5, dtype=torch.bfloat16),
        "wide": np.full((2, 2), 1 / 3),
        "one": torch.tensor(2.0),
    }
    tensors = Tensors(given)
    back = tensors.values(tensors.start)
    assert back["half"].dtype == torch.bfloat16
    assert back["wide"].dtype == np.float64
    assert back["one"].shape == ()
    np.testing.assert_array_equal(tensors.vector(back), tensors.start)
    back["wide"] += 1  # a copy
    assert tensors.start.max() == 2.0
    other = Tensors({**given, "one": torch.tensor(3.0)})
    assert other.layout == tensors.layout
    assert other.digest != tensors.digest


def test_values_on_disk_are_those_of_the_run_or_refused(tmp_path: Path) -> None:
    tensors = Tensors(START)
    moved = np.arange(tensors.size, dtype=np.float32) / 3
    tensors.write(moved, tmp_path)
    np.testing.assert_array_equal(tensors.read(tmp_path), moved)
    with pytest.raises(StateError, match="left out"):
        Tensors({"other": np.zeros(2)}).read(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(StateError, match="cannot be read"):
        tensors.read(tmp_path)
    with pytest.raises(TrainingError):
        tensors.vector([1, 2])


def test_own_training_has_an_outer_optimiser_and_it_goes_on_after_a_failure(tmp_path: Path) -> None:
    """Nesterov by hand: v = 0.5 v + mean, a step of 0.5 (mean + 0.5 v); two rounds of 0.25."""
    outer = {"outer": {"optimizer": "nesterov", "learning_rate": 0.5, "momentum": 0.5}}
    made = study(server=outer)
    broken = {"north": False}

    def north(values: dict[str, Any], round_: int) -> dict[str, Any]:
        if round_ == 1 and broken["north"]:
            raise ValueError("no power")
        return adds(0.25)(values, round_)

    silos = all_add() | {"north": north}
    run = sfc.simulate_own(made, START, silos, out=tmp_path / "whole")
    first = 0.5 * (0.25 + 0.5 * 0.25)
    second = 0.5 * (0.25 + 0.5 * (0.5 * 0.25 + 0.25))
    np.testing.assert_allclose(run.tensors()["w"], first + second, atol=1e-4)
    assert sfc.verify(run.bundle()).holds
    broken["north"] = True
    stops = {"silos": {"minimum": 3, "count": 3, "colluders": 1}}
    with pytest.raises(SecureFedCoLLMError, match="no power"):
        sfc.simulate_own(made | stops, START, silos, out=tmp_path / "cut")
    broken["north"] = False
    again = sfc.simulate_own(made | stops, START, silos, out=tmp_path / "cut", resume=True)
    for name, value in run.tensors().items():
        np.testing.assert_array_equal(again.tensors()[name], value)
    plain = sfc.simulate_own(study(), START, silos, out=tmp_path / "plain")
    np.testing.assert_allclose(plain.tensors()["w"], 0.5, atol=1e-4)  # the control: FedAvg
