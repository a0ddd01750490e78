"""The parts of the server's phase in whole runs of tiny models: outer step and central steps."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError, SecureFedCoLLMError, TrainingError
from securefedcollm.experiment.experiment import Experiment
from securefedcollm.federation.cotuning import ServerTuning, planned_event
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.roles import server_questions
from securefedcollm.federation.workload import silent
from securefedcollm.simulation.plan import ExperimentPlan, SimulationPlan
from securefedcollm.simulation.simulate import Simulation
from securefedcollm.study import load_study
from tests.support.inputs import make_inputs
from tests.support.rounds import Killed

ONE_MODEL = ("privacy=none", "models.llm=none", "distillation={}")
NESTEROV = "server.outer={optimizer: nesterov, learning_rate: 0.7, momentum: 0.8}"
ADAM = "server.outer={optimizer: adam, learning_rate: 0.02}"
CENTRAL = "server.central={steps: 3, batch_size: 4, learning_rate: 0.01}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def study_of(inputs, *changes):
    return load_study(inputs / "tiny.yaml", [*ONE_MODEL, *changes])


def run(inputs, out, *changes, **options) -> dict[str, Any]:
    plan = SimulationPlan(out=out, data=inputs, workers=0, baselines=(), **options)
    return Simulation(study_of(inputs, *changes), plan).run(silent, lambda text: None)


def adapter(out):
    return load_file(out / "adapters" / "slm" / "adapter_model.safetensors")


def same(a, b) -> bool:
    first, second = adapter(a), adapter(b)
    return all(np.array_equal(value, second[name]) for name, value in first.items())


def server_of(inputs, *changes, **options):
    study = study_of(inputs, *changes)
    dealt = deal(study, inputs)
    return ServerTuning(study, public=dealt.public, data=inputs, **options)


def test_a_run_with_both_parts_has_its_own_name_baseline_and_evidence(inputs, tmp_path):
    words = ["simulate", inputs / "tiny.yaml", "--data", inputs, "--out", tmp_path / "run"]
    changes = (*ONE_MODEL, NESTEROV, CENTRAL)
    words += [word for change in changes for word in ("--set", change)]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--workers", "0", "--json")])
    if isinstance(result.exception, SecureFedCoLLMError):
        raise result.exception
    found = json.loads(result.stdout)
    methods = [row["method"] for row in found["table"]]
    assert methods == ["zero-shot", "standalone", "FedAvg", "FedOpt + central"]
    assert found["evidence"]["holds"]
    for record in found["rounds"]:
        assert set(record["central"]) == {"first_loss", "last_loss"}
        assert record["outer"]["step_norm"] > record["outer"]["mean_norm"] * 0.7
        assert record["distillation"] == {}


def test_the_parts_change_nothing_of_what_a_silo_plans_and_adds(inputs):
    """Neither costs ε: event and noise are those of a study without them."""
    private = ["models.llm=none", "distillation={}"]
    plain = load_study(inputs / "tiny.yaml", private)
    both = load_study(inputs / "tiny.yaml", [*private, NESTEROV, CENTRAL])
    records = deal(plain, inputs).silos["silo-1"]
    assert planned_event(both, records) == planned_event(plain, records)
    with_both, without = deal(both, inputs), deal(plain, inputs)
    assert dict(with_both.silos) == dict(without.silos)
    assert with_both.public == without.public
    assert with_both.test == without.test


@pytest.mark.parametrize(
    ("method", "outer", "at"),
    [
        ("ffa-lora", NESTEROV, "absorb"),
        ("rolora", NESTEROV, "distil"),
        ("rolora", ADAM, "absorb"),
        ("lora", ADAM, "distil"),
    ],
    ids=["ffa-nesterov", "rolora-nesterov", "rolora-adam", "lora-adam"],
)
def test_killed_between_sum_and_step_the_adapters_are_the_same_bits(
    inputs, tmp_path, monkeypatch, method, outer, at
):
    """Round 4: the memory is that of three rounds, in RoLoRA of two of B and one of A."""
    changes = ("rounds=4", f"adapter.method={method}", outer, CENTRAL)
    run(inputs, tmp_path / "whole", *changes)
    real = getattr(ServerTuning, at)

    def killed(self, *arguments):
        if any(isinstance(found, int) and found == 3 for found in arguments):
            raise Killed
        return real(self, *arguments)

    monkeypatch.setattr(ServerTuning, at, killed)
    with pytest.raises(Killed):
        run(inputs, tmp_path / "cut", *changes)
    monkeypatch.setattr(ServerTuning, at, real)
    state = json.loads((tmp_path / "cut" / "server" / "state.json").read_text())
    assert state["round"] == 3
    assert state["opened"]
    run(inputs, tmp_path / "cut", *changes, resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_sgd_at_rate_one_is_fedavg_and_momentum_is_not(inputs, tmp_path):
    run(inputs, tmp_path / "plain")
    run(inputs, tmp_path / "one", "server.outer={optimizer: sgd, learning_rate: 1, momentum: 0}")
    run(inputs, tmp_path / "more", "server.outer={optimizer: sgd, learning_rate: 1}")
    assert same(tmp_path / "plain", tmp_path / "one")
    assert not same(tmp_path / "plain", tmp_path / "more")
    run(inputs, tmp_path / "baseline", NESTEROV, CENTRAL, distillation=False)
    assert same(tmp_path / "plain", tmp_path / "baseline")  # no part of the phase is left


def test_rolora_keeps_the_momentum_of_either_half_to_itself(inputs):
    """With no mean at all a half moves on by its own momentum, and the other one stays."""
    server = server_of(inputs, "adapter.method=rolora", NESTEROV)
    sizes = [server.update_size(round_) for round_ in (0, 1)]
    layouts = [server._slm.update_layout(round_) for round_ in (0, 1)]

    def halves():
        vector = dict(zip(*named(server), strict=True))
        return [np.concatenate([vector[n] for n in layout.names]) for layout in layouts]

    def moved(mean, round_):
        before = halves()
        server.absorb(mean.astype(np.float32), round_)
        return [after - start for after, start in zip(halves(), before, strict=True)]

    ones = [np.ones(size) * 0.01 for size in sizes]
    b, a = moved(ones[0], 0)
    np.testing.assert_allclose(b, 0.7 * 1.8 * 0.01, rtol=1e-4)
    assert not a.any()
    b, a = moved(np.zeros(sizes[1]), 1)  # B's momentum is none of A's
    assert not b.any()
    assert not a.any()
    b, a = moved(np.zeros(sizes[0]), 2)
    np.testing.assert_allclose(b, 0.7 * 0.8 * 0.8 * 0.01, rtol=1e-3)
    assert not a.any()
    b, a = moved(ones[1], 3)
    assert not b.any()
    np.testing.assert_allclose(a, 0.7 * 1.8 * 0.01, rtol=1e-2)


def named(server):
    """Names and flat values of the whole adapter."""
    layout = server._slm.broadcast_layout()
    ends = np.cumsum([int(np.prod(shape)) for shape in layout.shapes])[:-1]
    return layout.names, np.split(server.adapter(), ends)


def test_central_steps_learn_the_public_answers_and_use_no_other_row(inputs):
    steps = "server.central={steps: 60, batch_size: 8, learning_rate: 0.03}"
    server = server_of(inputs, steps)
    server.distil(0, silent)
    losses = server.measure()["central"]
    assert losses["last_loss"] < losses["first_loss"] - 0.1  # of the same eight rows
    # Rows without an answer, and whatever else the server has, change nothing.
    study = study_of(inputs, steps)
    answered = [q for q in deal(study, inputs).public if q.answer is not None]
    assert 0 < len(answered) < len(deal(study, inputs).public)
    other = ServerTuning(study, public=answered, data=inputs)
    other.distil(0, silent)
    np.testing.assert_array_equal(other.adapter(), server.adapter())
    fresh = server_of(inputs)
    fresh.distil(0, silent)
    assert not np.array_equal(fresh.adapter(), server.adapter())


def test_kept_rows_are_not_tuned_on(inputs):
    changes = (CENTRAL, "keep={rows: 5}")
    study = study_of(inputs, *changes)
    public = deal(study, inputs).public
    server = ServerTuning(study, public=public, data=inputs)
    assert len(server._central._rows) == study.task.data.public_labelled - 5
    assert len(server_of(inputs, CENTRAL)._central._rows) == study.task.data.public_labelled


def test_central_steps_without_answers_or_that_diverge_are_refused(inputs):
    study = study_of(inputs, CENTRAL)
    bare = [question.unlabelled() for question in deal(study, inputs).public]
    with pytest.raises(ConfigError, match=r"server.central: no public row has its answer"):
        ServerTuning(study, public=bare, data=inputs)
    with pytest.raises(ConfigError, match=r"--public: the server needs the study's public"):
        server_questions(study, None, None)
    assert server_questions(study_of(inputs), None, None) == ([], [])  # the control: FedAvg
    wild = server_of(inputs, "server.central={steps: 40, learning_rate: 1e29}")
    with pytest.raises(TrainingError, match=r"server.central, round 2: .*not finite") as caught:
        wild.distil(1, silent)
    assert caught.value.hint == "lower server.central.learning_rate"


def test_distillation_comes_after_the_parts(inputs):
    """FedCoLLM with central steps: the large model is distilled from the tuned small one."""
    changes = ("privacy=none", CENTRAL, "distillation.loss=mutual-kl")
    study = load_study(inputs / "tiny.yaml", list(changes))
    dealt = deal(study, inputs)
    order: list[str] = []
    server = ServerTuning(study, public=dealt.public, data=inputs)
    losses = server.distil(0, lambda done, total, text: order.append(text))
    assert list(dict.fromkeys(order)) == ["tuning on public rows", "distillation"]
    assert "last_loss_llm" in losses
    plain = ServerTuning(
        load_study(inputs / "tiny.yaml", [changes[0], changes[2]]),
        public=dealt.public,
        data=inputs,
    )
    assert plain.distil(0, silent)["first_loss_slm"] > losses["first_loss_slm"]


def test_every_part_has_its_control_among_the_rows(inputs, tmp_path):
    study = study_of(inputs, NESTEROV, CENTRAL, "rounds=1")
    plan = ExperimentPlan(out=tmp_path / "exp", seeds=1, workers=0, data=inputs)
    table = Experiment(study, plan).run(silent, lambda text: None)
    rows = {row["method"]: row for row in table["rows"]}
    names = ["zero-shot", "standalone", "central only", "FedAvg", "FedOpt", "FedOpt + central"]
    assert list(rows) == [*names, "centralized"]
    main = {row["less"] for row in table["differences"] if row["main"]}
    assert main == {"FedOpt", "central only"}
    assert {row["method"] for row in table["differences"]} == {"FedOpt + central"}

    def adapters_of(key):
        return tmp_path / "exp" / "seed-3" / key

    run(inputs, tmp_path / "both", NESTEROV, CENTRAL, "rounds=1")
    run(inputs, tmp_path / "outer", NESTEROV, "rounds=1")
    run(inputs, tmp_path / "plain", "rounds=1")
    assert same(adapters_of("federated"), tmp_path / "both")
    assert same(adapters_of("outer"), tmp_path / "outer")
    assert same(adapters_of("fedavg"), tmp_path / "plain")
    gold = [rows[name]["gold_log_prob"]["all"]["mean"] for name in rows]
    assert len(set(gold)) == len(gold)
    page = (tmp_path / "exp" / "table.md").read_text()
    assert "**FedOpt + central − central only**" in page
