"""``experiment``: every row, resumption, and numbers that the runs themselves confirm."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.experiment.answers import teacher_answers
from securefedcollm.experiment.experiment import Experiment
from securefedcollm.experiment.rows import arms, chosen
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.workload import silent
from securefedcollm.simulation.plan import ExperimentPlan, SimulationPlan
from securefedcollm.simulation.simulate import Simulation
from securefedcollm.study import load_study
from tests.support.inputs import make_inputs

QUICK = ["privacy=none", "rounds=1"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def plan(inputs, out, *overrides, **options):
    study = load_study(inputs / "tiny.yaml", [*QUICK, *overrides])
    options = {"seeds": 1, "workers": 0, "data": inputs} | options
    return Experiment(study, ExperimentPlan(out=out, **options))


def silent_say(text):
    pass


class Killed(Exception):
    pass


@pytest.mark.soak
def test_a_killed_experiment_continues_and_its_numbers_are_those_of_the_runs(inputs, tmp_path):
    out, said = tmp_path / "exp", []

    def say(text):
        said.append(text)
        if len(said) == 3:  # of seven runs
            raise Killed

    with pytest.raises(Killed):
        plan(inputs, out).run(silent, say)
    finished = {p: p.stat().st_mtime_ns for p in out.rglob("answers.json")}
    assert len(finished) == 3
    again = out / "seed-3" / "fedavg" / "answers.json"
    again.unlink()  # killed after the federation and before its answers
    federated = (out / "seed-3" / "fedavg" / "server" / "state.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="already"):
        plan(inputs, out).run(silent, silent_say)
    with pytest.raises(ConfigError, match="another study"):
        plan(inputs, out, "seed=4", resume=True).run(silent, silent_say)

    arguments = ["experiment", str(inputs / "tiny.yaml"), "--data", str(inputs), "--seeds", "1"]
    for change in QUICK:
        arguments += ["--set", change]
    arguments += ["--noisy-silos", "1", "--workers", "0", "--out", str(out), "--resume", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    assert table == json.loads((out / "table.json").read_text())
    del finished[again]
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert (out / "seed-3" / "fedavg" / "server" / "state.json").stat().st_mtime_ns == federated

    rows = {(r["model"], r["method"]): r for r in table["rows"]}
    paper, noise = "FedCoLLM (mutual KL)", "FedCoLLM, 1 noisy"
    prompts = "FedCoLLM (prompts only)"
    slm = ["zero-shot", "standalone", "FedAvg", "the pooled teacher", "FedAvg + auxiliary"]
    slm += ["FedCoLLM", paper, prompts]
    llm = ["zero-shot", "auxiliary only", "FedCoLLM", paper, prompts, "centralized", noise]
    slm += ["FedAvg, 1 noisy", noise]
    assert list(rows) == [("slm", method) for method in slm] + [("llm", method) for method in llm]
    # A run by itself, which has nothing from the rows before it, ends with the same adapters.
    single = Simulation(
        load_study(out / "study.yaml"),
        SimulationPlan(out=tmp_path / "one", data=inputs, workers=0),
    ).run(silent, silent_say)
    for model in ("slm", "llm"):
        name = f"adapters/{model}/adapter_model.safetensors"
        theirs = (out / "seed-3" / "fedcollm" / name).read_bytes()
        assert (tmp_path / "one" / name).read_bytes() == theirs
    for row in single["table"]:
        own = rows[row["model"], row["method"]]["accuracy"]["all"]["mean"]
        assert own == pytest.approx(row["accuracy"][""], abs=1e-6)

    def gold(model, method):
        return rows[model, method]["gold_log_prob"]["all"]["mean"]

    assert len({gold("slm", method) for method in slm}) == len(slm)
    assert len({gold("llm", method) for method in llm}) == len(llm)

    def probability(arm, model):
        answers = json.loads((out / "seed-3" / arm / "answers.json").read_text())["answers"]
        return np.exp(answers[model]["gold_log_prob"])

    mixed = [probability("fedavg", "slm"), probability("zero-shot", "llm")]
    pooled = probability("teacher", "slm")  # question by question between the two
    assert (np.min(mixed, axis=0) - 1e-6 <= pooled).all()
    assert (pooled <= np.max(mixed, axis=0) + 1e-6).all()
    better = load_study(out / "study.yaml", ["distillation.loss=dual-min-ce"])
    said = teacher_answers(  # the whole of the surer one, though it may be wrong
        better,
        deal(better, inputs).test,
        adapters=out / "seed-3" / "fedavg" / "adapters",
        data=inputs,
        device="cpu",
    )
    chosen = np.exp(said["gold_log_prob"])
    assert np.isclose(chosen, mixed, atol=1e-6).any(axis=0).all()
    assert (chosen < np.max(mixed, axis=0) - 1e-6).any()
    alone = [
        json.loads((out / "seed-3" / "standalone" / f"silo-{i}.json").read_text())
        for i in range(1, 5)
    ]
    assert len({tuple(a["gold_log_prob"]) for a in alone}) == 4
    mean = np.mean([a["gold_log_prob"] for a in alone])
    assert gold("slm", "standalone") == pytest.approx(mean, abs=1e-6)
    page = (out / "table.md").read_text()
    assert "**FedCoLLM − FedAvg + auxiliary**" in page
    assert "**FedCoLLM (prompts only) − FedAvg**" in page
    assert "**FedCoLLM (prompts only) − zero-shot**" in page
    picture = ElementTree.fromstring((out / "plot.svg").read_text())
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}circle")) == len(rows)


def test_rows_that_a_study_cannot_have_are_left_out(inputs):
    study = load_study(inputs / "tiny.yaml", ["task.data.public_labelled=0"])
    assert not {"auxiliary", "prompts"} & {arm.key for arm in arms(study)}
    for change in (
        "task.data.public_labelled=PUBLIC",
        "distillation.batch_unlabelled=0",
        "distillation.loss=none",
    ):
        public = load_study(inputs / "tiny.yaml").task.data.public
        study = load_study(inputs / "tiny.yaml", [change.replace("PUBLIC", str(public))])
        assert {"auxiliary", "prompts"} & {arm.key for arm in arms(study)} == {"auxiliary"}
    study = load_study(inputs / "tiny.yaml", ["distillation.loss=mutual-kl"])
    assert "mutual-kl" not in {arm.key for arm in arms(study)}


def test_other_losses_take_over_no_setting_of_a_transfer_alone(inputs, tmp_path):
    """The rows with other losses are studies of their own: refused before, at the first of them."""
    changes = ("distillation.loss=transfer", "distillation.over=choices", "distillation.change=0.3")
    study = load_study(inputs / "tiny.yaml", list(changes))
    Experiment(study, ExperimentPlan(out=tmp_path, data=inputs))
    assert {"none", "mutual-kl"} <= {arm.loss for arm in arms(study)}


def test_one_model_has_fedavg_for_its_main_row(inputs, tmp_path):
    alone = ("models.llm=none", "distillation={}")
    out = tmp_path / "exp"
    table = plan(inputs, out, *alone, noisy=1).run(silent, silent_say)
    rows = {(row["model"], row["method"]) for row in table["rows"]}
    names = ("FedAvg", "standalone", "zero-shot", "centralized", "FedAvg, 1 noisy")
    assert rows == {("slm", name) for name in names}
    main = {(d["method"], d["less"]) for d in table["differences"] if d["main"]}
    assert main == {("FedAvg", "standalone"), ("FedAvg", "zero-shot")}
    assert "LLM" not in (out / "table.md").read_text()


def test_impossible_experiments_are_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match="3 of 4 silos cannot be noisy"):
        plan(inputs, tmp_path / "e", noisy=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="will not be removed"):
        plan(inputs, tmp_path / "mine", overwrite=True).run(silent, silent_say)
    with pytest.raises(ConfigError, match="no experiment to resume"):
        plan(inputs, tmp_path / "none", resume=True).run(silent, silent_say)


def test_some_rows_first_and_the_others_later(inputs, tmp_path):
    words = ["experiment", inputs / "tiny.yaml", "--data", inputs, "--seeds", "1", "--workers", "0"]
    for change in QUICK:
        words += ["--set", change]
    words += ["--out", tmp_path / "exp", "--json"]

    def table(*more):
        result = CliRunner().invoke(app, [str(word) for word in (*words, *more)])
        assert result.exit_code == 0, result.exception
        return json.loads(result.stdout)

    first = table("--only", "prompts")
    names = [(row["model"], row["method"]) for row in first["rows"]]
    prompts = "FedCoLLM (prompts only)"
    assert names == [(m, n) for m in ("slm", "llm") for n in ("FedCoLLM", prompts)]
    less = {(d["model"], d["method"], d["less"]) for d in first["differences"]}
    assert less == {("slm", "FedCoLLM", prompts), ("llm", "FedCoLLM", prompts)}  # no FedAvg yet
    runs = {p: p.stat().st_mtime_ns for p in (tmp_path / "exp").rglob("answers.json")}
    second = table("--resume", "--only", "fedavg", "--only", "prompts")
    assert {p: p.stat().st_mtime_ns for p in runs} == runs
    assert ("slm", prompts, "FedAvg") in {
        (d["model"], d["method"], d["less"]) for d in second["differences"]
    }


def test_a_row_that_is_none_is_refused_with_the_rows_that_are(inputs):
    every = arms(load_study(inputs / "tiny.yaml", QUICK))
    keys = [arm.key for arm in every]
    assert [arm.key for arm in chosen(every, ())] == keys
    # The pooled teacher answers with what FedAvg tuned, and the study's own run is always there.
    assert [arm.key for arm in chosen(every, ("teacher",))] == ["fedcollm", "fedavg", "teacher"]
    with pytest.raises(ConfigError, match="--only: fedprox is no row") as caught:
        chosen(every, ("fedprox",))
    assert all(key in caught.value.hint for key in keys)
