"""What a tracking tool is told of a run: public numbers, each round once, and nothing of a silo.

Adversary: whoever reads the tracking server.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.federation import tracking
from securefedcollm.federation.tracking import ROUND, following, public_numbers
from securefedcollm.study import load_study
from tests.support.hostile import WORDS
from tests.support.inputs import make_inputs
from tests.support.tracker import Memory

STUDY = load_study(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
RECORD = {
    "round": 1,
    "survivors": ["silo-1", "silo-2"],
    "dropouts": {"silo-3": "gone"},
    "bytes_up": {"silo-1": 30, "silo-2": 12},
    "bytes_down": {"silo-1": 5, "silo-2": 5},
    "distillation": {"first_loss_llm": 1.5, "last_loss_slm": 0.75},
    "evaluation": {"slm/": 0.5, "slm/private": 0.25, "llm/private": 0.75},
    "perplexity": {"slm/": 9.5},
    "validation": {"slm/loss": 0.625},
    "private": {"accuracy": 0.375, "margin": None, "counts": [6, 10]},
    "seconds": {"silos_and_sum": 2.5, "server": 0.125},
}
TOLD = {
    "accuracy/slm": 0.5,
    "accuracy/slm private": 0.25,
    "accuracy/llm private": 0.75,
    "perplexity/slm": 9.5,
    "validation/slm loss": 0.625,
    "private/accuracy": 0.375,
    "distillation/first_loss_llm": 1.5,
    "distillation/last_loss_slm": 0.75,
    "seconds/server": 0.125,
    "bytes_up/all": 42,
    "bytes_down/all": 10,
}
AGREED = {
    "privacy/epsilon_agreed": STUDY.privacy.epsilon,
    "privacy/delta_agreed": STUDY.privacy.delta,
}


def numbers_in(tree):
    """Every number and every name in a record, however deep."""
    if isinstance(tree, dict):
        return {x for pair in tree.items() for part in pair for x in numbers_in(part)}
    if isinstance(tree, list):
        return {x for part in tree for x in numbers_in(part)}
    return {tree}


SECRETS = {"loss": 31.25, "norm": 77.5, "records": 4321}
SPOILT = [
    {"silos": {"silo-1": SECRETS}},
    {"silo-1": SECRETS, "clip_norm": 77.5},
    SECRETS,
    {"training_loss": 31.25, "update_norm": 77.5, "number_of_records": 4321},
    *(
        {key: RECORD[key] | {f"silo-1/{name}": value for name, value in SECRETS.items()} | SECRETS}
        for key in ("distillation", "evaluation", "perplexity", "validation", "seconds")
    ),
    {"evaluation": RECORD["evaluation"] | {"slm/x": SECRETS}},
    {"bytes_up": RECORD["bytes_up"] | {"silo-1 loss": {"x": 31.25}}},
    {"seconds": RECORD["seconds"] | {"silo-1": 31.25, "silo-2": 77.5, "x": 4321}},
    {"seconds": RECORD["seconds"] | {"silos_and_sum": 31.25}},
]


def test_the_public_numbers_are_told():
    assert public_numbers(STUDY, RECORD) == TOLD | AGREED
    plain = load_study(Path(__file__).parents[2] / "configs" / "quickstart.yaml", ["privacy=none"])
    assert public_numbers(plain, RECORD) == TOLD


@pytest.mark.parametrize("more", SPOILT)
def test_nothing_of_a_silo_is_told_wherever_a_record_holds_it(more):
    """With the check's own control: it finds these numbers in the record."""
    record = RECORD | more
    assert numbers_in(record) & set(SECRETS.values())
    told = public_numbers(STUDY, record)
    assert told == TOLD | AGREED
    assert not numbers_in(told) & set(SECRETS.values())


def test_groups_have_names_that_every_tool_takes():
    groups = ["private", "a/b", "a:b", "../../x", "病", "痛", "x" * 300, "x" * 301, WORDS, " "]
    record = {"evaluation": {f"slm/{group}": i / 16 for i, group in enumerate(groups)}}
    told = public_numbers(STUDY, record)
    names = [name for name in told if name.startswith("accuracy/")]
    assert len(names) == len(groups)
    assert names[0] == "accuracy/slm private"
    assert all(re.fullmatch(r"accuracy/slm [\w. -]{1,120}", name, re.ASCII) for name in names)


def test_a_run_that_goes_on_sends_each_round_once_and_in_order():
    tool, history = Memory(), []

    def go(rounds, then=None):
        with following(tool.open, STUDY) as follow:
            follow(history)
            for _ in range(rounds):
                history.append(RECORD)
                follow(history)
            if then:
                raise then

    go(0)
    assert tool.opened == 0
    go(2)
    history.append(RECORD)  # killed before it was told
    with pytest.raises(KeyboardInterrupt):
        go(1, KeyboardInterrupt)
    go(1)
    go(0)
    assert list(tool.rounds) == [1, 2, 3, 4, 5]
    assert tool.closed == [True, False, True, True]
    assert [list(numbers)[-1] for numbers in tool.rounds.values()] == [ROUND] * 5
    assert [numbers[ROUND] for numbers in tool.rounds.values()] == [1, 2, 3, 4, 5]


