"""Distillation over the vocabulary, token by token, for two models that share a tokenizer.

The positions are those that predict a token of the answer (of every choice, where a question has no
label), or of prompt and answer. Frozen predictions are kept as hidden states after the last layer
(D numbers a position instead of V), or as the ``top_k`` most probable tokens of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.head import Logits, device_of, output_logits, trained_head, unwrapped
from securefedcollm.tuning.plans import DistilLossPlan, Over
from securefedcollm.tuning.questions import EncodedQuestions, by_length, last_hidden
from securefedcollm.tuning.recipe import inference_mode
from securefedcollm.tuning.token_loss import CHUNK, Labels, Target, Targets, Teacher, chunked_loss


@dataclass(frozen=True)
class Positions:
    """Where N packed rows predict the tokens that are compared, row by row: M in all."""

    at: Tensor  # int64 [M]: place in the packed row
    gold: Tensor  # int64 [M]: the token that follows; -1 where a question has no label
    starts: Tensor  # int64 [N + 1]: row i has the positions starts[i] to starts[i + 1] - 1

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(index [m] into the positions, index [m] into ``rows``) of the positions of ``rows``."""
        return ranges(self.starts, rows)


def ranges(starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """All of starts[r] … starts[r + 1] − 1 for r in ``rows``, and which of ``rows`` each is of."""
    counts = starts[rows + 1] - starts[rows]
    local = torch.repeat_interleave(torch.arange(len(rows)), counts)
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts)[local]
    return starts[rows][local] + within, local


def positions_of(data: EncodedQuestions, over: Over) -> Positions:
    """All positions of ``data`` that ``over`` asks for."""
    at: list[int] = []
    gold: list[int] = []
    starts = [0]
    choices = data.choice_mask.shape[1]
    for i, answer in enumerate(data.answers.tolist()):
        first = int(data.prompt_tokens[i]) - 1
        known = answer >= 0
        found: dict[int, int] = {}
        if over == "all":
            prompt = data.tokens[i, 1 : first + 1].tolist()
            found |= {p: token if known else -1 for p, token in enumerate(prompt)}
        owners = data.target_choices[i].tolist()
        slots, targets = data.target_slots[i].tolist(), data.targets[i].tolist()
        for owner, slot, target in zip(owners, slots, targets, strict=True):
            if owner == answer if known else owner < choices:
                found[first + slot] = target if known else -1
        at += found
        gold += found.values()
        starts.append(len(at))
    return Positions(torch.tensor(at), torch.tensor(gold), torch.tensor(starts))


class TokenObjective:
    """The losses of both models on a part of a batch; see :mod:`securefedcollm.tuning.distil`.

    Cross-entropy is a mean over the labelled tokens of a batch, the divergence over its positions.

    Raises:
        ConfigError: there is no position to compare.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        data: Sequence[EncodedQuestions],
        loss: DistilLossPlan,
        learns: tuple[bool, bool] = (True, True),
    ) -> None:
        """``learns``: which models learn; one that does not is only asked, and its term is 0."""
        assert loss.over != "choices"
        self._models, self._data, self._loss, self._learns = models, data, loss, learns
        self._positions = positions_of(data[0], loss.over)
        if not len(self._positions.at):
            raise ConfigError(
                "the public prompts have no token to compare",
                where="distillation.over",
                hint="choose over: all, or label public records",
            )
        self._logits = shared_logits(models)
        self._frozen = self._freeze() if loss.freezes else None

    def terms(self, batch: Tensor, part: Tensor) -> list[Tensor]:
        """(LLM, SLM) loss of the rows ``part``, their share of the mean over ``batch``."""
        whole, _ = self._positions.of(batch)
        labels = max(1, int((self._positions.gold[whole] >= 0).sum()))
        index, local = self._positions.of(part)
        hidden = [self._states(which, part, local, index) for which in (0, 1)]
        terms = []
        for own in (0, 1):
            states = hidden[own]
            if states is None or not self._learns[own]:
                terms.append(torch.zeros(()))
                continue
            targets = self._targets(1 - own, hidden[1 - own], index, states.device)
            gold = self._positions.gold[index].to(states.device)
            term = chunked_loss(
                states,
                self._logits[own],
                trained_head(self._models[own]),
                labels=Labels(gold=gold, scale=1 / labels),
                teacher=None if targets is None else self._teacher(targets, len(whole)),
            )
            terms.append(term)
        return terms

    def _states(self, which: int, part: Tensor, local: Tensor, index: Tensor) -> Tensor | None:
        """One model's states at the positions ``index``; None if nobody needs them."""
        learns = self._learns[which]
        if not learns and self._loss.kind != "mutual-kl":
            return None
        with torch.set_grad_enabled(learns):
            asked = self._data[which].select(part)
            return states_at(self._models[which], asked, local, self._positions.at[index])

    def _freeze(self) -> Frozen:
        """The target at all positions, from both models as they are now."""
        loss = self._loss
        frozen = Frozen.take(
            self._models,
            self._data,
            self._positions,
            self._logits,
            loss.temperature,
            loss.micro_batch,
        )
        pooled = loss.kind == "entropy-pooled"
        frozen = frozen.pooled(loss.sharpness) if pooled else frozen.better()
        return frozen if loss.top_k is None else frozen.shortened(loss.top_k)

    def _teacher(self, targets: Targets, positions: int) -> Teacher:
        """λ times the mean divergence over that many positions."""
        loss = self._loss
        return Teacher(
            targets=targets,
            scale=loss.weight / positions,
            temperature=loss.temperature,
            direction=loss.direction,
        )

    def _targets(
        self, peer: int, states: Tensor | None, index: Tensor, device: torch.device
    ) -> Targets | None:
        """The teacher at the positions ``index``, for a student on ``device``."""
        if self._frozen is not None:
            frozen = self._frozen
            return lambda where: frozen.target(index[where], device)
        if self._loss.kind != "mutual-kl":
            return None
        assert states is not None
        known = states.detach()

        def says(where: slice) -> Target:
            with torch.no_grad():
                logits = self._logits[peer](known[where])
            return Target(F.log_softmax(logits / self._loss.temperature, dim=-1).to(device))

        return says


