"""Choose how to ask a model, and its temperature (scaling as in Guo et al. 2017).

Both are chosen on labelled public records, which must not be the study's test questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from securefedcollm.tuning.evaluate import evaluate
from securefedcollm.tuning.formats import Asking
from securefedcollm.tuning.frozen import with_prior
from securefedcollm.tuning.head import check_positions, check_vocabulary
from securefedcollm.tuning.models import LoadedModel
from securefedcollm.tuning.packing import check_model
from securefedcollm.tuning.question import Ask, Question
from securefedcollm.tuning.questions import Normalisation, encode
from securefedcollm.tuning.recipe import Progress, silent

Floats = npt.NDArray[np.float64]
_COLDEST, _HOTTEST = 1e-3, 1e3


@dataclass(frozen=True)
class Form:
    """One way to ask, and the model's scores with it.

    ``accuracy`` in [0, 1]; ``gold_log_prob`` in nats, of the right choice, at ``temperature``, and
    at temperature 1 ``uncalibrated``. ``standard_error`` of the accuracy.
    """

    ask: Ask
    score: Normalisation
    accuracy: float
    standard_error: float
    temperature: float
    gold_log_prob: float
    uncalibrated: float
    count: int


class Plan(NamedTuple):
    """How the records are read: ``asking.ask`` does not matter, since every form is tried."""

    asking: Asking
    max_tokens: int = 256
    batch_size: int = 32


def calibrate(
    loaded: LoadedModel, questions: Sequence[Question], plan: Plan, progress: Progress = silent
) -> list[Form]:
    """Every form, sorted by the log-probability of the right choices, highest first.

    Args:
        questions: with answers, N of at least two choices each.

    Raises:
        ConfigError: the model cannot score these records.
        DataError: a record has no answer, does not fit into ``max_tokens``, or has more choices
            than there are letters.
    """
    check_model(loaded.model, "model")
    answers = np.array([-1 if q.answer is None else q.answer for q in questions])
    found = []
    for ask in _ASKS:
        for score, scores in _scores(loaded, questions, ask, plan, progress).items():
            temperature = best_temperature(scores, answers)
            right = scores.argmax(1) == answers
            found.append(
                Form(
                    ask,
                    score,
                    accuracy=float(right.mean()),
                    standard_error=float(right.std() / np.sqrt(len(right))),
                    temperature=temperature,
                    gold_log_prob=gold(scores, answers, temperature),
                    uncalibrated=gold(scores, answers, 1.0),
                    count=len(answers),
                )
            )
    return sorted(found, key=lambda form: -form.gold_log_prob)


_ASKS: Final[tuple[Ask, ...]] = ("cloze", "letters")


def _scores(
    loaded: LoadedModel,
    questions: Sequence[Question],
    ask: Ask,
    plan: Plan,
    progress: Progress,
) -> dict[Normalisation, Floats]:
    """Scores of the choices [N, C] by each rule, at temperature 1, -inf where there is none."""
    kind, template = plan.asking.kind, plan.asking.template
    asked, form = Asking(kind, ask, template).put(questions, loaded.tokenizer)
    data = encode(asked, loaded.tokenizer, plan.max_tokens, form)
    check_vocabulary(loaded.model, loaded.tokenizer, data.tokens, data.targets)
    longest = int(data.positions.max()) + 1
    check_positions(loaded.model, longest, "that is calibrated", "--max-tokens")
    result = evaluate(
        loaded.model,
        data,
        batch_size=plan.batch_size,
        progress=lambda done, total, text: progress(done, total, ask),
    )
    assert result.scores is not None
    plain = result.scores.astype(np.float64)
    if ask == "letters":
        return {"plain": plain}
    prior = with_prior(loaded.model, asked, data, loaded.tokenizer).prior
    assert prior is not None
    lengths = _floats(data.choice_lengths)
    pmi = plain - _floats(prior)
    return {"plain": plain, "length": plain / lengths, "pmi": pmi, "pmi-length": pmi / lengths}


def _floats(tensor: torch.Tensor) -> Any:
    return tensor.cpu().numpy().astype(np.float64)


def best_temperature(scores: Floats, answers: npt.NDArray[np.int64]) -> float:
    """The T > 0 that makes the right choices most probable under softmax(scores / T).

    The mean log-probability is concave in 1/T, so there is one. From 0.001 to 1,000.
    """
    found = minimize_scalar(
        lambda log: -gold(scores, answers, float(np.exp(log))),
        bounds=(np.log(_COLDEST), np.log(_HOTTEST)),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(found.x))


def gold(scores: Floats, answers: npt.NDArray[np.int64], temperature: float) -> float:
    """Mean log-probability (nats) of the right choices."""
    log_p = log_softmax(scores / temperature, axis=1)
    return float(log_p[np.arange(len(answers)), answers].mean())
