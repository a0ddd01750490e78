"""A classifier's scores by class: F1, AUROC and the confusion matrix.

A score that the records do not determine is None, "not defined": F1 of a class that is neither
there nor ever predicted, AUROC of a class that no record has, or all have. Means are over the
classes for which the score is defined, as scikit-learn's ``f1_score(average="macro")`` has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassScores:
    """``confusion[g][p]``: records of class g that were predicted as p; the rest by class."""

    confusion: list[list[int]]
    f1: list[float | None]
    auroc: list[float | None]

    @property
    def macro_f1(self) -> float | None:
        """Mean of the F1 scores that are defined."""
        return _mean(self.f1)

    @property
    def macro_auroc(self) -> float | None:
        """Mean of the one-vs-rest AUROCs that are defined."""
        return _mean(self.auroc)


def class_scores(scores: Floats, gold: Integers) -> ClassScores:
    """Scores of predictions; the first class of the highest score is predicted.

    Args:
        scores: float [N, C], whose softmax is the predicted distribution.
        gold: int [N], the right class of each record.
    """
    count = scores.shape[1]
    predicted = scores.argmax(1)
    confusion = np.zeros((count, count), dtype=np.int64)
    np.add.at(confusion, (gold, predicted), 1)
    f1: list[float | None] = []
    for c in range(count):
        # 2 TP / (2 TP + FP + FN): the denominator is records of c plus predictions of c.
        total = int(confusion[c].sum() + confusion[:, c].sum())
        f1.append(2 * int(confusion[c, c]) / total if total else None)
    odds = _log_odds(scores)
    return ClassScores(
        confusion=confusion.tolist(),
        f1=f1,
        auroc=[area(odds[:, c], gold == c) for c in range(count)],
    )


def area(scores: Floats, positive: npt.NDArray[np.bool_]) -> float | None:
    """The area under the ROC curve: how often a positive has the higher score; ties count half.

    None if all records are positive, or none is.
    """
    ahead, behind = int(positive.sum()), int((~positive).sum())
    if not ahead or not behind:
        return None
    # Mann-Whitney: the mean rank of equal scores, summed over the positives.
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[positive].sum() - ahead * (ahead + 1) / 2) / (ahead * behind))


def _log_odds(scores: Floats) -> Floats:
    """log(p / (1 - p)) of every class: ordered as p is, without its rounding to 1."""
    exact = scores.astype(np.float64)
    columns = []
    for c in range(exact.shape[1]):
        others = np.delete(exact, c, axis=1)
        columns.append(exact[:, c] - np.logaddexp.reduce(others, axis=1))
    return np.stack(columns, axis=1)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
