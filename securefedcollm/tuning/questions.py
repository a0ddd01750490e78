"""Questions with choices, their tensors, and packed-choice scoring.

Every task of this project is a question with choices, scored by the log-likelihood of each choice
after the prompt (zero-shot multiple choice as in lm-eval). A classification's choices are its
labels; an instruction has one choice, the response; a text is one choice after an empty prompt. One
question is one batch row, so that a per-example gradient is a per-question gradient (what DP-SGD
clips).

**Packed choices.** A row holds the prompt once, then the tokens of every choice but each choice's
last (nothing has to be predicted after it). A block mask lets a choice see the prompt and itself,
never another choice, and its position ids continue from the prompt: the scores equal those of one
forward pass per choice. With one-token choices nothing follows the prompt, and the same code is one
plain causal forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from securefedcollm.errors import DataError
from securefedcollm.tuning.classifiers import class_logits
from securefedcollm.tuning.head import Logits, device_of, output_logits, trained_head, unwrapped
from securefedcollm.tuning.layers import passed_over
from securefedcollm.tuning.media import MEDIA
from securefedcollm.tuning.packing import block_mask, row_limit, run, states_apart
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.signals import Signal
from securefedcollm.tuning.token_loss import CHUNK, gold_log_probs
from securefedcollm.tuning.tokenise import Form, Row, tokenise
from securefedcollm.tuning.virtual import virtual_of, widened

Normalisation = Literal["plain", "length", "pmi", "pmi-length"]


class Scoring(NamedTuple):
    """How the log-likelihoods of choices become a prediction, softmax(scores / temperature).

    ``rule``: ``plain``, the sum of the log-probabilities of the choice's tokens after the prompt;
    ``length``, that, per character of the choice; ``pmi``, that, minus log p(choice | "Answer:")
    (Holtzman et al. 2021, domain-conditional PMI); ``pmi-length``, the pmi score, per character.
    """

    rule: Normalisation = "plain"
    temperature: float = 1.0

    @property
    def needs_prior(self) -> bool:
        """Whether :func:`.frozen.with_prior` must run first."""
        return self.rule in {"pmi", "pmi-length"}


PLAIN: Final = Scoring()

_PROMPT, _PAD = 0, -1
HEAD_CHUNK = 256
"""Predictions at a time without gradients: 50 MB at a vocabulary of 49k."""
_UNLABELLED = -1


@dataclass(frozen=True)
class EncodedQuestions:
    """N questions of at most C choices as right-padded tensors.

    The packed row of a question has at most L tokens. Its *slots* are the U positions whose
    predictions are needed: the prompt's last token, then the packed choice tokens. The K *targets*
    of a row are all tokens of all its choices; target k is predicted at slot ``target_slot[k]``.
    """

    tokens: Tensor  # int64 [N, L]
    segments: Tensor  # int8 [N, L]: 0 prompt, c + 1 choice c, -1 padding
    positions: Tensor  # int64 [N, L]
    prompt_tokens: Tensor  # int64 [N]
    targets: Tensor  # int64 [N, K]: token ids, 0 where padded
    target_slots: Tensor  # int64 [N, K]
    target_choices: Tensor  # int64 [N, K]: choice index; C where padded
    choice_mask: Tensor  # bool [N, C]
    choice_lengths: Tensor  # float32 [N, C]: characters, at least 1 (lm-eval's acc_norm)
    answers: Tensor  # int64 [N]: -1 where unlabelled
    groups: tuple[str, ...]
    prior: Tensor | None = None  # float32 [N, C]: log p(choice | "Answer:"); for pmi scores
    prefix: Tensor | None = None  # [N, L, D] in the model's dtype: input of layer prefix_layers
    prefix_layers: int = 0
    pieces: tuple[Row, ...] | None = None  # where tokens stand in the text; lost by a selection
    signal: Signal | None = None  # what a model sees in place of tokens
    views: int = 1  # rows of each record, one after the other: they differ in their signal alone
    # Set in a fixed pass (.passes), where no row's arithmetic may follow from another row:
    head: int | None = None  # positions of one call of the output layer; 0: all of the batch

    def __len__(self) -> int:
        return len(self.groups) * self.views

    @property
    def generative(self) -> bool:
        """Whether there is nothing to choose from: responses, texts."""
        return self.choice_mask.shape[1] < 2

    def select(self, index: Tensor) -> EncodedQuestions:
        """The rows ``index`` (int64 [B]), padding trimmed to what these rows need."""
        signal = None if self.signal is None else self.signal.select(index)
        index = index // self.views
        segments = self.segments[index]
        targets = self.target_choices[index] < self.choice_mask.shape[1]
        length = int((segments != _PAD).sum(1).max()) if len(index) else 0
        width = int(targets.sum(1).max()) if len(index) else 0
        return EncodedQuestions(
            tokens=self.tokens[index, :length],
            segments=segments[:, :length],
            positions=self.positions[index, :length],
            prompt_tokens=self.prompt_tokens[index],
            targets=self.targets[index, :width],
            target_slots=self.target_slots[index, :width],
            target_choices=self.target_choices[index, :width],
            choice_mask=self.choice_mask[index],
            choice_lengths=self.choice_lengths[index],
            answers=self.answers[index],
            groups=tuple(self.groups[i] for i in index.tolist()),
            prior=None if self.prior is None else self.prior[index],
            prefix=None if self.prefix is None else self.prefix[index, :length],
            prefix_layers=self.prefix_layers,
            signal=signal,
        )

    def to(self, device: torch.device) -> EncodedQuestions:
        """The same questions on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | Signal)
        }
        return replace(self, **moved)

    def attention_mask(self, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [B, 1, L, L] of ``dtype`` (0 where attention is allowed).

        None when plain causal attention is right already: no packed choices, and padding only to
        the right of a row whose padded places nobody reads. Never None in a fixed pass: whether
        *all* rows can do without is a fact about the batch, and without a mask transformers goes on
        to look for packed sequences in the positions of all rows, and chooses a kernel by that.
        """
        if self.head is None and (self.generative or not bool((self.segments != _PROMPT).any())):
            return None
        return block_mask(self.segments, dtype)


def encode(
    questions: Sequence[Question],
    tokenizer: Any,
    max_tokens: int,
    kind: Form = "multiple_choice",
    *,
    cuts: bool = False,
) -> EncodedQuestions:
    """Tokenise ``questions`` for a Hugging Face ``tokenizer``.

    ``max_tokens`` bounds the prompt plus its longest choice; a longer prompt loses its beginning
    (after the first token, if that is the tokenizer's beginning-of-text token).

    ``cuts``: keep where the tokens stand in the text, to be compared with another tokenizer's.

    Raises:
        DataError: a question has no choices, an answer outside of them, a choice without tokens, or
            choices that alone exceed ``max_tokens``.
    """
    if not questions:
        raise DataError("no questions", where="questions", hint="give at least one question")
    if kind in MEDIA:
        return encode_signals(questions, tokenizer([q.signal for q in questions]))
    pieces = tokenise(questions, tokenizer, max_tokens, kind, cuts=cuts)
    rows = [(prompt.ids, [choice.ids for choice in choices]) for prompt, choices in pieces]
    n, c = len(rows), max(len(choices) for _, choices in rows)
    length = max(len(p) + sum(len(t) - 1 for t in cs) for p, cs in rows)
    width = max(sum(len(t) for t in cs) for _, cs in rows)
    out = EncodedQuestions(
        tokens=torch.zeros(n, length, dtype=torch.int64),
        segments=torch.full((n, length), _PAD, dtype=torch.int8),
        positions=torch.zeros(n, length, dtype=torch.int64),
        prompt_tokens=torch.tensor([len(p) for p, _ in rows]),
        targets=torch.zeros(n, width, dtype=torch.int64),
        target_slots=torch.zeros(n, width, dtype=torch.int64),
        target_choices=torch.full((n, width), c, dtype=torch.int64),
        choice_mask=torch.tensor([[k < len(cs) for k in range(c)] for _, cs in rows]).view(n, c),
        choice_lengths=torch.tensor(
            [[float(len(t)) for t in q.choices] + [1.0] * (c - len(q.choices)) for q in questions]
        ).view(n, c),
        answers=torch.tensor([_UNLABELLED if q.answer is None else q.answer for q in questions]),
        groups=tuple(q.group for q in questions),
        pieces=tuple(pieces) if cuts else None,
    )
    for i, (prompt, choices) in enumerate(rows):
        _fill(out, i, prompt, choices)
    return out


def encode_signals(questions: Sequence[Question], signal: Signal) -> EncodedQuestions:
    """Questions about a signal, whose choices are the classes of a classifier, in its order.

    A class is a choice of one token: the vocabulary is the list of classes, and the prompt is one
    place, at which the class is predicted.
    """
    n, c = len(questions), len(questions[0].choices)
    classes = torch.arange(c).expand(n, c)
    return EncodedQuestions(
        tokens=torch.zeros(n, 1, dtype=torch.int64),
        segments=torch.full((n, 1), _PROMPT, dtype=torch.int8),
        positions=torch.zeros(n, 1, dtype=torch.int64),
        prompt_tokens=torch.ones(n, dtype=torch.int64),
        targets=classes.clone(),
        target_slots=torch.zeros(n, c, dtype=torch.int64),
        target_choices=classes.clone(),
        choice_mask=torch.ones(n, c, dtype=torch.bool),
        choice_lengths=torch.ones(n, c),
        answers=torch.tensor([_UNLABELLED if q.answer is None else q.answer for q in questions]),
        groups=tuple(q.group for q in questions),
        signal=signal,
    )


def _fill(out: EncodedQuestions, i: int, prompt: list[int], choices: list[list[int]]) -> None:
    """Write row ``i`` of the packed tensors."""
    tokens, segments, positions = list(prompt), [_PROMPT] * len(prompt), list(range(len(prompt)))
    targets: list[int] = []
    slots: list[int] = []
    owners: list[int] = []
    for c, choice in enumerate(choices):
        first_slot = len(tokens) - len(prompt) + 1  # where this choice's own tokens will stand
        targets += choice
        slots += [0, *range(first_slot, first_slot + len(choice) - 1)]
        owners += [c] * len(choice)
        tokens += choice[:-1]
        segments += [c + 1] * (len(choice) - 1)
        positions += range(len(prompt), len(prompt) + len(choice) - 1)
    for tensor, values in (
        (out.tokens, tokens),
        (out.segments, segments),
        (out.positions, positions),
        (out.targets, targets),
        (out.target_slots, slots),
        (out.target_choices, owners),
    ):
        tensor.numpy()[i, : len(values)] = values


def choice_scores(model: nn.Module, batch: EncodedQuestions, scoring: Scoring = PLAIN) -> Tensor:
    """Score every choice of every question; differentiable.

    Args:
        model: a causal language model of transformers, plain or with PEFT layers.

    Returns:
        scores over the temperature, the logits of the prediction: float32 [B, C] where the model
        is; ``-inf`` where a question has fewer than C choices.
    """
    causal = unwrapped(model)
    batch = batch.to(device_of(causal))
    (token_scores,) = token_log_probs(causal, [batch], [last_hidden(model, batch)])
    return scores_of(token_scores, batch, scoring)


def scores_of(token_scores: Tensor, batch: EncodedQuestions, scoring: Scoring) -> Tensor:
    """Scores of choices, [B, C] as in :func:`choice_scores`, from their tokens' [B, K]."""
    choices = batch.choice_mask.shape[1]
    scores = token_scores.new_zeros(len(batch), choices + 1)  # last column collects the padding
    scores = scores.scatter_add(1, batch.target_choices, token_scores)[:, :choices]
    if scoring.needs_prior:
        if batch.prior is None:
            raise ValueError("pmi scores need a prior: call with_prior first")
        scores = scores - batch.prior
    if scoring.rule in {"length", "pmi-length"}:
        scores = scores / batch.choice_lengths
    return (scores / scoring.temperature).masked_fill(~batch.choice_mask, -torch.inf)


def token_log_probs(
    causal: Any, batches: Sequence[EncodedQuestions], states: Sequence[Tensor]
) -> list[Tensor]:
    """Log-probability of every target token where it is predicted: float32 [B, K] for each batch.

    The output layer runs on the slots that rows really have, and a chunk at a time when no gradient
    is wanted: with a vocabulary of 49k it costs as much as ten layers, and gigabytes otherwise. In
    fixed passes the chunks have one size whatever is in them: zeros fill up the last.

    Args:
        states: :func:`last_hidden` of each batch, [B, L, D].
    """
    found: dict[int, Tensor] = {}
    # A record with one choice takes one path and one with several the other, whoever is with it.
    for alone in (True, False):
        part = [i for i, batch in enumerate(batches) if batch.generative == alone]
        if part:
            some = _log_probs(causal, [batches[i] for i in part], [states[i] for i in part])
            found |= dict(zip(part, some, strict=True))
    return [found[i] for i in range(len(batches))]


def _log_probs(
    causal: Any, batches: Sequence[EncodedQuestions], states: Sequence[Tensor]
) -> list[Tensor]:
    """:func:`token_log_probs` of batches that are all generative, or none of them."""
    fused = batches[0].generative and not trained_head(causal)
    wanted = [_wanted(b, s, fused) for b, s in zip(batches, states, strict=True)]
    starts = np.cumsum([0, *(len(w.states) for w in wanted)]).tolist()
    place = torch.cat([w.place + start for w, start in zip(wanted, starts, strict=False)])
    token = torch.cat([w.token for w in wanted])
    taken, head = torch.cat([w.states for w in wanted]), batches[0].head
    if head:
        taken = F.pad(taken, (0, 0, 0, -len(taken) % head))
    if fused:  # one target a slot
        chunk = CHUNK if head is None else head or len(taken)
        gold = gold_log_probs(
            taken, output_logits(causal), F.pad(token, (0, len(taken) - len(token))), chunk=chunk
        )[: len(token)]
    else:
        chunk = (len(taken) if torch.is_grad_enabled() else HEAD_CHUNK) if head is None else head
        gold = _gold(taken, output_logits(causal), place, token, chunk or len(taken))
    parts = torch.split(gold, [len(w.token) for w in wanted])
    return [
        gold.new_zeros(w.real.shape).masked_scatter(w.real, part)
        for w, part in zip(wanted, parts, strict=True)
    ]


class _Wanted(NamedTuple):
    """The part of one batch that goes through the output layer."""

    states: Tensor  # [m, D]
    place: Tensor  # int64 [t]: where among them each target is predicted
    token: Tensor  # int64 [t]: the targets, row by row
    real: Tensor  # bool [B, K]: where they stand in the batch


def _wanted(batch: EncodedQuestions, states: Tensor, one_each: bool) -> _Wanted:
    """``one_each``: a state for every target, not for every slot."""
    real = batch.target_choices < batch.choice_mask.shape[1]
    rows, k = torch.nonzero(real, as_tuple=True)
    slots, token = batch.target_slots[rows, k], batch.targets[rows, k]
    if one_each:
        place = torch.arange(len(rows), device=states.device)
        return _Wanted(states[rows, batch.prompt_tokens[rows] - 1 + slots], place, token, real)
    counts = batch.target_slots.masked_fill(~real, -1).max(1).values + 1  # slots of each row
    slot = torch.arange(int(counts.max()), device=states.device)
    owner, own = torch.nonzero(slot < counts[:, None], as_tuple=True)  # row by row
    taken = states[owner, batch.prompt_tokens[owner] - 1 + own]
    return _Wanted(taken, (counts.cumsum(0) - counts)[rows] + slots, token, real)


def _gold(taken: Tensor, head: Logits, place: Tensor, token: Tensor, chunk: int) -> Tensor:
    """Log-probability of ``token`` [t] at the states ``taken[place]``: float32 [t]."""
    found, order = [], []
    for start in range(0, len(taken), chunk):
        # Position by position, on any number of threads; logsumexp is not.
        log_probs = F.log_softmax(head(taken[start : start + chunk]), dim=-1)
        here = ((place >= start) & (place < start + chunk)).nonzero()[:, 0]
        found.append(log_probs[place[here] - start, token[here]])
        order.append(here)
    return torch.cat(found)[torch.argsort(torch.cat(order))]


def last_hidden(model: Any, batch: EncodedQuestions) -> Tensor:
    """Hidden states after the last layer, [B, L, D], from the cached states on if there are any.

    Args:
        model: plain, or with an adapter; virtual tokens precede every row. Of a model that sees,
            L = 1 and the states are the logits of the classes.
    """
    causal, virtual = unwrapped(model), virtual_of(model)
    if batch.signal is not None:
        return class_logits(causal, batch.signal)[:, None]
    fixed, length = batch.head is not None, batch.tokens.shape[1]
    before = None if virtual is None else virtual.rows(len(batch), batch.tokens.device)
    if length + (0 if virtual is None else virtual.count) > row_limit(causal):
        several = not batch.generative and (fixed or bool((batch.segments > 0).any()))
        return states_apart(
            causal,
            batch.tokens,
            batch.positions,
            batch.segments,
            batch.choice_mask.shape[1] if several else 1,
            length if fixed else None,
            before,
        )
    if virtual is not None:
        mask = block_mask(widened(batch.segments, virtual), causal.dtype)
        return run(
            causal,
            before,
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=mask[:, :, virtual.count :] if virtual.prefix else mask,
        )
    start: dict[str, Any] = {"input_ids": batch.tokens}
    if batch.prefix is not None:
        start = {"inputs_embeds": batch.prefix}
    with passed_over(causal, 0, batch.prefix_layers):
        return run(
            causal,
            **start,
            position_ids=batch.positions,
            attention_mask=batch.attention_mask(causal.dtype),
        )


def by_length(data: EncodedQuestions, batch_size: int) -> Iterator[tuple[Tensor, EncodedQuestions]]:
    """(row indices int64 [B], those rows), every row once, rows of like length together.

    In file order a batch of questions is half padding or more, as long as its longest row.
    """
    for rows in torch.split(sorted_by_length(data, torch.arange(len(data))), batch_size):
        yield rows, data.select(rows)


def sorted_by_length(data: EncodedQuestions, rows: Tensor) -> Tensor:
    """``rows`` (int64 [B]) from the shortest packed row to the longest, ties in their order."""
    lengths = (data.segments[rows] != _PAD).sum(1)
    return rows[torch.argsort(lengths, stable=True)]


def shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled epochs of row indices (int64 [min(batch_size, count)], no short batch)."""
    size = min(batch_size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count - count % size], size)
