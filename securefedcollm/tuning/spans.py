"""Distillation over the vocabulary between two models with different tokenizers.

**Spans.** Both tokenizations of a text are cut where both have a token's end (as in TRL's GOLD);
between two such places both have the same stretch of text, in one or more tokens each.

**Events.** At the first token of a span, each model gives a distribution over K + 2 events, the
same for both: the span itself (by the chain rule over its tokens); each of the K tokens that both
vocabularies have, less the span where it begins with that token; and everything else, as one event.
A shared token that is the whole span for one of the two belongs to the span for both: the other may
spell the same text in two ways.
These are probabilities that sum to one, so the targets and divergences are those of two models with
one tokenizer, and are just that where the vocabularies are equal. (GOLD compares what is not shared
by sorting the probabilities of both sides, as in Boizard et al., arXiv 2402.12030. That matches
tokens that have nothing to do with each other; one event for the rest can only understate the
divergence.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.choice_distil import divergence
from securefedcollm.tuning.head import Logits, output_logits, trained_head, unwrapped
from securefedcollm.tuning.plans import DistilLossPlan, Over
from securefedcollm.tuning.questions import EncodedQuestions, by_length
from securefedcollm.tuning.recipe import inference_mode
from securefedcollm.tuning.token_distil import Positions, positions_of, ranges, states_at
from securefedcollm.tuning.token_loss import CHUNK, Labels, chunked_loss, gold_log_probs
from securefedcollm.tuning.tokenise import Piece
from securefedcollm.tuning.vocabulary import Vocabulary, shared_tokens


def aligned(one: Piece, two: Piece, *, follows: bool) -> list[tuple[slice, slice]]:
    """The spans of two tokenizations of one text: which tokens of each they take.

    ``follows``: the first tokens are predicted from what precedes the text, so they may begin the
    first span; otherwise nothing predicts them and the first span begins after a cut.
    """
    cuts = []
    for piece in (one, two):
        found = {cut: i + 1 for i, cut in enumerate(piece.cuts) if cut >= 0}
        cuts.append({piece.start: 0} | found if follows else found)
    common = sorted(cuts[0].keys() & cuts[1].keys())
    return [
        (slice(cuts[0][a], cuts[0][b]), slice(cuts[1][a], cuts[1][b])) for a, b in pairwise(common)
    ]


@dataclass(frozen=True)
class Spans:
    """One model's side of the S spans of all questions, question by question."""

    first: Tensor  # int64 [S]: which of the model's positions predicts the span's first token
    token: Tensor  # int64 [S]: that token
    later: Tensor  # int64 [R]: the positions that predict the tokens after it
    later_token: Tensor  # int64 [R]
    later_span: Tensor  # int64 [R]: whose they are


def spans_of(
    data: Sequence[EncodedQuestions], positions: Sequence[Positions], over: Over
) -> tuple[list[Spans], Tensor]:
    """Both sides of all spans, and int64 [N + 1]: where each question's begin."""
    firsts: list[list[tuple[int, int]]] = [[], []]  # (position, token)
    laters: list[list[tuple[int, int, int]]] = [[], []]  # (position, token, span)
    starts = [0]
    for i, answer in enumerate(data[0].answers.tolist()):
        for choice in _texts(data[0], answer, over):
            pieces = [_piece(questions, i, choice) for questions in data]
            index = [
                _positions_of_text(questions, at, i, choice)
                for questions, at in zip(data, positions, strict=True)
            ]
            for taken in aligned(pieces[0], pieces[1], follows=choice >= 0):
                for side, where in enumerate(taken):
                    tokens = list(zip(index[side][where], pieces[side].ids[where], strict=True))
                    laters[side] += [(*token, len(firsts[side])) for token in tokens[1:]]
                    firsts[side].append(tokens[0])
        starts.append(len(firsts[0]))
    sides = []
    for side in (0, 1):
        first = torch.tensor(firsts[side], dtype=torch.int64).view(-1, 2).unbind(1)
        later = torch.tensor(laters[side], dtype=torch.int64).view(-1, 3).unbind(1)
        sides.append(Spans(*first, *later))
    return sides, torch.tensor(starts)


