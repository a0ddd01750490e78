"""``experiment``: every row, resumption, and numbers that the runs themselves confirm."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.federation.experiment import Experiment
from securefedcollm.federation.workload import silent
from securefedcollm.study import load_study

from .tiny import make_inputs

QUICK = ["privacy=none", "rounds=1"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def plan(inputs, out, *overrides, **options):
    study = load_study(inputs / "tiny.yaml", [*QUICK, *overrides])
    options = {"seeds": 2, "workers": 0, "data": inputs} | options
    return Experiment(study, out=out, **options)


class Killed(Exception):
    pass


def test_a_killed_experiment_continues_and_its_numbers_are_those_of_the_runs(inputs, tmp_path):
    out, said = tmp_path / "exp", []

    def say(text):
        said.append(text)
        if len(said) == 9:  # in the second of two seeds of seven runs
            raise Killed

    with pytest.raises(Killed):
        plan(inputs, out).run(silent, say)
    first = json.loads((out / "table.json").read_text())
    assert first["seeds"] == [3]
    finished = {p: p.stat().st_mtime_ns for p in out.rglob("answers.json")}
    assert len(finished) == 9
    (out / "seed-4" / "fedavg" / "answers.json").unlink()  # killed after the federation
    with pytest.raises(ConfigError, match="already"):
        plan(inputs, out).run(silent, silent_say)

    table = plan(inputs, out, resume=True).run(silent, said.append)
    assert table == json.loads((out / "table.json").read_text())
    kept = {p: t for p, t in finished.items() if "seed-4/fedavg" not in str(p)}
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert len(said) == 9 + 6

    rows = {(r["model"], r["method"]): r for r in table["rows"]}
    assert list(rows) == [
        *(("slm", m) for m in ("zero-shot", "standalone", "FedAvg", "FedAvg + auxiliary")),
        *(("slm", m) for m in ("FedCoLLM", "FedCoLLM (mutual KL)")),
        *(("llm", m) for m in ("zero-shot", "auxiliary only", "FedCoLLM")),
        *(("llm", m) for m in ("FedCoLLM (mutual KL)", "centralized")),
    ]
    for key, method in (("fedcollm", "FedCoLLM"), ("fedavg", "FedAvg")):
        for number, seed in enumerate((3, 4)):
            results = json.loads((out / f"seed-{seed}" / key / "results.json").read_text())
            for row in results["table"]:
                own = rows[row["model"], row["method"]]["by_seed"]["accuracy"]["all"][number]
                assert own == pytest.approx(row["accuracy"][""], abs=1e-6)
            assert method in {row["method"] for row in results["table"]}
    assert rows["slm", "FedAvg"]["by_seed"] != rows["slm", "zero-shot"]["by_seed"]
    assert rows["llm", "centralized"]["by_seed"] != rows["llm", "zero-shot"]["by_seed"]
    alone = [
        json.loads((out / "seed-3" / "standalone" / f"silo-{i}.json").read_text())
        for i in range(1, 5)
    ]
    assert len({tuple(a["gold_log_prob"]) for a in alone}) == 4
    mean = rows["slm", "standalone"]["by_seed"]["gold_log_prob"]["all"][0]
    assert mean == pytest.approx(np.mean([a["gold_log_prob"] for a in alone]), abs=1e-6)
    page = (out / "table.md").read_text()
    assert "**FedCoLLM − FedAvg + auxiliary**" in page
    picture = ElementTree.fromstring((out / "plot.svg").read_text())
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}circle")) == len(rows)


def silent_say(text):
    pass


def test_the_command_with_a_noisy_silo_and_nothing_labelled(inputs, tmp_path):
    arguments = ["experiment", str(inputs / "tiny.yaml"), "--data", str(inputs), "--seeds", "1"]
    for change in (*QUICK, "task.data.public_labelled=0", "distillation.loss=mutual-kl"):
        arguments += ["--set", change]
    arguments += ["--noisy-silos", "1", "--workers", "0", "--out", str(tmp_path / "e"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    methods = {row["method"] for row in table["rows"]}
    assert methods == {
        *("zero-shot", "standalone", "FedAvg", "FedCoLLM", "centralized"),
        *("FedAvg, 1 noisy", "FedCoLLM, 1 noisy"),
    }
    assert any("auxiliary controls are left out" in note for note in table["notes"])
    rows = {(r["model"], r["method"]): r["gold_log_prob"]["all"]["mean"] for r in table["rows"]}
    assert rows["slm", "FedAvg, 1 noisy"] != rows["slm", "FedAvg"]


def test_impossible_experiments_are_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match="3 of 4 silos cannot be noisy"):
        plan(inputs, tmp_path / "e", noisy=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="will not be removed"):
        plan(inputs, tmp_path / "mine", overwrite=True).run(silent, silent_say)
    with pytest.raises(ConfigError, match="no experiment to resume"):
        plan(inputs, tmp_path / "none", resume=True).run(silent, silent_say)
