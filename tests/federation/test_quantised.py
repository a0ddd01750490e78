"""Quantised bases and checkpointing through the roles: keys, refusals, whole runs, the audit.

What needs bitsandbytes is skipped without it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from securefedcollm_audits.privacy.coupling import audit
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.federation import tuned as tuned_models
from securefedcollm.federation.cotuning import ServerTuning, SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.estimate import estimate
from securefedcollm.federation.export import model_card, task_contract
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import silent
from securefedcollm.study import Study, digest, load_study
from securefedcollm.tuning.models import load_model
from securefedcollm.tuning.quantised import QuantisedLinear, quiet_bitsandbytes
from tests.support.inputs import invoke, make_inputs, tuned
from tests.support.small import small_study

needed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_peft.py"
BOTH = ("models.llm.quantization=int8", "models.slm.quantization=nf4")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def study_of(inputs: Path, *changes: str) -> Study:
    return load_study(inputs / "tiny.yaml", list(changes))


def test_a_study_without_the_keys_keeps_its_digest(inputs: Path) -> None:
    plain = study_of(inputs)
    spelt = study_of(inputs, "models.slm.quantization=none", "models.llm.checkpointing=false")
    assert digest(spelt) == digest(plain)
    assert "quantization" not in plain.tree["models"]["slm"]
    others = [study_of(inputs, one) for one in (*BOTH, "models.llm.checkpointing=true")]
    assert len({digest(plain), *map(digest, others)}) == 4
    assert others[1].tree["models"]["slm"]["quantization"] == "nf4"


CHAIN = (
    "continue={earlier: [{run: r, study: '%s', entries: 1, root: '%s', scale: 2.0, slm: '%s'}]}"
    % (3 * ("0" * 64,))
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("models.slm.quantization=int4",), r"models\.slm\.quantization: .*int4"),
        (
            ("adapter={method: full}", "models.llm=none", "distillation={}", BOTH[1]),
            r"models\.slm\.quantization: rounded weights are frozen",
        ),
        ((CHAIN, BOTH[1]), r"models\.slm\.quantization: rounding to nf4 would round an earlier"),
        (
            ("adapter={method: prefix}", "models.llm.checkpointing=true"),
            r"models\.llm\.checkpointing: the library drops a prefix",
        ),
        (
            ("models.slm.checkpointing=true",),
            r"models\.slm\.checkpointing: gradients of single records do not use it",
        ),
        (
            (
                *("task={kind: own}", "adapter={}", "distillation={}", "privacy=null"),
                "models={slm: {source: 'own:x', quantization: nf4}}",
            ),
            r"models\.slm\.quantization: a study with own training code has none",
        ),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(
    inputs: Path, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        study_of(inputs, *changes)
    assert caught.value.hint


def test_an_earlier_adapter_of_the_other_model_is_no_obstacle(inputs: Path) -> None:
    study_of(inputs, CHAIN, BOTH[0])


@pytest.mark.parametrize("role", ["llm", "slm"])
def test_a_machine_without_the_package_refuses_before_it_loads(
    inputs: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(tuned_models, "load_model", never)
    study = study_of(inputs, *BOTH)
    with pytest.raises(ConfigError, match=rf"^models\.{role}\.quantization: .* bitsandbytes"):
        Tuned.load(study, getattr(study.models, role), data=inputs)


def test_an_estimate_counts_the_bits(inputs: Path) -> None:
    """Both keys lower what the roles need; the model is built without weights."""
    plain, small = (estimate(study_of(inputs, *keys), inputs) for keys in ((), BOTH))
    assert small["llm"]["weights_bytes"] < 0.4 * plain["llm"]["weights_bytes"]
    assert small["slm"]["weights_bytes"] < 0.4 * plain["slm"]["weights_bytes"]
    assert small["memory_bytes"]["server"] < plain["memory_bytes"]["server"]
    less = estimate(study_of(inputs, "models.llm.checkpointing=true"), inputs)
    activations = "activation_bytes_per_record"
    assert less["llm"][activations] < plain["llm"][activations]
    assert less["slm"] == plain["slm"]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_card_says_how_to_round_the_base(inputs: Path, kind: str) -> None:
    study = study_of(inputs, f"models.slm.quantization={kind}")
    contract = task_contract(study, study.models.slm, b"b" * 32, chat=False)
    assert contract["base"]["quantization"] == kind
    card = model_card(study, contract)
    assert "BitsAndBytesConfig(load_in_" in card
    assert "quantization_config=rounded" in card
    compile(card.partition("```python\n")[2].partition("```")[0], "card", "exec")
    plain = task_contract(study_of(inputs), study_of(inputs).models.slm, b"b" * 32, chat=False)
    assert "quantization" not in plain["base"]


@needed
def test_the_digest_is_that_of_the_files(inputs: Path) -> None:
    file = load_model("path:slm", base_dir=inputs).digest
    study = study_of(inputs, BOTH[1], f"models.slm.sha256='{file}'")
    found = Tuned.load(study, study.models.slm, data=inputs)
    assert found.base_digest.hex() == file
    assert any(isinstance(module, QuantisedLinear) for module in found.model.modules())
    plain = Tuned.load(study_of(inputs), study_of(inputs).models.slm, data=inputs)
    assert plain.frozen_digest == plain.base_digest != found.frozen_digest


@needed
@pytest.mark.parametrize(
    "privacy",
    [
        "privacy=null",
        "privacy={epsilon: 8, delta: 1e-5}",
        "privacy={epsilon: 8, delta: 1e-5, unit: silo, noise: distributed}",
    ],
)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_round_of_every_placement(inputs: Path, kind: str, privacy: str) -> None:
    both = [f"models.{name}.quantization={kind}" for name in ("llm", "slm")]
    study = study_of(inputs, privacy, *both, "models.llm.checkpointing=true", CLIP)
    dealt = deal(study, inputs)
    name, records = next(iter(dealt.silos.items()))
    silo = SiloTuning(study, name, records, data=inputs)
    server = ServerTuning(study, public=dealt.public, test=dealt.test, data=inputs)
    server.absorb(silo.fit(server.adapter(), 0, silent), 0)
    before = server.adapter()
    losses = server.distil(0, silent)
    assert set(losses) > {"first_loss_llm", "last_loss_slm"}
    assert all(map(np.isfinite, losses.values()))
    assert not np.array_equal(server.adapter(), before)


CLIP = "aggregation.clip_norm=1"


@needed
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_audit_of_coupling_finds_nothing_and_its_control_does(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    directory = tmp_path_factory.mktemp("small")
    study = small_study(
        directory,
        rounds=1,
        models={"slm": {"source": "path:slm", "quantization": kind}},
        local={
            "steps": 1,
            "batch_size": 40,
            "learning_rate": 1.0,
            "optimizer": "sgd",
            "loss": "choices",
            "micro_batch": 32,
        },
        privacy={"epsilon": 1, "delta": 1e-5},
    )
    finding = audit(study, data=directory, records=30, adapters=20, seed=3)
    assert finding.held
    assert finding.figures["moved, mixed records"] == 0
    assert finding.figures["moved, copies of one record"] == 0
    assert finding.figures["control, any adapter"] > 0.5


@needed
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_its_evaluation_and_its_merged_model_agree(
    inputs: Path, tmp_path: Path, kind: str
) -> None:
    test = tuned(inputs, tmp_path / "run", models={"slm": {"quantization": kind}})
    run = ["--run", tmp_path / "run", "--data", inputs, "--role", "slm"]
    told = invoke("model", "evaluate", *run, "--json")["all"]
    base = invoke("model", "evaluate", *run, "--base", "--json")["all"]
    assert base["accuracy"] != told["accuracy"]  # else the adapter could be left out unseen
    invoke("model", "merge", *run, "--out", tmp_path / "whole", "--json")
    whole = ["--model", tmp_path / "whole", "--test", test]
    assert invoke("model", "evaluate", *whole, "--json")["all"]["accuracy"] == told["accuracy"]
    goes_on = ["study", "continue", tmp_path / "run", "--out", tmp_path / "next.yaml"]
    refused = CliRunner().invoke(app, [str(word) for word in goes_on])
    assert "models.slm.quantization: rounding" in str(refused.exception)
    goes_on += ["--set", "models.slm.quantization=none"]
    assert CliRunner().invoke(app, [str(word) for word in goes_on]).exit_code == 0
    assert load_study(tmp_path / "next.yaml").models.slm.quantization == "none"
    if kind == "nf4":  # the package's own layer takes no such narrow ones on some processors
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings(), quiet_bitsandbytes():
        warnings.simplefilter("ignore")
        example = runpy.run_path(str(EXAMPLE))["main"]
        example(*map(str, (tmp_path / "run" / "adapters" / "slm", inputs / "slm", test)))
    assert json.loads(said.getvalue())["accuracy"] == pytest.approx(told["accuracy"], abs=0.1)
