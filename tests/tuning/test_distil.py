"""Distillation: every loss against float64 arithmetic written out, and what a phase does."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from securefedcollm.errors import ConfigError, TrainingError
from securefedcollm.tuning.adapters import attach, layout_of, load_vector, select, to_vector
from securefedcollm.tuning.choice_distil import (
    better_teacher,
    divergence,
    entropy_pooled,
    paced,
    predict,
    supervised_loss,
)
from securefedcollm.tuning.distil import DistilStep, distil
from securefedcollm.tuning.questions import EncodedQuestions, Scoring, choice_scores
from tests.support.plans import distil_plan

TAU = 1.7


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def xlogy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x * np.log(np.where(x > 0, y, 1)), 0)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((xlogy(p, p) - xlogy(p, q)).sum())


def reference(teacher: np.ndarray, scores: np.ndarray, direction: str) -> float:
    own = softmax(scores / TAU)
    if direction == "forward":
        return TAU**2 * kl(teacher, own)
    if direction == "reverse":
        return TAU**2 * kl(own, teacher)
    middle = (teacher + own) / 2
    return TAU**2 * (kl(teacher, middle) + kl(own, middle)) / 2


def numeric_slope(f: Any, scores: np.ndarray) -> np.ndarray:
    """Central differences of ``f`` in the finite scores."""
    out = np.zeros_like(scores)
    for at in np.argwhere(np.isfinite(scores)):
        up, down = scores.copy(), scores.copy()
        up[tuple(at)] += 1e-5
        down[tuple(at)] -= 1e-5
        out[tuple(at)] = (f(up) - f(down)) / 2e-5
    return out


def scores_with_a_missing_choice(seed: int) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(scale=2, size=(5, 4))
    scores[2, 3] = -np.inf
    return scores


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_divergence_and_its_gradient(direction: Any) -> None:
    scores, other = scores_with_a_missing_choice(0), scores_with_a_missing_choice(1)
    teacher = softmax(other / TAU)
    own = torch.tensor(scores, requires_grad=True)
    value = divergence(torch.tensor(teacher), own, TAU, direction)
    value.backward()
    assert value.item() == pytest.approx(reference(teacher, scores, direction), rel=1e-12)
    expected = numeric_slope(lambda s: reference(teacher, s, direction), scores)
    assert own.grad is not None
    np.testing.assert_allclose(own.grad.numpy(), expected, atol=1e-8)
    assert np.abs(expected).max() > 0.1


def test_divergence_vanishes_only_at_the_teacher() -> None:
    scores = torch.tensor(scores_with_a_missing_choice(0))
    teacher = torch.softmax(scores / TAU, -1)
    for direction in ("forward", "reverse", "js"):
        assert divergence(teacher, scores, TAU, direction).item() == pytest.approx(0, abs=1e-12)


def test_supervised_loss_ignores_unlabelled_rows() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 4))
    own = torch.tensor(scores, requires_grad=True)
    value = supervised_loss(own, torch.tensor([2, -1, 0]))
    value.backward()
    expected = -np.log(softmax(scores)[0, 2]) - np.log(softmax(scores)[2, 0])
    assert value.item() == pytest.approx(expected)
    assert own.grad is not None
    assert not own.grad[1].any()


def test_pooling_follows_the_surer_model() -> None:
    sure, unsure = [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]
    llm = np.array([sure, unsure, [0.4, 0.6, 0, 0]])
    slm = np.array([unsure, sure, [0.6, 0.4, 0, 0]])

    def entropy(p: np.ndarray) -> np.ndarray:
        return -xlogy(p, p).sum(-1)

    weight = 1 / (1 + np.exp(-3 * (entropy(slm) - entropy(llm))))[:, None]
    pooled = entropy_pooled(torch.tensor(llm), torch.tensor(slm)).numpy()
    np.testing.assert_allclose(pooled, weight * llm + (1 - weight) * slm, rtol=1e-12)
    np.testing.assert_allclose(pooled.sum(-1), 1)
    assert pooled[0, 0] > 0.9
    assert pooled[1, 0] > 0.9
    assert pooled[2, 0] == pytest.approx(0.5)


def test_the_better_model_teaches_alone() -> None:
    llm = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.9, 0.1]])
    slm = torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.2, 0.8], [0.4, 0.6]])
    answers = torch.tensor([0, 1, -1, -1])
    chosen = better_teacher(llm, slm, answers)
    assert torch.equal(chosen, torch.stack([llm[0], slm[1], slm[2], llm[3]]))


@pytest.mark.parametrize("loss", ["entropy-pooled", "dual-min-ce", "mutual-kl", "none"])
@pytest.mark.parametrize("direction", ["forward", "js"])
def test_one_step_is_the_written_out_step(toy: Any, loss: Any, direction: Any) -> None:
    """Autograd of float64 losses on copies of both models, and Adam's first step by hand."""
    data, models = half_labelled(toy), pair(toy)
    scored = data if loss != "none" else data.select(torch.arange(8))
    layouts = [layout_of(model, "ffa-lora") for model in models]
    copies = [copy.deepcopy(model).double() for model in models]
    scores = [choice_scores(model, scored).double() for model in copies]
    soft = [torch.softmax(s.detach() / TAU, -1).numpy() for s in scores]
    answers = scored.answers
    slopes = []
    for i, (model, layout) in enumerate(zip(copies, layouts, strict=True)):
        labels = max(1, int((answers >= 0).sum()))
        total = supervised_loss(scores[i], answers) / labels
        if loss != "none":
            teacher = {
                "entropy-pooled": entropy_pooled(*map(torch.tensor, soft)).numpy(),
                "dual-min-ce": better(soft, answers.numpy()),
                "mutual-kl": soft[1 - i],
            }[loss]
            apart = divergence(torch.tensor(teacher), scores[i], TAU, direction)
            total = total + 0.6 * apart / len(scored)
        found = torch.autograd.grad(total, select(model, layout))
        slopes.append(torch.cat([g.flatten() for g in found]).numpy())
    before = [to_vector(model, layout) for model, layout in zip(models, layouts, strict=True)]
    options = {"loss": loss, "direction": direction, "temperature": TAU, "weight": 0.6}
    run(toy, models, data, steps=1, **options)
    for model, layout, slope, start in zip(models, layouts, slopes, before, strict=True):
        clear = np.abs(slope) > 1e-4
        assert clear.mean() > 0.5
        moved = to_vector(model, layout) - start
        np.testing.assert_allclose(
            moved[clear], -1e-2 * (slope / (np.abs(slope) + 1e-8))[clear], rtol=1e-3
        )


