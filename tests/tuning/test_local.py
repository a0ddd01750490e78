"""Local tuning: DP-SGD against hand-written references, determinism, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from transformers import GPT2Config, GPT2LMHeadModel

from securefedcollm.errors import ConfigError, DataError, TrainingError
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.privacy.noise import GridSum, NoiseSource, grid_step
from securefedcollm.tuning.adapters import (
    attach,
    layout_of,
    load_vector,
    select,
    to_vector,
)
from securefedcollm.tuning.local import sampled_gradients, train_dp, train_plain
from securefedcollm.tuning.per_record import (
    per_record_gradients,
    question_losses,
    watched,
    without_broken,
)
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.questions import PLAIN, EncodedQuestions
from tests.support.gradients import CLIP, adapted, clipped, single_gradients
from tests.support.plans import protection, train_plan


def batch_gradients(model: Any, method: str, data: EncodedQuestions, loss: str) -> np.ndarray:
    """float64 [N, d]: all records' gradients from one backward pass."""
    parameters = select(model, layout_of(model, method))
    model.train()
    with watched(model) as calls:
        losses = question_losses(model, data, loss, PLAIN)
        found = per_record_gradients(losses, parameters, calls)
    assert not calls
    return torch.cat([g.flatten(1) for g in found], 1).double().numpy()


@pytest.mark.parametrize("loss", ["answer", "choices"])
@pytest.mark.parametrize("method", ["ffa-lora", "rolora", "lora", "prompt", "prefix"])
def test_per_record_gradients_equal_a_loop_over_records(toy: Any, method: Any, loss: Any) -> None:
    data = toy.encoded(7)
    model = adapted(toy, method)
    expected = single_gradients(model, method, data, loss)
    found = batch_gradients(model, method, data, loss)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)
    assert np.linalg.norm(expected, axis=1).max() > 0.5


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # opacus, on numbers of tokens
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_per_record_gradients_equal_those_of_opacus(toy: Any, method: Any) -> None:
    data, model = toy.encoded(7), adapted(toy, method)
    found = batch_gradients(model, method, data, "answer")
    parameters = select(model, layout_of(model, method))
    model.get_base_model().enable_input_require_grads()  # its hooks want it
    opacus = GradSampleModule(model, loss_reduction="sum")
    question_losses(model, data, "answer", PLAIN).sum().backward()
    theirs = torch.cat([p.grad_sample.flatten(1) for p in parameters], 1).double().numpy()
    opacus.remove_hooks()
    np.testing.assert_allclose(found, theirs, atol=1e-6, rtol=1e-5)


def test_a_weight_that_is_used_twice_gets_both_gradients() -> None:
    layer = torch.nn.Linear(3, 2, bias=False)
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    with watched(layer) as calls:
        losses = (layer(x) ** 2).sum((1, 2)) + layer(2 * x).sum((1, 2))
        (found,) = per_record_gradients(losses, [layer.weight], calls)
    for i in range(4):
        layer.zero_grad()
        ((layer(x[i]) ** 2).sum() + layer(2 * x[i]).sum()).backward()
        torch.testing.assert_close(found[i], layer.weight.grad)


def test_a_layer_that_sees_tokens_without_their_records_is_refused() -> None:
    """Adversary: a model whose adapter sits on routed experts: no gradient there is one record's,
    and clipping per row would clip tokens."""
    layer = torch.nn.Linear(3, 2, bias=False)
    with watched(layer) as calls:
        losses = layer(torch.ones(4 * 5, 3)).view(4, 10).sum(1)
        with pytest.raises(TrainingError, match="mixes the tokens of records"):
            per_record_gradients(losses, [layer.weight], calls)


class Silent(NoiseSource):
    """Real Poisson samples, no noise: to see what the noise hides."""

    def add_gaussian(self, total: np.ndarray, sigma: float) -> np.ndarray:
        return total * grid_step(sigma)


def one_noiseless_step(
    toy: Any, data: EncodedQuestions, method: Any = "ffa-lora", **options: Any
) -> np.ndarray:
    """The delta of one SGD step of rate 1 on every unit, without noise."""
    model, subjects = adapted(toy, method), options.pop("subjects", None)
    settings = {"batch_size": len(data), **options}
    plan = train_plan(steps=1, learning_rate=1.0, optimizer="sgd", **settings)
    layout, noise = layout_of(model, method), Silent(bytes(32))
    return train_dp(
        model, layout, data, plan, protection(CLIP), noise=noise, subjects=subjects
    ).delta