_PROMPT = -1


def _texts(data: EncodedQuestions, answer: int, over: Over) -> list[int]:
    """The compared texts of a question: the prompt, and its answer or else every choice."""
    choices = [answer] if answer >= 0 else list(range(data.choice_mask.shape[1]))
    return [_PROMPT, *choices] if over == "all" else choices


def _piece(data: EncodedQuestions, row: int, choice: int) -> Piece:
    assert data.pieces is not None
    prompt, choices = data.pieces[row]
    if choice == _PROMPT:
        return prompt
    return choices[choice] if choice < len(choices) else Piece([], [])


def _positions_of_text(
    data: EncodedQuestions, positions: Positions, row: int, choice: int
) -> list[int]:
    """The position that predicts each token of the prompt or of a choice; -1 where none does."""
    begin, end = positions.starts[row : row + 2].tolist()
    index = {place: begin + n for n, place in enumerate(positions.at[begin:end].tolist())}
    first = int(data.prompt_tokens[row]) - 1
    if choice == _PROMPT:
        return [index.get(j - 1, -1) for j in range(first + 1)]
    slots = data.target_slots[row][data.target_choices[row] == choice]
    return [index.get(first + slot, -1) for slot in slots.tolist()]


def _whole(spans: Spans, shared: list[int], size: int) -> Tensor:
    """Which shared token is the whole span for this side: int64 [S], -1 where none is."""
    place = torch.full((size,), -1)
    place[shared] = torch.arange(len(shared))
    alone = torch.bincount(spans.later_span, minlength=len(spans.first)) == 0
    return torch.where(alone, place[spans.token], -1)