@dataclass(frozen=True)
class Frozen:
    """Both models' predictions at M positions when the phase begins, and how much each counts."""

    states: tuple[Tensor, Tensor] | None  # [M, D] of the LLM and of the SLM; None once listed
    logits: Sequence[Logits]
    devices: tuple[torch.device, torch.device]
    positions: Positions
    temperature: float
    share: Tensor  # float32 [M]: w, the LLM's part of the target
    listed: Target | None = None  # [M, k]

    @classmethod
    def take(
        cls,
        models: Sequence[nn.Module],
        data: Sequence[EncodedQuestions],
        positions: Positions,
        logits: Sequence[Logits],
        temperature: float,
        batch_size: int,
    ) -> Frozen:
        """Run both models once over everything."""
        kept = []
        for model, questions in zip(models, data, strict=True):
            states: Tensor | None = None
            with inference_mode(model):
                for rows, batch in by_length(questions, batch_size):
                    index, local = positions.of(rows)
                    found = states_at(model, batch, local, positions.at[index]).cpu()
                    if states is None:
                        states = found.new_zeros(len(positions.at), found.shape[1])
                    states[index] = found
            assert states is not None
            kept.append(states)
        devices = (device_of(models[0]), device_of(models[1]))
        share = torch.full((len(positions.at),), 0.5)
        return cls((kept[0], kept[1]), logits, devices, positions, temperature, share)

    def pooled(self, sharpness: float) -> Frozen:
        """The surer model weighs more, position by position."""
        surer = [
            _entropy(self._says(1, index)) - _entropy(self._says(0, index))
            for index in torch.split(torch.arange(len(self.share)), CHUNK)
        ]
        return self._with(share=torch.sigmoid(sharpness * torch.cat(surer)))

    def better(self) -> Frozen:
        """The better model alone, row by row: the smaller mean cross-entropy, or entropy, at τ."""
        gold = self.positions.gold
        apart = []
        for index in torch.split(torch.arange(len(self.share)), CHUNK):
            says = [self._says(which, index) for which in (0, 1)]
            at = gold[index].clamp_min(0)[:, None]
            wrong = [
                torch.where(gold[index] >= 0, -s.gather(1, at)[:, 0], _entropy(s)) for s in says
            ]
            apart.append(wrong[0] - wrong[1])
        sums = torch.cat([torch.zeros(1), torch.cat(apart).cumsum(0)])[self.positions.starts]
        counts = self.positions.starts.diff()
        return self._with(share=torch.repeat_interleave((sums.diff() <= 0).float(), counts))

    def shortened(self, top_k: int) -> Frozen:
        """Only the ``top_k`` most probable tokens of the target are kept, and no hidden states."""
        values, tokens = [], []
        for index in torch.split(torch.arange(len(self.share)), CHUNK):
            top = self.target(index, torch.device("cpu")).log_probs
            best = top.topk(min(top_k, top.shape[1]))
            values.append(best.values)
            tokens.append(best.indices)
        return self._with(listed=Target(torch.cat(values), torch.cat(tokens)), states=None)

    def target(self, index: Tensor, device: torch.device) -> Target:
        """T at the positions ``index``."""
        if self.listed is not None and self.listed.tokens is not None:
            return Target(
                self.listed.log_probs[index].to(device), self.listed.tokens[index].to(device)
            )
        share = self.share[index].to(device)[:, None]
        llm, slm = (self._says(which, index).to(device) for which in (0, 1))
        return Target(torch.logaddexp(llm + share.log(), slm + (1 - share).log()))

    def _says(self, which: int, index: Tensor) -> Tensor:
        """log softmax(logits / τ) of one model: float32 [m, V]."""
        assert self.states is not None
        with torch.no_grad():
            logits = self.logits[which](self.states[which][index].to(self.devices[which]))
        return F.log_softmax(logits / self.temperature, dim=-1)

    def _with(self, **changed: object) -> Frozen:
        return Frozen(**{**vars(self), **changed})


def states_at(model: nn.Module, batch: EncodedQuestions, rows: Tensor, at: Tensor) -> Tensor:
    """Hidden states after the last layer at the places (``rows``, ``at``): [m, D]."""
    causal = unwrapped(model)
    hidden = last_hidden(model, batch.to(device_of(causal)))
    return hidden[rows.to(hidden.device), at.to(hidden.device)]


def shared_logits(models: Sequence[nn.Module]) -> list[Logits]:
    """Both output layers, over the tokens that both have: some models pad their vocabulary."""
    layers = [output_logits(model) for model in models]
    sizes = {unwrapped(model).get_output_embeddings().out_features for model in models}
    if len(sizes) == 1:
        return layers
    least = min(sizes)
    return [lambda states, layer=layer: layer(states)[:, :least] for layer in layers]  # type: ignore[misc]


def _entropy(log_probs: Tensor) -> Tensor:
    """Nats, [m], on the processor."""
    return -(log_probs.exp() * log_probs).sum(-1).cpu()