@pytest.mark.parametrize("method", ["ffa-lora", "prompt", "prefix"])
@pytest.mark.parametrize("micro_batch", [2, 64])
def test_a_noiseless_step_is_the_hand_clipped_mean(toy: Any, micro_batch: int, method: Any) -> None:
    data = toy.encoded(9)
    gradients = single_gradients(adapted(toy, method), method, data, "answer")
    assert (np.linalg.norm(gradients, axis=1) > CLIP).sum() >= 2  # the clip has work to do
    expected = -clipped(gradients).sum(0) / len(data)
    delta = one_noiseless_step(toy, data, method, micro_batch=micro_batch)
    np.testing.assert_allclose(delta, expected, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [2, 64])
def test_a_subject_is_clipped_as_a_whole(toy: Any, micro_batch: int) -> None:
    data = toy.encoded(9)
    subjects = ["ada", "bob", "ada", "cy", "ada", "bob", "di", "ada", "cy"]
    gradients = single_gradients(adapted(toy), "ffa-lora", data, "answer")
    names = sorted(set(subjects))
    sums = np.array([gradients[[s == n for s in subjects]].sum(0) for n in names])
    delta = one_noiseless_step(toy, data, batch_size=4, subjects=subjects, micro_batch=micro_batch)
    np.testing.assert_allclose(delta, -clipped(sums).sum(0) / 4, atol=1e-5)


@pytest.mark.parametrize("protected", ["subject", "record"])
def test_a_subject_s_whole_influence_on_the_sum_is_at_most_the_clip(
    toy: Any, protected: str
) -> None:
    """Adversary: knows all but one person's records. Clipped one by one, five records of one
    person move the sum by more than C: the same check fails where the record is the unit."""
    data = toy.encoded(9)
    subjects = ["ada", "bob", "ada", "cy", "ada", "bob", "di", "ada", "ada"]
    others = [i for i, name in enumerate(subjects) if name != "ada"]

    def summed(rows: list[int]) -> np.ndarray:
        names = [subjects[row] for row in rows] if protected == "subject" else None
        units = len(set(names)) if names else len(rows)
        chosen = data.select(torch.tensor(rows))
        return units * one_noiseless_step(toy, chosen, batch_size=units, subjects=names)

    influence = np.linalg.norm(summed(list(range(9))) - summed(others))
    if protected == "subject":
        assert 0.99 * CLIP < influence < CLIP * (1 + 1e-5)
    else:
        assert influence > 1.2 * CLIP