class SpanObjective:
    """The losses of both models on a part of a batch; see :mod:`securefedcollm.tuning.distil`.

    Cross-entropy is a mean over a model's own labelled tokens, the divergence over the spans.

    Raises:
        ConfigError: no span is common to the tokenizers, or an adapter is on an output layer.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        data: Sequence[EncodedQuestions],
        vocabularies: Sequence[Vocabulary],
        loss: DistilLossPlan,
        learns: tuple[bool, bool] = (True, True),
    ) -> None:
        """``learns``: which models learn; one that does not is only asked, and its term is 0."""
        assert loss.over != "choices"
        positions = [positions_of(questions, loss.over) for questions in data]
        spans, self._starts = spans_of(data, positions, loss.over)
        if not int(self._starts[-1]):
            raise ConfigError(
                "the two tokenizers cut no public text at a common place",
                where="distillation.over",
                hint="choose over: choices, or models with tokenizers that are more alike",
            )
        shared = shared_tokens(vocabularies[0], vocabularies[1])
        whole = [_whole(spans[s], shared[s], len(vocabularies[s])) for s in (0, 1)]
        self._sides = [
            _Side(
                models[s],
                data[s],
                positions[s],
                spans[s],
                torch.tensor(shared[s], dtype=torch.int64),
                torch.stack(whole, dim=1),
                loss.temperature,
            )
            for s in (0, 1)
        ]
        self._loss, self._learns = loss, learns
        self._frozen: list[_Measured] | None = None
        self._share = torch.zeros(0)
        if loss.freezes:
            self._frozen = [side.frozen(self._starts, loss.micro_batch) for side in self._sides]
            self._share = self._shares(data[0].answers)

    def terms(self, batch: Tensor, part: Tensor) -> list[Tensor]:
        """(LLM, SLM) loss of the rows ``part``, their share of the mean over ``batch``."""
        everything, _ = ranges(self._starts, batch)
        spans, _ = ranges(self._starts, part)
        terms: list[Tensor] = []
        found: list[_Measured | None] = []
        loss = self._loss
        for side, learns in zip(self._sides, self._learns, strict=True):
            terms.append(torch.zeros(()))
            found.append(None)
            if learns or loss.kind == "mutual-kl":
                with torch.set_grad_enabled(learns):
                    hidden = side.states(part)
                    found[-1] = side.measured(hidden, part, spans)
                    if learns:
                        terms[-1] = side.cross_entropy(hidden, batch, part)
        if loss.kind == "none":
            return terms
        scale = loss.weight * loss.temperature**2 / max(1, len(everything))
        for own in (0, 1):
            mine, other = found[own], found[1 - own]
            if mine is None or not self._learns[own]:
                continue
            peer = None if other is None else other.detached()
            for where in torch.split(torch.arange(len(spans)), CHUNK):
                apart = checkpoint(
                    self._apart,
                    own,
                    mine.states[where],
                    mine.later[where],
                    mine.token[where],
                    mine.whole[where],
                    spans[where],
                    None if peer is None else peer.part(where),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                terms[own] = terms[own] + scale * apart.to(terms[own].device)
        return terms

    def _apart(
        self,
        own: int,
        states: Tensor,
        later: Tensor,
        token: Tensor,
        whole: Tensor,
        spans: Tensor,
        peer: _Measured | None,
    ) -> Tensor:
        """Σ D(teacher, own) over a few spans; computed again on the way back."""
        mine = self._sides[own].events(_Measured(states, later, token, whole))
        with torch.no_grad():
            if self._frozen is None:
                assert peer is not None
                teacher = self._sides[1 - own].events(peer).exp()
            else:
                share = self._share[spans][:, None]
                llm, slm = (
                    side.events(says.part(spans)).exp().cpu()
                    for side, says in zip(self._sides, self._frozen, strict=True)
                )
                teacher = share * llm + (1 - share) * slm
        return divergence(teacher.to(mine.device), mine, 1.0, self._loss.direction)

    def _shares(self, answers: Tensor) -> Tensor:
        """The LLM's part of every span's target, at τ; as for two models with one tokenizer."""
        assert self._frozen is not None
        entropies, surprise = [], []
        for side, says in zip(self._sides, self._frozen, strict=True):
            kept = []
            for where in torch.split(torch.arange(len(says.token)), CHUNK):
                with torch.no_grad():
                    events = side.events(says.part(where)).cpu()
                kept.append(torch.stack([-(events.exp() * events).sum(1), -events[:, _SPAN]]))
            entropy, wrong = torch.cat(kept, dim=1)
            entropies.append(entropy)
            surprise.append(wrong)
        if self._loss.kind == "entropy-pooled":
            return torch.sigmoid(self._loss.sharpness * (entropies[1] - entropies[0]))
        counts = self._starts.diff()
        known = torch.repeat_interleave(answers >= 0, counts)
        worse = torch.where(known, surprise[0] - surprise[1], entropies[0] - entropies[1])
        sums = torch.cat([torch.zeros(1), worse.cumsum(0)])[self._starts].diff()
        return torch.repeat_interleave((sums <= 0).float(), counts)


@dataclass(frozen=True)
class _Measured:
    """One model's predictions at some spans."""

    states: Tensor  # [m, D]: where the first token is predicted
    later: Tensor  # float32 [m]: log-probability of the tokens after it, at the temperature
    token: Tensor  # int64 [m]: the first token
    whole: Tensor  # int64 [m, 2]: shared tokens that belong to the span; -1 for none

    def part(self, where: Tensor) -> _Measured:
        return _Measured(
            self.states[where], self.later[where], self.token[where], self.whole[where]
        )

    def detached(self) -> _Measured:
        return replace(self, states=self.states.detach(), later=self.later.detach())


_SPAN = 0
_LOG_NOTHING = -1e4  # e to this is 0