def half_labelled(toy: Any, count: int = 16) -> EncodedQuestions:
    data = toy.encoded(count)
    answers = data.answers.clone()
    answers[count // 2 :] = -1
    return replace(data, answers=answers)


def pair(toy: Any) -> tuple[Any, Any]:
    """A larger and a smaller model with adapters that say something."""
    models = attach(toy.model(hidden=32), seed=1), attach(toy.model(seed=1), seed=1)
    for i, model in enumerate(models):
        layout = layout_of(model, "ffa-lora")
        values = np.random.default_rng(i).normal(scale=0.1, size=layout.size)
        load_vector(model, layout, values)
    return models


def run(
    toy: Any, models: tuple[Any, Any], data: EncodedQuestions, **options: Any
) -> list[DistilStep]:
    llm, slm = models
    steps: list[DistilStep] = []
    settings: dict[str, Any] = {
        "steps": 12,
        "batch_labelled": 8,
        "batch_unlabelled": 8,
        "learning_rate_llm": 1e-2,
        "learning_rate_slm": 1e-2,
        **options,
    }
    layouts, plan = (
        (layout_of(llm, "ffa-lora"), layout_of(slm, "ffa-lora")),
        distil_plan(**settings),
    )
    distil(models, layouts, (data, data), plan, seed=0, on_step=steps.append)
    return steps


def expected_first_losses(
    models: tuple[Any, Any],
    data: EncodedQuestions,
    loss: str,
    weight: float,
    sure: tuple[float, float] = (1.0, 1.0),
) -> list[float]:
    """(LLM, SLM) loss of a first step on the whole set, in float64."""
    with torch.no_grad():
        plain = [choice_scores(m, data).double().numpy() for m in models]
    scores = [s / t for s, t in zip(plain, sure, strict=True)]
    answers = data.answers.numpy()
    labelled = answers >= 0
    soft = [softmax(s / TAU) for s in scores]
    out = []
    for i in (0, 1):
        total = -np.log(softmax(scores[i])[labelled, answers[labelled]]).mean()
        if loss == "entropy-pooled":
            target = entropy_pooled(torch.tensor(soft[0]), torch.tensor(soft[1])).numpy()
            total += weight * TAU**2 * kl(target, soft[i]) / len(answers)
        elif loss == "dual-min-ce":
            total += weight * TAU**2 * kl(better(soft, answers), soft[i]) / len(answers)
        elif loss == "mutual-kl":
            total += weight * TAU**2 * kl(soft[1 - i], soft[i]) / len(answers)
        out.append(total)
    return out


def better(soft: list[np.ndarray], answers: np.ndarray) -> np.ndarray:
    """Question by question the prediction that is less wrong, or surer where no label is."""
    rows = []
    for llm, slm, answer in zip(*soft, answers, strict=True):
        wrong = [-np.log(p[answer]) if answer >= 0 else -xlogy(p, p).sum() for p in (llm, slm)]
        rows.append(llm if wrong[0] <= wrong[1] else slm)
    return np.array(rows)


@pytest.mark.parametrize("micro_batch", [256, 5])
@pytest.mark.parametrize("loss", ["entropy-pooled", "dual-min-ce", "mutual-kl", "none"])
def test_the_losses_of_a_step(toy: Any, loss: Any, micro_batch: int) -> None:
    data = half_labelled(toy)
    models = pair(toy)
    scored = data if loss != "none" else data.select(torch.arange(8))
    expected = expected_first_losses(models, scored, loss, weight=0.6)
    step = run(
        toy, models, data, steps=1, loss=loss, weight=0.6, temperature=TAU, micro_batch=micro_batch
    )[0]
    assert [step.loss_llm, step.loss_slm] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", ["entropy-pooled", "dual-min-ce", "mutual-kl"])
def test_each_model_is_as_sure_as_its_own_temperature_says(toy: Any, loss: Any) -> None:
    data, models, sure = half_labelled(toy), pair(toy), (3.0, 0.5)
    expected = expected_first_losses(models, data, loss, 0.6, sure)
    alike = expected_first_losses(models, data, loss, 0.6, (0.5, 0.5))
    (step,) = run(
        toy,
        models,
        data,
        steps=1,
        loss=loss,
        weight=0.6,
        temperature=TAU,
        scoring=Scoring(temperature=sure[1]),
        scoring_llm=Scoring(temperature=sure[0]),
    )
    assert [step.loss_llm, step.loss_slm] == pytest.approx(expected, rel=1e-4)
    assert [step.loss_llm, step.loss_slm] != pytest.approx(alike, rel=1e-2)  # the control


@pytest.mark.parametrize("loss", ["entropy-pooled", "dual-min-ce", "mutual-kl", "none"])
def test_a_phase_lowers_both_losses_and_is_deterministic(toy: Any, loss: Any) -> None:
    data = half_labelled(toy)
    ends = []
    for _ in range(2):
        models = pair(toy)
        bases = [m.get_base_model().lm_head.weight.clone() for m in models]
        steps = run(toy, models, data, loss=loss)
        assert steps[-1].loss_llm < 0.7 * steps[0].loss_llm
        assert steps[-1].loss_slm < 0.7 * steps[0].loss_slm
        assert all(
            torch.equal(b, m.get_base_model().lm_head.weight)
            for b, m in zip(bases, models, strict=True)
        )
        ends.append([to_vector(m, layout_of(m, "ffa-lora")) for m in models])
    for one, two in zip(*ends, strict=True):
        assert np.array_equal(one, two)


@pytest.mark.parametrize("loss", ["entropy-pooled", "dual-min-ce", "mutual-kl"])
@pytest.mark.parametrize("first", ["llm-first", "slm-first"])
def test_one_after_the_other(toy: Any, loss: Any, first: Any) -> None:
    """The second one learns from what the first has become; neither moves in the other's turn."""
    data, models, teaching = half_labelled(toy), pair(toy), 1 if first == "slm-first" else 0
    names = ("loss_llm", "loss_slm")
    start = expected_first_losses(models, data, loss, 0.6)
    options = {"loss": loss, "weight": 0.6, "temperature": TAU, "batch_unlabelled": 8}
    steps = run(toy, models, data, steps=1, order=first, **options)
    assert [step.step for step in steps] == [0, 1]
    taught, learnt = names[1 - teaching], names[teaching]
    assert getattr(steps[0], taught) is None
    assert getattr(steps[1], learnt) is None
    assert getattr(steps[0], learnt) == pytest.approx(start[teaching], rel=1e-4)

    # The first turn alone, and what the other one's loss is then, in float64.
    again = pair(toy)
    run(toy, again, data, steps=1, **options, **{f"learning_rate_{taught[5:]}": 1e-30})
    after = expected_first_losses(again, data, loss, 0.6)[1 - teaching]
    assert getattr(steps[1], taught) == pytest.approx(after, rel=1e-4)
    assert after != pytest.approx(start[1 - teaching], rel=1e-4)  # the control: together
    layout = layout_of(models[teaching], "ffa-lora")
    assert np.array_equal(to_vector(models[teaching], layout), to_vector(again[teaching], layout))


@pytest.mark.parametrize("loss", ["entropy-pooled", "dual-min-ce", "mutual-kl"])
def test_a_question_counts_by_how_undecided_the_learner_is(toy: Any, loss: Any) -> None:
    """p(1 - p), written out in float64, against the loss of a step on everything."""
    data, models = half_labelled(toy), pair(toy)
    answers = data.answers.numpy()
    with torch.no_grad():
        scores = [choice_scores(m, data).double().numpy() for m in models]
    soft = [softmax(s / TAU) for s in scores]
    expected = []
    for i in (0, 1):
        teacher = {
            "entropy-pooled": entropy_pooled(*map(torch.tensor, soft)).numpy(),
            "dual-min-ce": better(soft, answers),
            "mutual-kl": soft[1 - i],
        }[loss]
        right = np.where(answers >= 0, answers, teacher.argmax(-1))
        p = soft[i][np.arange(len(right)), right]
        weights = p * (1 - p) / (p * (1 - p)).mean()
        rows = [w * kl(t, q) for w, t, q in zip(weights, teacher, soft[i], strict=True)]
        known = answers >= 0
        supervised = -np.log(softmax(scores[i])[known, answers[known]]).mean()
        expected.append(supervised + 0.6 * TAU**2 * sum(rows) / len(rows))
    options = {"loss": loss, "weight": 0.6, "temperature": TAU, "steps": 1}
    (step,) = run(toy, models, data, weighting="paced", micro_batch=5, **options)
    assert [step.loss_llm, step.loss_slm] == pytest.approx(expected, rel=1e-4)
    (plain,) = run(toy, pair(toy), data, **options)
    assert plain.loss_slm != pytest.approx(expected[1], rel=1e-3)  # the control


def test_weights_of_a_model_that_is_sure_of_everything() -> None:
    sure = torch.eye(3)
    assert torch.equal(paced(sure, sure, torch.tensor([0, 1, -1])), torch.ones(3))


def test_knowledge_crosses_on_prompts_without_answers(toy: Any) -> None:
    """What the mission rests on: an unlabelled prompt carries what only one model knew."""
    data = replace(toy.encoded(16), answers=torch.full((16,), -1))
    llm, slm = pair(toy)
    slm_says = predict(slm, data)
    before = kl(slm_says.double().numpy(), predict(llm, data).double().numpy())
    run(toy, (llm, slm), data, steps=40, loss="mutual-kl", learning_rate_slm=1e-12)
    after = kl(slm_says.double().numpy(), predict(llm, data).double().numpy())
    assert after < before / 5


def test_pooled_targets_stay_frozen_through_the_phase(toy: Any) -> None:
    """With a zero rate for one model, the other still moves to the pool, not to its peer."""
    data = replace(toy.encoded(16), answers=torch.full((16,), -1))
    llm, slm = pair(toy)
    pool = entropy_pooled(predict(llm, data), predict(slm, data))
    run(
        toy,
        (llm, slm),
        data,
        steps=60,
        batch_unlabelled=16,
        learning_rate_llm=2e-2,
        learning_rate_slm=2e-2,
    )
    for model in (llm, slm):
        assert (predict(model, data) - pool).abs().mean() < 0.05


def test_refusals(toy: Any) -> None:
    models = pair(toy)
    unlabelled = toy.encoded(8, labelled=False)
    with pytest.raises(ConfigError, match=r"distillation.loss: the public set has nothing"):
        run(toy, models, unlabelled, loss="none")
    with pytest.raises(ConfigError, match="every batch would be empty"):
        run(toy, models, unlabelled, batch_unlabelled=0)
    layouts = layout_of(models[0], "ffa-lora"), layout_of(models[1], "ffa-lora")
    plan = distil_plan(
        steps=1,
        batch_labelled=1,
        batch_unlabelled=1,
        learning_rate_llm=1e-2,
        learning_rate_slm=1e-2,
    )
    with pytest.raises(ConfigError, match="different public questions"):
        distil(models, layouts, (unlabelled, toy.encoded(8)), plan, seed=0)
    weight = models[0].get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="loss of step 0 is not finite"):
        run(toy, models, half_labelled(toy), loss="none")
