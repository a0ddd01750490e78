"""The order of every log's entries: nothing opened twice, summed before it was agreed, or skipped.

One small automaton a role. It follows the code's own crash windows: an attempt may break off
anywhere, and a sum whose result was lost in a crash may be opened again in another attempt.
"""

from __future__ import annotations

import math

import numpy as np

from securefedcollm.evidence.entries import (
    Agreed,
    Asked,
    Audited,
    Decrypted,
    Entry,
    Failed,
    Finished,
    Heard,
    Keyed,
    Lost,
    Opening,
    Polled,
    Refused,
    Round,
    Summed,
    Tallied,
    Told,
    Unmasked,
    Uploaded,
)
from securefedcollm.federation.keeping import counted, ended
from securefedcollm.federation.plan import counting_named, ends_round, sum_name
from securefedcollm.federation.records.server import sum_digest
from securefedcollm.study import Study
from securefedcollm_audits.verification.case import Case, count
from securefedcollm_audits.verification.progress import progress
from securefedcollm_audits.verification.verdict import Check, Faults

_SERVER_ONLY = (Opening, Summed, Failed, Lost, Finished)
_SILO_STEPS = (Uploaded, Agreed, Unmasked)
_KEYED_STEPS = (Uploaded, Told)
_AUTHORITY_ONLY = (Keyed, Decrypted)


def step_order(case: Case, wrong: Faults) -> str:
    """Adversary: the server, which opens first and asks later, or redoes a round it disliked."""
    steps = 0
    if case.server:
        steps += _ServerLog(case.study).follow(case.server, wrong)
    if case.authority:
        steps += _AuthorityLog(case.study).follow(case.authority, wrong)
    for log in case.silos.values():
        steps += _SiloLog(case.study).follow(log, wrong)
    far = progress(case).sentence
    return f"{count(steps, 'step')} in {count(len(case.logs), 'log')}; {far}"