def test_a_tool_that_fails_is_told_later_and_does_not_end_the_run(caplog):
    tool, history = Memory(), []
    with caplog.at_level(logging.WARNING), following(tool.open, STUDY) as follow:
        for round_ in range(6):
            tool.broken = round_ in {0, 2, 3}
            history.append(RECORD)
            follow(history)
            assert len(tool.rounds) == (0 if round_ == 0 else 2 if tool.broken else round_ + 1)
        tool.broken = True
        follow([*history, RECORD])
    assert len(tool.rounds) == 6
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.isprintable()
    assert "ConnectionError: https://host/" in line
    assert "secret" not in line


def test_without_the_package_nothing_is_begun(tmp_path, monkeypatch):
    make_inputs(tmp_path)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    study = str(tmp_path / "tiny.yaml")
    for words, made in (
        (["simulate", study, "--data", str(tmp_path), "--out", str(tmp_path / "run")], "run"),
        (["server", study, "--home", str(tmp_path / "home")], "home"),
    ):
        error = CliRunner().invoke(app, [*words, "--track", "mlflow"]).exception
        assert isinstance(error, ConfigError)
        assert (error.where, error.hint) == ("--track", "pip install 'securefedcollm[mlflow]'")
        assert not (tmp_path / made).exists()


def simulate(inputs, out, *more):
    words = ["simulate", str(inputs / "tiny.yaml"), "--data", str(inputs), "--out", str(out)]
    more = ("--no-baselines", "--workers", "0", "--json", *more)
    result = CliRunner().invoke(app, [*words, *more])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_whole_run_tells_what_its_record_holds_and_catches_up(tmp_path, monkeypatch):
    make_inputs(tmp_path)
    tool = Memory()
    monkeypatch.setattr(tracking, "TensorBoard", lambda directory: tool.open())
    monkeypatch.setattr(tracking, "require_tracker", lambda kind: None)
    monkeypatch.setattr("securefedcollm.simulation.simulate.require_tracker", lambda kind: None)
    out = tmp_path / "run"
    history = simulate(tmp_path, out)
    assert tool.rounds == {}
    simulate(tmp_path, out, "--resume", "--track", "tensorboard")
    study = load_study(out / "study.yaml")
    for number, record in enumerate(history, start=1):
        told = tool.rounds[number]
        assert told == public_numbers(study, record) | {ROUND: number}
        assert told["accuracy/slm"] == record["evaluation"]["slm/"]
        assert told["bytes_up/all"] == sum(record["bytes_up"].values())
        assert not [name for name in told if "silo-" in name]
    assert len(tool.rounds) == 2
    assert not (out / "tensorboard").exists()


def curves(directory):
    """{name: [(step, value)]} of event files, as TensorBoard shows them."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(directory)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_tensorboard_shows_each_round_once(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    run = tmp_path / "run"
    with tracking.tracking("tensorboard", STUDY, run, "0" * 32) as follow:
        follow([RECORD])
    with SummaryWriter(str(run / "tensorboard")) as killed:  # in the middle of round 2
        killed.add_scalar("accuracy/slm", 0.5, 2)
    with tracking.tracking("tensorboard", STUDY, run, "0" * 32) as follow:
        follow([RECORD] * 2)
        follow([RECORD] * 3)
    shown = curves(run / "tensorboard")
    assert shown.keys() == TOLD.keys() | AGREED.keys() | {ROUND}
    assert shown["accuracy/slm"] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert shown[ROUND] == [(1, 1), (2, 2), (3, 3)]


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    found = pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", *tracking._LOST_PATIENCE):
        monkeypatch.setenv(name, "")  # put back what the run sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return found


def test_mlflow_has_one_run_of_a_run_and_each_round_once(tmp_path, mlflow):
    run = tmp_path / "a run"
    for rounds in (1, 3):
        with tracking.tracking("mlflow", STUDY, run, "5" * 32) as follow:
            for done in range(rounds):
                follow([RECORD] * (done + 1))
    with tracking.tracking("mlflow", STUDY, run, "6" * 32) as follow:
        follow([RECORD])
    client = mlflow.MlflowClient(tracking_uri=(run / "mlruns").as_uri())
    place = client.get_experiment_by_name(STUDY.study).experiment_id
    found = {r.data.tags["securefedcollm.run"]: r for r in client.search_runs([place])}
    assert found.keys() == {"5" * 32, "6" * 32}
    mine = found["5" * 32]
    assert mine.info.status == "FINISHED"
    assert mine.data.metrics == {**TOLD, **AGREED, ROUND: 3}
    assert mine.data.params == {}
    assert mine.data.tags.keys() == {"securefedcollm.run", "mlflow.runName"}  # no user, no path
    assert mine.info.user_id == "unknown"
    course = client.get_metric_history(mine.info.run_id, "accuracy/slm private")
    assert sorted((m.step, m.value) for m in course) == [(1, 0.25), (2, 0.25), (3, 0.25)]


def test_an_mlflow_server_that_is_away_costs_a_line(tmp_path, mlflow, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with tracking.tracking("mlflow", STUDY, tmp_path, "5" * 32) as follow:
        follow([RECORD])
        follow([RECORD] * 2)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("securefedcollm")]
    assert len(said) == 1
    assert "secret" not in said[0]
    assert list(tmp_path.iterdir()) == []
