"""``keep``: the best round's adapters, across a kill, and a run that ends by patience."""

from __future__ import annotations

import json

import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.federation.keeping import best_round
from securefedcollm.federation.workload import silent
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.simulation.plan import SimulationPlan
from securefedcollm.simulation.simulate import Simulation
from securefedcollm.study import load_study
from tests.support.inputs import make_inputs

STILL = ["local.learning_rate=1e-6", "distillation.learning_rate_slm=1e-7"]
"""No round is better than the first."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def adapter(directory, model="slm"):
    return (directory / model / "adapter_model.safetensors").read_bytes()


@pytest.mark.soak
def test_patience_ends_a_run_and_silos_pay_for_the_rounds_that_were_run(inputs, tmp_path):
    out = tmp_path / "run"
    words = ["simulate", str(inputs / "tiny.yaml"), "--data", str(inputs), "--out", str(out)]
    changes = [*STILL, "rounds=5", "keep={rows: 8, metric: accuracy, patience: 1}"]
    words += [word for change in changes for word in ("--set", change)]
    words += ["--workers", "0", "--no-baselines"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert len(results["rounds"]) == 2
    assert results["best"]["round"] == 1
    assert any(row["method"] == "FedCoLLM, round 1 (best)" for row in results["table"])
    assert results["evidence"]["holds"]
    assert results["evidence"]["passed"] == 25  # as of a run that ran all its rounds
    for silo in results["silos"]:
        assert 0 < silo["epsilon_spent"] < 7
        name = silo["name"]
        with Ledger(out / "silos" / name / "ledger.sqlite", name) as ledger:
            assert [entry.state for entry in ledger.entries()] == ["settled"] * 2
    assert adapter(out / "adapters-best") != adapter(out / "adapters")
    again = CliRunner().invoke(app, [*words, "--resume", "--json"])  # nothing is left to run
    assert len(json.loads(again.stdout)["rounds"]) == 2


def test_the_best_round_is_kept_across_a_kill_and_rows_are_not_distilled_from(inputs, tmp_path):
    changes = ["privacy=none", "rounds=3", "keep={best: llm, rows: 4}"]
    study = load_study(inputs / "tiny.yaml", changes)

    def run(out, **more):
        say = more.pop("say", lambda text: None)
        plan = SimulationPlan(out=out, data=inputs, workers=0, baselines=(), **more)
        return Simulation(study, plan).run(silent, say)

    def killed(text):
        raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", say=killed, resume=(tmp_path / "cut").exists())
    cut = run(tmp_path / "cut", resume=True)
    assert cut["best"] == whole["best"]
    best = best_round(study, whole["rounds"])
    assert best == whole["best"]["round"]
    losses = [record["validation"]["llm/loss"] for record in whole["rounds"]]
    assert losses[best - 1] == min(losses)
    for model in ("slm", "llm"):
        kept = adapter(tmp_path / "cut" / "adapters-best", model)
        assert kept == adapter(tmp_path / "whole" / "adapters-best", model)
    same = adapter(tmp_path / "whole" / "adapters-best") == adapter(tmp_path / "whole" / "adapters")
    assert same == (best == 3)
    assert [p.name for p in (tmp_path / "cut" / "server").glob("best-*")] == [f"best-{best:05d}"]

    from securefedcollm.federation.dealing import deal
    from securefedcollm.federation.servertuning import _validation

    public = deal(study, inputs).public
    rest, kept = _validation(study, public)
    assert len(kept) == 4
    assert all(question.answer is not None for question in kept)
    assert {id(q) for q in rest}.isdisjoint(id(q) for q in kept)
    assert len(rest) + len(kept) == len(public)


def test_more_rows_than_there_are_answers_are_refused(inputs):
    with pytest.raises(ConfigError, match=r"keep\.rows: 9 of 8 public questions"):
        load_study(inputs / "tiny.yaml", ["keep={rows: 9}"])


def test_something_must_be_left_to_distil_from(inputs):
    with pytest.raises(ConfigError, match=r"keep\.rows: all public questions are set aside"):
        load_study(inputs / "tiny.yaml", ["keep={rows: 8}", "task.data.public=8"])
    from securefedcollm.federation.dealing import deal
    from securefedcollm.federation.servertuning import _validation

    study = load_study(inputs / "tiny.yaml", ["keep={rows: 8}"])
    answered = [q for q in deal(study, inputs).public if q.answer is not None]
    with pytest.raises(ConfigError, match=r"keep\.rows: all public questions are set aside"):
        _validation(study, answered)
