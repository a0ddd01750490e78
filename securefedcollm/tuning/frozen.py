"""Results of the frozen base that are computed once: priors, and the lower layers' states.

Where the questions are private records, both are made in fixed passes (:mod:`.passes`): they enter
a record's gradient, so no other record may change a bit of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from securefedcollm.tuning.head import device_of, unwrapped
from securefedcollm.tuning.independence import bits, proved
from securefedcollm.tuning.kept_states import KeptStates, keys_of, lengths, states_kept
from securefedcollm.tuning.layers import passed_over
from securefedcollm.tuning.packing import ANY_LENGTH, row_limit
from securefedcollm.tuning.passes import Widths, one_thread_if, passes, shapes_of, widths_for
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import (
    EncodedQuestions,
    by_length,
    choice_scores,
    encode,
    last_hidden,
)
from securefedcollm.tuning.recipe import Progress, inference_mode, silent

PMI_PROMPT = "Answer:"
"""The content-free prompt whose log-likelihood of a choice the pmi scores subtract."""

_BATCH = 64


def with_prior(
    model: nn.Module,
    questions: Sequence[Question],
    encoded: EncodedQuestions,
    tokenizer: Any,
    private: int | None = None,
) -> EncodedQuestions:
    """``encoded`` with log p(choice | "Answer:") of ``model`` (the base, untuned) filled in.

    Args:
        private: where the questions are private records, how many are in memory at a time.
    """
    bare = [Question(PMI_PROMPT, q.choices, None) for q in questions]
    priors = encode(bare, tokenizer, max_tokens=2**30)
    prior = torch.zeros(encoded.choice_mask.shape)

    def scores(batch: EncodedQuestions) -> Tensor:
        return choice_scores(model, batch).cpu()

    with inference_mode(model):
        for rows, found in _each(model, priors, scores, private, "priors"):
            prior[rows, : found.shape[1]] = found
    return replace(encoded, prior=prior.masked_fill(~encoded.choice_mask, 0.0))


def with_prefix(
    model: nn.Module,
    encoded: EncodedQuestions,
    layers: int,
    private: int | None = None,
    *,
    public: bytes | None = None,
    progress: Progress = silent,
) -> EncodedQuestions:
    """``encoded`` with the hidden states after the first ``layers`` decoder layers filled in.

    Those layers must never change (the adapter sits above them); every later pass then starts at
    layer ``layers``. Costs 4 · L · D bytes a question. Returns ``encoded`` unchanged where the
    shortcut does not hold: no such layers, positions added to the input (GPT-2, OPT), dropout, or
    a family whose packed rows are not always right (:mod:`.packing`).

    Args:
        private: where the questions are private records, how many are in memory at a time.
        public: where they are public texts, the digest of the base; their states may be kept on
            disk (:func:`.kept_states.keeping_states`).
    """
    causal = unwrapped(model)
    config = causal.config
    fixed = hasattr(causal.base_model, "rotary_emb") and not config.attention_dropout
    if layers < 1 or not fixed or row_limit(causal) < ANY_LENGTH:
        return encoded
    states = torch.zeros(*encoded.tokens.shape, config.hidden_size, dtype=causal.dtype)
    width = states.shape[1]

    def below(batch: EncodedQuestions) -> Tensor:
        return _prefix_states(causal, batch, layers)[:, :width].cpu()

    kept = states_kept() if public is not None and private is None else None
    keys: list[str] = []
    left = torch.arange(len(encoded))
    if kept is not None and public is not None:
        keys = keys_of(encoded, public, layers, states.dtype, device_of(causal))
        left = _read(kept, keys, encoded, states)
    done = len(encoded) - len(left)
    data = encoded if not done else encoded.select(left)
    what = f"states below layer {layers}"
    with inference_mode(model):
        for rows, found in _each(model, data, below, private, what) if len(left) else ():
            states[left[rows], : found.shape[1]] = found
            if kept is not None:
                for row, length in zip(
                    left[rows].tolist(), lengths(data.select(rows)), strict=True
                ):
                    kept.write(keys[row], states[row, :length])
            done += len(rows)
            progress(done, len(encoded), "reading public texts")
    return replace(encoded, prefix=states, prefix_layers=layers)


def _read(
    kept: KeptStates, keys: Sequence[str], encoded: EncodedQuestions, states: Tensor
) -> Tensor:
    """Fill in what is on disk; returns the rows that are not, int64."""
    missing = []
    for row, (key, length) in enumerate(zip(keys, lengths(encoded), strict=True)):
        found = kept.read(key, (length, states.shape[2]), states.dtype)
        if found is None:
            missing.append(row)
        else:
            states[row, :length] = found
    return torch.tensor(missing, dtype=torch.int64)


def _prefix_states(causal: Any, batch: EncodedQuestions, layers: int) -> Tensor:
    """Hidden states of ``batch`` after the first ``layers`` decoder layers, [B, L, D]."""
    with passed_over(causal, layers, causal.config.num_hidden_layers) as first:
        last_hidden(causal, batch.to(device_of(causal)))
    assert first.seen is not None
    return first.seen


def _each(
    model: nn.Module,
    data: EncodedQuestions,
    says: Callable[[EncodedQuestions], Tensor],
    private: int | None,
    what: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every row once: (row indices int64 [B], what ``says`` makes of them [B, …])."""
    if private is None:
        for rows, batch in by_length(data, _BATCH):
            yield rows, says(batch)
        return
    widths, everything = widths_for(model, private), np.arange(len(data))
    shapes = shapes_of(data, widths)

    def compute(made_up: EncodedQuestions, widths: Widths) -> list[bytes]:
        found: dict[int, bytes] = {}
        kinds = shapes_of(made_up, widths)
        for one in passes(made_up, kinds, np.arange(len(made_up)), widths):
            with one_thread_if(widths.wide(one.shape)):
                values = says(one.batch)
            kept = values[: len(one.rows)]
            found |= zip(one.rows.tolist(), bits(kept), strict=True)
        return [found[row] for row in range(len(made_up))]

    widths = proved(model, shapes, widths, compute, what)
    for one in passes(data, shapes, everything, widths):
        with one_thread_if(widths.wide(one.shape)):
            found = says(one.batch)[: len(one.rows)]
        yield torch.from_numpy(one.rows), found
