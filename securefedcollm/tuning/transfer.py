"""What the small model learnt, carried to the large one by public questions alone.

POST (Wang et al. 2025, arXiv 2506.16196) carries a soft prompt that was tuned on a
small model to a large one: the large model's own prompt is tuned until it answers public questions
as the small model with its prompt does, and until its prompt *changes* its answers as the small
model's changes those. Only predictions are compared, so adapters of any method can be carried, and
the two models need no tokens in common.

Everything here follows from the small model's adapter, which was released, and public questions:
it is post-processing and costs no privacy. The small model is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from securefedcollm.tuning.choice_distil import all_scores, divergence, supervised_loss
from securefedcollm.tuning.head import without_adapter
from securefedcollm.tuning.plans import DistilLossPlan
from securefedcollm.tuning.questions import EncodedQuestions, choice_scores


class TransferObjective:
    """The loss of the large model on a part of a batch; the small one's is zero.

    With the scores z of the choices, with (z) and without (z⁰) the adapter, of the large model (L)
    and the small one (S), and softmax at the temperature τ:

        λ · ((1 − α) · D(softmax z_S, softmax z_L)
             + α · D(softmax (z_S − z⁰_S), softmax (z_L − z⁰_L)))

    as a mean over the questions, and the cross-entropy of the labelled ones as everywhere.
    λ = ``loss.weight``, α = ``loss.change``.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        data: Sequence[EncodedQuestions],
        loss: DistilLossPlan,
    ) -> None:
        self._llm, self._data, self._loss = models[0], data[0], loss
        size = max(64, loss.micro_batch)
        small = all_scores(models[1], data[1], loss.scorings[1], size)
        plain = []
        for model, questions, scoring in zip(models, data, loss.scorings, strict=True):
            with without_adapter(model):
                plain.append(all_scores(model, questions, scoring, size))
        self._plain = _known(plain[0])
        self._answers = F.softmax(small / loss.temperature, dim=-1)
        change = (_known(small) - _known(plain[1])).masked_fill(~data[1].choice_mask, -torch.inf)
        self._change = F.softmax(change / loss.temperature, dim=-1)

    def terms(self, batch: Tensor, part: Tensor) -> list[Tensor]:
        """(LLM, SLM) loss of the questions ``part``, their share of the mean over ``batch``."""
        loss = self._loss
        labels = max(1, int((self._data.answers[batch] >= 0).sum()))
        asked = self._data.select(part)
        own = choice_scores(self._llm, asked, loss.scorings[0])
        place = own.device
        moved = own - self._plain[part].to(place)
        apart = own.new_zeros(())
        for share, target, scores in (
            (1 - loss.change, self._answers, own),
            (loss.change, self._change, moved),
        ):
            if share:
                teacher = target[part].to(place)
                found = divergence(teacher, scores, loss.temperature, loss.direction)
                apart = apart + share * found
        term = supervised_loss(own, asked.answers.to(place)) / labels
        return [term + loss.weight * apart / len(batch), own.new_zeros(())]


def _known(scores: Tensor) -> Tensor:
    """Zeros for choices that do not exist: −∞ less −∞ is no number."""
    return scores.masked_fill(scores == -torch.inf, 0.0)