class _ServerLog:
    """Sum s, attempts upwards; in an attempt opening, then sum; with the last of a round finished;
    sum s + 1, until the study's patience is at its end."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._round = 0
        self._attempt: Round | None = None
        self._opening: Opening | None = None
        self._summed: Summed | None = None
        self._opened = self._ended = False
        self._last = -1
        self._scores: list[float | None] = []

    def follow(self, log: list[Entry], wrong: Faults) -> int:
        for entry in log[1:]:
            what = entry.what
            if isinstance(what, Round):
                fault = self._begin(what)
            elif isinstance(what, _SERVER_ONLY):
                fault = self._step(what)
            else:
                at_any_time = isinstance(what, Audited | Asked | Heard | Polled | Tallied)
                fault = "" if at_any_time else "has no place in a server's log"
            if fault:
                wrong(entry, fault)
        return len(log) - 1

    def _name(self, sum_: int) -> str:
        return sum_name(self._study, sum_)

    def _next(self) -> None:
        self._round, self._last = self._round + 1, -1
        self._attempt = self._opening = self._summed = None
        self._opened = self._ended = False

    def _begin(self, what: Round) -> str:
        within = self._ended and not ends_round(self._study, self._round)
        if within and what.round == self._round + 1:  # a joint step, with nothing between
            self._next()
        if what.round != self._round or what.round >= self._study.sums:
            return f"{self._name(what.round)} out of order; {self._name(self._round)} is due"
        if ended(self._study, self._scores):  # adversary: a server that wants more of silos
            return f"{self._name(what.round)} after the study's patience had ended the run"
        fault = "" if what.attempt > self._last else f"attempt {what.attempt} again"
        self._attempt, self._opening, self._last = what, None, what.attempt
        return fault

    def _step(self, what: Opening | Summed | Failed | Lost | Finished) -> str:
        if what.round != self._round:
            return f"about {self._name(what.round)}; {self._name(self._round)} is under way"
        match what:
            case Opening():
                if not self._now(what) or self._opening:
                    return "opens without an attempt, or an attempt twice"
                self._opening, self._opened = what, True
            case Summed():
                before = self._opening
                if not self._now(what) or not before or before.survivors != what.survivors:
                    return "a sum of other silos than were opened before"
                self._ended, self._summed = True, what
            case Failed():
                if not self._attempt or self._attempt.attempt != what.attempt:
                    return "the failure of an attempt that was not under way"
            case Lost():
                # On a graph silos are bound to the survivors before they open anything: for that
                # the check `lost` looks into their logs.
                if not self._opened and self._study.graph is None:
                    return "a round is lost only while its sum is being opened"
                self._ended = True
            case Finished():
                if not self._ended or not ends_round(self._study, self._round):
                    return "finished without its last sum"
                summed, named = self._summed, self._attempt.mechanism if self._attempt else None
                self._next()
                self._scores.append(what.score)
                return self._counted(what, summed, named) or self._impossible(what.score)
        return ""

    def _counted(self, what: Finished, summed: Summed | None, named: str | None) -> str:
        """The fault of the counts of a round's validation, and of a score that follows from them.

        ``named``: the mechanism in the sum's header.

        Adversary: a server that states other counts than were opened, to end a run early or to show
        a better model. It cannot change the sum's hash, which silos vouched for before.
        """
        study, counts = self._study, what.counts
        if study.validation is None or summed is None:
            why = "the study sets no records aside" if summed else "its validation's sum is lost"
            accuracy = None
            if counts is not None:
                return f"has counts, and {why}"
        else:
            if counts is None:
                return "leaves out the counts of its validation"
            if sum_digest(np.array(counts)).hex() != summed.sum:
                return "says other counts than its validation opened"
            made = counting_named(study, named)
            accuracy = counted(made, counts, len(summed.survivors))["accuracy"]
        if study.keep is None or study.keep.metric != "private" or what.score == accuracy:
            return ""
        given = math.nan if what.score is None else what.score
        if accuracy is not None and math.isclose(given, accuracy):
            return ""
        return "its score is not the accuracy that follows from its counts"

    def _impossible(self, score: float | None) -> str:
        """Adversary: a server that makes up the end of a run. Within these bounds it still can."""
        keep = self._study.keep
        if score is None:
            return ""
        if keep is None:
            return "has a score, and the study compares no rounds"
        most = math.inf if keep.metric == "loss" else 1.0
        return "" if 0.0 <= score <= most else f"{score:g} is no {keep.metric}"

    def _now(self, what: Opening | Summed) -> bool:
        now = self._attempt
        return now is not None and (now.attempt, now.header) == (what.attempt, what.header)


class _SiloLog:
    """Rounds upwards; in an attempt upload, agreement, unmasking, once each and of one header; or
    upload and the authority's word. On a graph one agreement a round."""

    def __init__(self, study: Study) -> None:
        self._study = study
        keyed = study.scheme == "ckks-authority"
        self._steps: tuple[type, ...] = _KEYED_STEPS if keyed else _SILO_STEPS
        self._at: Round | None = None
        self._said: list[Uploaded | Agreed | Unmasked | Told] = []
        self._answered: set[tuple[int, int, str]] = set()
        self._bound: set[int] = set()

    def follow(self, log: list[Entry], wrong: Faults) -> int:
        for entry in log[1:]:
            what = entry.what
            fault = ""
            if isinstance(what, Round):
                fault = self._begin(what)
            elif isinstance(what, Uploaded | Agreed | Unmasked | Told) and isinstance(
                what, self._steps
            ):
                fault = self._step(what)
            elif isinstance(what, (*_SERVER_ONLY, *_AUTHORITY_ONLY, *_SILO_STEPS, Told)):
                fault = "has no place in a silo's log"
            if fault:
                wrong(entry, fault)
        return len(log) - 1

    def _begin(self, what: Round) -> str:
        before = self._at
        self._at, self._said = what, []
        if what.round >= self._study.sums:
            return f"sum {what.round + 1} of a study of {self._study.sums}"
        if before and (what.round, what.attempt) < (before.round, before.attempt):
            return f"{sum_name(self._study, what.round)} after a later one"
        return ""

    def _step(self, what: Uploaded | Agreed | Unmasked | Told) -> str:
        now = self._at
        key = (what.round, what.attempt, type(what).__name__)
        again = key in self._answered
        self._answered.add(key)
        place = (what.round, what.attempt, what.header)
        if now is None or (now.round, now.attempt, now.header) != place:
            return "belongs to no attempt that this silo was in"
        if again or len(self._said) != self._steps.index(type(what)):
            return "out of order, or twice in one attempt"
        if isinstance(what, Agreed | Told) and what.delivery != self._said[-1].delivery:  # type: ignore[union-attr]
            return "agrees on another delivery than it uploaded for"
        if isinstance(what, Agreed) and self._study.graph is not None:
            if what.round in self._bound:
                return "agrees to a second list in one round"
            self._bound.add(what.round)
        if isinstance(what, Unmasked):
            agreed = self._said[-1]
            assert isinstance(agreed, Agreed)
            mine = (agreed.lists, agreed.survivors, agreed.dropouts)
            if mine != (what.lists, what.seeds_of, what.keys_of):
                return "unmasks other lists than it agreed to"
        self._said.append(what)
        return ""


class _AuthorityLog:
    """Rounds and attempts upwards; in an attempt a key, then at most one decryption."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._at: Keyed | None = None
        self._done = False

    def follow(self, log: list[Entry], wrong: Faults) -> int:
        for entry in log[1:]:
            what, fault = entry.what, ""
            if isinstance(what, Keyed):
                fault = self._begin(what)
            elif isinstance(what, Decrypted):
                fault = self._decrypt(what)
            elif not isinstance(what, Refused):
                fault = "has no place in an authority's log"
            if fault:
                wrong(entry, fault)
        return len(log) - 1

    def _begin(self, what: Keyed) -> str:
        before, self._at, self._done = self._at, what, False
        if what.round >= self._study.sums:
            return f"sum {what.round + 1} of a study of {self._study.sums}"
        if before and (what.round, what.attempt) < (before.round, before.attempt):
            return f"{sum_name(self._study, what.round)} after a later one"
        return ""

    def _decrypt(self, what: Decrypted) -> str:
        now, done = self._at, self._done
        place = (what.round, what.attempt, what.header)
        if now is None or (now.round, now.attempt, now.header) != place:
            return "decrypts without a key of this attempt"
        self._done = True
        return "decrypts twice under one key" if done else ""


CHECKS = (Check("step-order", "Every step came in its order", step_order),)
