"""Every family's choices score as one pass for each says, or the family is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
)

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.tuning.adapters import attach, full_layout, layout_of, select
from securefedcollm.tuning.frozen import with_prefix
from securefedcollm.tuning.independence import bits, made_up_adapter
from securefedcollm.tuning.local import check_records, records_of, train_dp, train_plain
from securefedcollm.tuning.packing import ANY_LENGTH, check_model, row_limit
from securefedcollm.tuning.per_record import question_losses
from securefedcollm.tuning.plans import LossPlan
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import PLAIN, choice_scores
from securefedcollm.tuning.recipe import evaluation_mode, inference_mode
from tests.support.packed import (
    FAMILIES,
    HEADS,
    WINDOW,
    Numbers,
    encoded,
    made,
    questions,
)
from tests.support.plans import protection, train_plan


def one_pass_each(model: Any, asked: list[Question]) -> torch.Tensor:
    """Scores by the model's own forward pass: no mask, no padding, nothing of ours."""
    read = Numbers()
    rows = []
    for question in asked:
        scores = []
        for choice in question.choices:
            prompt, rest = read([question.prompt, choice])["input_ids"]
            logits = model(input_ids=torch.tensor([prompt + rest]), use_cache=False).logits[0]
            log_p = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
            scores.append(log_p.gather(1, torch.tensor(rest)[:, None]).sum())
        rows.append(torch.stack(scores))
    return torch.stack(rows)


@pytest.mark.parametrize("longest", [6, 3 * WINDOW])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_one_pass_for_each_choice(name: str, longest: int) -> None:
    """Wrong before, without a word: the choice packed before was seen (LFM2, Mamba), distances were
    those in the row (ALiBi), and the window was not applied (Gemma 3, Mistral)."""
    model = made(name)
    assert row_limit(model) == FAMILIES[name][1]
    with inference_mode(model):
        found = choice_scores(model, encoded(longest))
        wanted = one_pass_each(model, questions(longest))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_the_window_matters_in_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("gemma3")
    with inference_mode(model):
        right = choice_scores(model, encoded(3 * WINDOW))
        monkeypatch.setattr("securefedcollm.tuning.questions.row_limit", lambda model: ANY_LENGTH)
        assert (choice_scores(model, encoded(3 * WINDOW)) - right).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["opt", "gemma3", "mpt", "mamba", "lfm2"])
def test_a_record_has_the_gradient_of_a_pass_of_its_own(name: str) -> None:
    """Also where every choice has a row, or the family flattens rows and tokens (OPT)."""
    targets = ["in_proj"] if name == "mamba" else "all-linear"
    model = attach(made(name), rank=2, seed=1, method="lora", targets=targets)
    loss_plan = LossPlan(kind="choices", micro_batch=4)
    check_records(model, loss_plan)
    layout, data = full_layout(model), encoded(2 * WINDOW)
    parameters = select(model, layout)
    with made_up_adapter(model, 0.1), evaluation_mode(model):
        records = records_of(model, layout, data, loss_plan)
        found = {
            row: [g[at] for g in gradients]
            for rows, gradients in records.of_records(np.arange(len(data)))
            for at, row in enumerate(rows.tolist())
        }
        for row in range(len(data)):
            loss = question_losses(model, data.select(torch.tensor([row])), "choices", PLAIN)
            wanted = torch.autograd.grad(loss.sum(), parameters)
            for ours, theirs in zip(found[row], wanted, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["opt", "mpt", "lfm2"])
def test_no_record_moves_another_records_last_bits(name: str) -> None:
    """Adversary: as in test_independence, for rows that are taken apart."""
    model = attach(made(name), rank=2, seed=1)
    layout, data = layout_of(model, "ffa-lora"), encoded()
    select(model, layout)

    def of_first(company: list[int]) -> bytes:
        part = data.select(torch.tensor([0, *company]))
        records = records_of(model, layout, part, LossPlan())
        for rows, gradients in records.of_records(np.arange(len(part))):
            if 0 in rows.tolist():
                return bits(*gradients)[rows.tolist().index(0)]
        raise AssertionError

    with evaluation_mode(model), made_up_adapter(model, 30.0):
        assert len({of_first(company) for company in ([], [1], [2, 3], [3, 1, 2])}) == 1


@pytest.mark.soak
@pytest.mark.parametrize("name", ["bloom", "gemma3"])
def test_tuning_goes_on_as_before(name: str) -> None:
    model = attach(made(name), rank=2, seed=1)
    layout, data = layout_of(model, "ffa-lora"), encoded(2 * WINDOW)
    plan, noise = train_plan(steps=2, batch_size=2, learning_rate=0.01), NoiseSource()
    assert train_plain(model, layout, data, plan, seed=1).delta.any()
    assert train_dp(model, layout, data, plan, protection(), noise=noise).delta.any()


def test_states_of_lower_layers_are_not_kept_where_rows_are_taken_apart() -> None:
    assert with_prefix(made("gemma3"), encoded(), 1).prefix is None
    assert with_prefix(made("llama"), encoded(), 1).prefix is not None


def test_a_model_that_looks_ahead_is_refused_by_name() -> None:
    model = BertLMHeadModel(BertConfig(**{**HEADS, "num_key_value_heads": None})).eval()
    with pytest.raises(ConfigError, match=r"path:bert: BertLMHeadModel sees the tokens"):
        check_model(model, "path:bert")


@pytest.mark.parametrize("reverse", [False, True])
def test_a_layer_without_records_gradients_is_refused_before_the_run(
    reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adversary: a server that sees a silo fail in the step that samples a record. A family that
    flattens is refused unless it is known, and then if it does not keep the order."""
    model = attach(made("llama"), rank=2, seed=1)
    mlp = model.get_base_model().model.layers[1].mlp
    plain = mlp.forward

    def flat(given: torch.Tensor) -> torch.Tensor:
        tokens = given.flatten(0, 1)
        found = plain(tokens.flip(0)).flip(0) if reverse else plain(tokens)
        return found.view_as(given)

    monkeypatch.setattr(mlp, "forward", flat)
    if reverse:
        monkeypatch.setattr("securefedcollm.tuning.per_record.FLATTENING", {"llama"})
    named = r"adapter.targets: .*model\.layers\.1\.mlp\..* mixes the tokens of records"
    with pytest.raises(ConfigError, match=named):
        check_records(model, LossPlan())
