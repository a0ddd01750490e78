"""Virtual tokens through the roles' workloads: sizes that are promised, saved, taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation.cotuning import ServerTuning, SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.estimate import estimate
from securefedcollm.federation.sizes import update_values
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import silent
from securefedcollm.study import Study, load_study
from securefedcollm.tuning.adapters import load_vector, to_vector
from tests.support.inputs import make_inputs

METHODS = ["prompt", "prefix"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def study_of(inputs: Path, method: str, *changes: str) -> Study:
    adapter = f"adapter={{method: {method}, virtual_tokens: 3}}"
    return load_study(inputs / "tiny.yaml", [adapter, *changes])


@pytest.mark.parametrize("method", METHODS)
def test_the_sizes_that_are_promised_are_those_that_are_sent(inputs: Path, method: str) -> None:
    study = study_of(inputs, method)
    tuned = Tuned.load(study, study.models.slm, data=inputs)
    size = tuned.update_layout(0).size
    assert size == tuned.broadcast_layout().size == 3 * (16 if method == "prompt" else 2 * 2 * 16)
    assert update_values(study, inputs) == size
    told = estimate(study, inputs)
    assert (told["slm"]["update_values"], told["slm"]["broadcast_values"]) == (size, size)
    assert told["llm"]["adapter_values"] == 2 * size  # it is twice as wide
    assert tuned.layout_digest(0) == tuned.layout_digest(1)


@pytest.mark.parametrize("method", METHODS)
def test_saved_virtual_tokens_are_taken_up_again_bit_for_bit(
    inputs: Path, tmp_path: Path, method: str
) -> None:
    """What a resumed run does."""
    study = study_of(inputs, method)
    one, two = (Tuned.load(study, study.models.slm, data=inputs) for _ in range(2))
    layout = one.broadcast_layout()
    load_vector(one.model, layout, np.random.default_rng(0).normal(size=layout.size))
    one.save(tmp_path / "slm")
    two.load_adapter(tmp_path / "slm")
    assert np.array_equal(to_vector(one.model, layout), to_vector(two.model, layout))
    contract = json.loads((tmp_path / "slm" / "task.json").read_text())
    assert contract["study_sha256"] == study.digest.hex()
    longer = load_study(inputs / "tiny.yaml", [f"adapter={{method: {method}, virtual_tokens: 4}}"])
    with pytest.raises(StateError, match="prompt_embeddings has shape"):
        Tuned.load(longer, longer.models.slm, data=inputs).load_adapter(tmp_path / "slm")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "privacy",
    [
        "privacy=null",
        "privacy={epsilon: 8, delta: 1e-5}",
        "privacy={epsilon: 8, delta: 1e-5, unit: silo, noise: distributed}",
    ],
)
def test_a_round_of_every_placement(inputs: Path, method: str, privacy: str) -> None:
    study = study_of(inputs, method, privacy, "aggregation.clip_norm=1")
    dealt = deal(study, inputs)
    name, records = next(iter(dealt.silos.items()))
    silo = SiloTuning(study, name, records, data=inputs)
    server = ServerTuning(study, public=dealt.public, test=dealt.test, data=inputs)
    start = server.adapter()
    update = silo.fit(start, 0, silent)
    assert update.shape == start.shape == (silo.update_size(0),)
    server.absorb(update, 0)
    before = server.adapter()
    losses = server.distil(0, silent)
    assert all(np.isfinite(value) for value in losses.values())
    assert not np.array_equal(server.adapter(), before)


def test_a_transfer_leaves_the_small_models_prompt_as_the_silos_made_it(inputs: Path) -> None:
    study = study_of(inputs, "prompt", "distillation.loss=transfer")
    dealt = deal(study, inputs)
    server = ServerTuning(study, public=dealt.public, test=dealt.test, data=inputs)
    before, large = server.adapter(), _large(server)
    server.distil(0, silent)
    assert np.array_equal(server.adapter(), before)
    assert not np.array_equal(_large(server), large)


def _large(server: Any) -> np.ndarray:
    llm = server._llm
    return to_vector(llm.model, llm.broadcast_layout())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("distillation.over=answer", "distillation.over: a transfer compares what the models say"),
        ("distillation.change=2", "distillation.change: expected `float` <= 1"),
    ],
)
def test_what_a_transfer_cannot_do_is_refused(inputs: Path, change: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        study_of(inputs, "prompt", "distillation.loss=transfer", change)
    assert str(caught.value).startswith(says)


def test_a_change_without_a_transfer_is_refused(inputs: Path) -> None:
    with pytest.raises(ConfigError, match=r"distillation.change: loss: entropy-pooled compares no"):
        study_of(inputs, "prompt", "distillation.change=0.2")
