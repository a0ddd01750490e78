"""The share of each private record that a model answers right, one record at a time.

A record's share enters a noised sum of shares. So it must be a function of the model and that
record alone, to the last bit: a hostile model could amplify what a neighbour moved. Here a pass is
one record, without padding, whatever the rest of the data are (:mod:`.passes`). It holds nothing
else that a record could be coupled with, so no proof is needed.
"""

from __future__ import annotations

import logging
from typing import Final

import numpy as np
import numpy.typing as npt
from torch import nn

from securefedcollm.tuning.evaluate import evaluate
from securefedcollm.tuning.passes import Indices, Widths, passes, shapes_of
from securefedcollm.tuning.questions import EncodedQuestions, Scoring

log = logging.getLogger(__name__)

_ALONE: Final = Widths(tokens=1, most=1, alone=None)


def right_shares(
    model: nn.Module, data: EncodedQuestions, rows: Indices, scoring: Scoring
) -> npt.NDArray[np.float64]:
    """The share in [0, 1] of each of the records ``rows``, float64 [len(rows)], in their order.

    0 or 1 where there are choices; of responses and texts the share of tokens that are the most
    probable one.

    Adversary: a server whose adapter makes the answer to a certain record fail, or be no number.
    Such a record counts as wrong, and the others count as usual: before the noise, no record may
    decide what happens.
    """
    found = np.zeros(len(data))
    for one in passes(data, shapes_of(data, _ALONE), rows, _ALONE):
        try:
            result = evaluate(model, one.batch, scoring=scoring, batch_size=1)
        except Exception as error:  # whatever this record made fail
            log.error("a record that is set aside cannot be answered: %s", error)
            continue
        found[one.rows] = np.where(np.isfinite(result.gold_log_prob), result.correct, 0.0)
    return found[rows]