def gpt2_with_dropout() -> Any:
    """A tiny GPT-2 with the dropout that its configuration has by default, in training mode."""
    config = GPT2Config(vocab_size=22, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    assert config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == 0.1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    return attach(model.train(), method="ffa-lora", rank=2, alpha=4, targets=["c_attn"], seed=1)


def dp_sgd_sum(model: Any, data: EncodedQuestions, clip: float) -> np.ndarray:
    """One step's Σ of clipped gradients in :func:`train_dp`, every record taken."""
    plan = train_plan(steps=1, batch_size=len(data), learning_rate=1.0, optimizer="sgd")
    layout, noise = layout_of(model, "ffa-lora"), Silent(bytes(32))
    result = train_dp(model, layout, data, plan, protection(clip), noise=noise)
    return -len(data) * result.delta.astype(np.float64)


def joint_sum(model: Any, data: EncodedQuestions, clip: float) -> np.ndarray:
    """The same of :func:`sampled_gradients`."""
    layout = layout_of(model, "ffa-lora")
    rows = list(sampled_gradients(model, layout, data, LossPlan(), q=1.0, noise=Silent(bytes(32))))
    return sum(row * min(1.0, clip / np.linalg.norm(row)) for row in rows)


@pytest.mark.soak
@pytest.mark.parametrize("summed", [dp_sgd_sum, joint_sum])
def test_a_record_moves_the_sum_by_at_most_the_clip_whatever_the_base_s_dropout(
    toy: Any, summed: Any
) -> None:
    """Adversary: knows all records but one, and the study's public seed. Masks that were drawn for
    a whole batch would be other masks for every record with one record more or less."""
    data, model = toy.encoded(33), gpt2_with_dropout()
    layout, noise = layout_of(model, "ffa-lora"), NoiseSource(bytes(32))
    rows = list(sampled_gradients(model, layout, data, LossPlan(), q=1.0, noise=noise))
    clip = float(np.min(np.linalg.norm(rows, axis=1))) / 2  # every record is clipped
    first = data.select(torch.arange(1, len(data)))
    difference = summed(gpt2_with_dropout(), data, clip) - summed(gpt2_with_dropout(), first, clip)
    assert 0.999 * clip < np.linalg.norm(difference) <= clip * (1 + 1e-5)


class Recorded(NoiseSource):
    """A noise source that remembers what it gave out."""

    def __init__(self) -> None:
        super().__init__(bytes(range(32)))
        self.batches: list[np.ndarray] = []
        self.noise: list[np.ndarray] = []

    def poisson_batch(self, n_records: int, q: float) -> np.ndarray:
        self.batches.append(super().poisson_batch(n_records, q))
        return self.batches[-1]

    def add_gaussian(self, total: np.ndarray, sigma: float) -> np.ndarray:
        noised = super().add_gaussian(total, sigma)
        self.noise.append(noised / sigma - total * grid_step(1.0))
        return noised


def test_noise_sampling_and_expected_batch(toy: Any) -> None:
    """Two SGD steps with real noise equal the formula, down to an empty batch."""
    data = toy.encoded(6)
    model = adapted(toy)
    layout = layout_of(model, "ffa-lora")
    noise, z, rate, batch = Recorded(), 1.5, 0.05, 1
    plan = train_plan(steps=6, batch_size=batch, learning_rate=rate, optimizer="sgd")
    result = train_dp(model, layout, data, plan, protection(CLIP, z), noise=noise)
    assert result.events == (PoissonGaussian(q=1 / 6, noise_multiplier=z, steps=6),)
    assert any(len(rows) == 0 for rows in noise.batches)  # steps on noise alone are taken too
    assert any(len(rows) > 1 for rows in noise.batches)
    reference = adapted(toy)
    for rows, draw in zip(noise.batches, noise.noise, strict=True):
        gradient = z * CLIP * draw
        if len(rows):
            chosen = data.select(torch.from_numpy(rows))
            gradient += clipped(single_gradients(reference, "ffa-lora", chosen, "answer")).sum(0)
        load_vector(reference, layout, to_vector(reference, layout) - rate * gradient / batch)
    np.testing.assert_allclose(
        to_vector(model, layout), to_vector(reference, layout), atol=1e-5, rtol=1e-4
    )
    assert len(noise.noise) == 6


def plain(toy: Any, data: EncodedQuestions, **options: Any) -> tuple[Any, np.ndarray]:
    model = adapted(toy)
    other = {"seed": options.pop("seed", 3), "max_grad_norm": options.pop("max_grad_norm", None)}
    plan = train_plan(**{"steps": 5, "batch_size": 4, "learning_rate": 1e-2, **options})
    return model, train_plain(model, layout_of(model, "ffa-lora"), data, plan, **other).delta


def test_plain_tuning_is_deterministic_and_lowers_the_loss(toy: Any) -> None:
    data = toy.encoded(12)
    before = question_losses(adapted(toy), data, "answer", PLAIN).mean().item()
    model, delta = plain(toy, data, steps=30)
    assert question_losses(model, data, "answer", PLAIN).mean().item() < before - 0.5
    assert np.array_equal(delta, plain(toy, data, steps=30)[1])
    assert not np.array_equal(delta, plain(toy, data, steps=30, seed=4)[1])


def test_micro_batches_change_nothing_but_rounding(toy: Any) -> None:
    data = toy.encoded(12)
    whole = plain(toy, data, batch_size=12, optimizer="sgd")[1]
    parts = plain(toy, data, batch_size=12, optimizer="sgd", micro_batch=5)[1]
    np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_gradient_norm_is_limited_on_request(toy: Any) -> None:
    data = toy.encoded(12)
    options = {"steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "batch_size": 12}
    assert np.linalg.norm(plain(toy, data, **options)[1]) > 0.05
    limited = plain(toy, data, **options, max_grad_norm=0.05)[1]
    assert np.linalg.norm(limited) == pytest.approx(0.05, rel=1e-3)


def test_dropout_is_seeded_and_the_global_generator_is_put_back(toy: Any) -> None:
    data = toy.encoded(12)

    def tune(global_seed: int) -> np.ndarray:
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        model = attach(toy.model(), seed=1, dropout=0.3)
        plan = train_plan(steps=3, batch_size=4, learning_rate=1e-2)
        result = train_plain(model, layout_of(model, "ffa-lora"), data, plan, seed=3)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert not model.training
        return result.delta

    assert np.array_equal(tune(1), tune(2))


def test_a_tuned_model_keeps_no_trace_of_records(toy: Any) -> None:
    """Per-record gradients must not stay behind in the model that is kept or sent."""
    model = adapted(toy)
    dp(toy, model, toy.encoded(6), batch_size=3)
    for parameter in model.parameters():
        assert parameter.grad is None
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def dp(toy: Any, model: Any, data: EncodedQuestions, **options: Any) -> None:
    subjects = options.pop("subjects", None)
    plan = train_plan(**{"steps": 2, "batch_size": 6, "learning_rate": 1e-2, **options})
    layout, noise = layout_of(model, "ffa-lora"), NoiseSource(bytes(32))
    train_dp(model, layout, data, plan, protection(CLIP), noise=noise, subjects=subjects)


def test_nan_is_refused(toy: Any) -> None:
    broken = adapted(toy)
    weight = broken.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="weights that are not finite") as caught:
        dp(toy, broken, toy.encoded(6))
    assert "learning_rate" in caught.value.hint
    with pytest.raises(TrainingError, match="weights that are not finite"):
        train_plain(
            broken,
            layout_of(broken, "ffa-lora"),
            toy.encoded(6),
            train_plan(steps=1, batch_size=6, learning_rate=1e-2),
            seed=0,
        )
    assert not any(m._forward_hooks for m in broken.modules())  # cleaned up after the failure


def test_no_record_decides_whether_private_training_fails() -> None:
    """Adversary: a server whose adapter makes single records overflow. They count as zero."""
    gradients = torch.tensor([[3.0, 4.0], [torch.inf, 1.0], [torch.nan, 0.0], [0.3, 0.4]])
    first, second = gradients[:, :1, None], gradients[:, 1:, None]  # two parameters [1, 1]
    blocks, norms = without_broken([part.flatten(1).double().numpy() for part in (first, second)])
    total = GridSum(2, clip_norm=1.0, sigma=1.0, most=4)
    total.add(blocks, norms)
    np.testing.assert_allclose(total.integers * grid_step(1.0), [0.6 + 0.3, 0.8 + 0.4], rtol=1e-6)


def test_an_overflowing_step_is_refused(toy: Any) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        plain(toy, toy.encoded(6), learning_rate=3e38, optimizer="sgd")


def test_a_detached_adapter_is_noticed(toy: Any) -> None:
    """An adapter that the forward pass does not use would be sent as pure noise."""
    model = adapted(toy)
    with model.disable_adapter(), pytest.raises(TrainingError, match="got no per-record gradient"):
        dp(toy, model, toy.encoded(6))


def test_bad_arguments_are_refused(toy: Any) -> None:
    with pytest.raises(ConfigError, match=r"local.batch_size: an expected batch of 7 needs"):
        dp(toy, adapted(toy), toy.encoded(6), batch_size=7)
    with pytest.raises(DataError, match="an answer to every question"):
        dp(toy, adapted(toy), toy.encoded(6, labelled=False))
    with pytest.raises(DataError, match="an answer to every question"):
        plain(toy, toy.encoded(6, labelled=False))
    with pytest.raises(ValueError, match="one name per record"):
        dp(toy, adapted(toy), toy.encoded(6), subjects=["a"])
    with pytest.raises(TrainingError, match="tuning changed nothing"):
        plain(toy, toy.encoded(6), steps=0)