class _Side:
    """One of the two models, with its tokens, positions and spans."""

    def __init__(
        self,
        model: nn.Module,
        data: EncodedQuestions,
        positions: Positions,
        spans: Spans,
        shared: Tensor,
        whole: Tensor,
        temperature: float,
    ) -> None:
        if trained_head(model):
            raise ConfigError(
                "an adapter on the output layer cannot learn from another tokenizer's model",
                where="adapter.targets",
                hint="leave the output layer out, as all-linear does",
            )
        self._model, self._data, self._positions, self._spans = model, data, positions, spans
        self._plain = output_logits(model)
        self._logits: Logits = lambda states: self._plain(states) / temperature
        self._shared = shared
        # From places among the shared tokens to this model's own tokens; the last entry is "none".
        self._whole = torch.cat([shared, torch.tensor([-1])])[whole]
        size = unwrapped(model).get_output_embeddings().out_features
        unshared = torch.ones(size, dtype=torch.bool)
        unshared[shared] = False
        self._others = unshared.nonzero()[:, 0]

    def states(self, part: Tensor) -> Tensor:
        """Hidden states at all positions of the rows ``part``, in the graph."""
        index, local = self._positions.of(part)
        return states_at(self._model, self._data.select(part), local, self._positions.at[index])

    def cross_entropy(self, hidden: Tensor, batch: Tensor, part: Tensor) -> Tensor:
        """Over the labelled tokens of ``part``: their share of the mean over ``batch``."""
        gold = self._positions.gold
        labels = max(1, int((gold[self._positions.of(batch)[0]] >= 0).sum()))
        own = gold[self._positions.of(part)[0]].to(hidden.device)
        return chunked_loss(hidden, self._plain, labels=Labels(gold=own, scale=1 / labels))

    def measured(self, hidden: Tensor, part: Tensor, spans: Tensor) -> _Measured:
        """Predictions at ``spans`` (all those of the rows ``part``), from their hidden states."""
        index, _ = self._positions.of(part)
        local = torch.full((len(self._positions.at),), -1)
        local[index] = torch.arange(len(index))
        number = torch.full((len(self._spans.first),), -1)
        number[spans] = torch.arange(len(spans))
        chosen = number[self._spans.later_span] >= 0
        device = hidden.device
        logs = gold_log_probs(
            hidden[local[self._spans.later[chosen]].to(device)],
            self._logits,
            self._spans.later_token[chosen].to(device),
        )
        whose = number[self._spans.later_span[chosen]].to(device)
        later = logs.new_zeros(len(spans)).index_add(0, whose, logs)
        states = hidden[local[self._spans.first[spans]].to(device)]
        token, whole = self._spans.token[spans].to(device), self._whole[spans].to(device)
        return _Measured(states, later, token, whole)

    def frozen(self, starts: Tensor, batch_size: int) -> _Measured:
        """The predictions at all spans, as the model is now."""
        kept: list[tuple[Tensor, _Measured]] = []
        with inference_mode(self._model):
            for rows, _ in by_length(self._data, batch_size):
                spans, _ = ranges(starts, rows)
                kept.append((spans, self.measured(self.states(rows), rows, spans)))
        order = torch.argsort(torch.cat([spans for spans, _ in kept]))
        return _Measured(
            torch.cat([says.states for _, says in kept]),
            torch.cat([says.later for _, says in kept]),
            torch.cat([says.token for _, says in kept]),
            torch.cat([says.whole for _, says in kept]),
        ).part(order)

    def events(self, says: _Measured) -> Tensor:
        """Log-probabilities of the span, of K shared tokens, and of all else: [m, K + 2]."""
        log_q = F.log_softmax(self._logits(says.states), dim=-1)
        token = says.token[:, None]
        span = log_q.gather(1, token) + says.later[:, None]
        # What the first token leaves to other continuations; nothing, if it is the whole span.
        less = torch.log(-torch.expm1(says.later.clamp_max(-1e-6)))[:, None]
        left = torch.where(says.later[:, None] < 0, log_q.gather(1, token) + less, _LOG_NOTHING)
        log_q = log_q.scatter(1, token, left)
        for other in torch.split(says.whole, 1, dim=1):
            at = other.clamp_min(0)
            mass = log_q.gather(1, at)
            span = torch.logaddexp(span, torch.where(other >= 0, mass, _LOG_NOTHING))
            log_q = log_q.scatter(1, at, torch.where(other >= 0, _LOG_NOTHING, mass))
        device = log_q.device
        rest = torch.logsumexp(log_q[:, self._others.to(device)], dim=1, keepdim=True)
        events = [span, log_q[:, self._shared.to(device)], rest.clamp_min(_LOG_NOTHING)]
        return torch.cat(events, dim=1)
