"""The privacy budget: charged before anything left, never less than the releases, within ε."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from securefedcollm.evidence.entries import (
    Entry,
    Released,
    Reserved,
    Round,
    Settled,
    Spent,
    Told,
    Unmasked,
    Uploaded,
    Voided,
)
from securefedcollm.federation.plan import (
    adaptive_clip,
    joint_setting,
    stating_sums,
    sum_name,
    sums_to_an_end,
    validates,
)
from securefedcollm.privacy import counting, joint, silo_unit
from securefedcollm.privacy.accounting import TIGHT_SHARE
from securefedcollm.privacy.dominance import dominates
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Event,
    LayeredGaussian,
    PoissonGaussian,
    merge,
    times,
)
from securefedcollm.study import Study
from securefedcollm.study.config import Privacy
from securefedcollm_audits.verification.case import Case, NotCovered, count, of
from securefedcollm_audits.verification.charged import decode_events
from securefedcollm_audits.verification.second_accountant import bracket
from securefedcollm_audits.verification.verdict import Check, Faults

_Charge = Reserved | Released | Settled | Voided
_MAY_FOLLOW: Final[dict[type[_Charge], tuple[type[_Charge] | None, ...]]] = {
    # A crash between ledger and log repeats an entry; it never skips one on the way down.
    Reserved: (None, Reserved, Released),
    Released: (Reserved, Released),
    Settled: (Released,),
    Voided: (Reserved,),
}
TOLERANCE: Final = 0.02
"""Tolerance on ε: the width of the second accountant's own bracket."""


class Training(NamedTuple):
    """A silo's entries about one training: the newest of each kind."""

    reserved: tuple[Entry, Reserved] | None
    settled: tuple[Entry, Settled] | None
    voided: bool

    @property
    def counted(self) -> tuple[Event, ...]:
        """The events that the budget is charged for."""
        if self.voided or self.reserved is None:
            return ()
        return decode_events((self.settled or self.reserved)[1].events)

    @property
    def sum(self) -> int:
        """The secure sum that it was for; -1 if neither a reservation nor a settlement is here."""
        found = self.reserved or self.settled
        return found[1].round if found else -1


def by_part(study: Study, done: Iterable[Training]) -> list[list[Training]]:
    """The trainings that one record can have been charged for together.

    Where the study has validations, those are charged to the records that are set aside, and to no
    other; else there is one part.
    """
    listed = list(done)
    if study.validation is None:
        return [listed]
    parts: tuple[list[Training], list[Training]] = ([], [])
    for training in listed:
        parts[validates(study, training.sum)].append(training)
    return list(parts)


def trainings(log: list[Entry]) -> list[Training]:
    """All trainings of a silo's log, by first entry."""
    found: dict[tuple[str, str, int, int], Training] = {}
    for entry, what in charges(log):
        key = _key(what)
        now = found.get(key, Training(None, None, False))
        match what:
            case Reserved():
                now = now._replace(reserved=now.reserved or (entry, what))
            case Settled():
                now = now._replace(settled=(entry, what))
            case Voided():
                now = now._replace(voided=True)
            case _:
                pass
        found[key] = now
    return list(found.values())


def charges(log: list[Entry]) -> Iterator[tuple[Entry, _Charge]]:
    """Entries about the ledger."""
    for entry in log:
        if isinstance(entry.what, Reserved | Released | Settled | Voided):
            yield entry, entry.what


def _key(what: _Charge) -> tuple[str, str, int, int]:
    return what.account, what.unit, what.round, what.training


def _claimed(case: Case) -> Privacy:
    """The study's claim.

    Raises:
        NotCovered: it makes none, or no silo's log is here.
    """
    case.need_silos()
    if case.study.privacy is None:
        raise NotCovered("the study claims no differential privacy")
    return case.study.privacy


def charged_first(case: Case, wrong: Faults) -> str:
    """Adversary: a silo's operator who trains first and charges later, or never."""
    _claimed(case)
    uploads = 0
    for log in case.silos.values():
        released: set[int] = set()
        for entry in log:
            if isinstance(entry.what, Released):
                released.add(entry.what.round)
            elif isinstance(entry.what, Uploaded):
                uploads += 1
                if entry.what.round not in released:
                    wrong(entry, "left before it was charged")
    return f"{count(uploads, 'upload')}, each after its charge"


def ledger_order(case: Case, wrong: Faults) -> str:
    """Adversary: an operator who gives a charge back after its update has left."""
    steps = 0
    for log in case.need_silos().values():
        state: dict[tuple[str, str, int, int], _Charge] = {}
        accounts = defaultdict[bool, set[tuple[str, str]]](set)
        for entry, what in charges(log):
            before = state.get(_key(what))
            if (type(before) if before else None) not in _MAY_FOLLOW[type(what)]:
                wrong(entry, f"follows {type(before).__name__.lower() if before else 'nothing'}")
            if isinstance(what, Reserved) and isinstance(before, Reserved) and before != what:
                same = (before.events, before.epsilon, before.delta)
                if same != (what.events, what.epsilon, what.delta):
                    wrong(entry, "reserves something else under the same number")
            state[_key(what)] = what
            # The records set aside are another set than those tuned on.
            part = accounts[validates(case.study, what.round)]
            part.add((what.account, what.unit))
            steps += 1
            if len(part) > 1 or len(set().union(*accounts.values())) < len(accounts):
                wrong(entry, "charges another data set or unit")
    if case.study.privacy is None and steps == 0:
        raise NotCovered("the study claims no differential privacy")
    return f"{count(steps, 'step')} in {count(len(case.silos), 'ledger')}"


def settled_within(case: Case, wrong: Faults) -> str:
    """Adversary: an operator who reserves little and settles more."""
    _claimed(case)
    settled = 0
    for log in case.silos.values():
        for training in trainings(log):
            if training.settled is None:
                continue
            entry, what = training.settled
            settled += 1
            reserved = decode_events(training.reserved[1].events) if training.reserved else ()
            if not dominates(reserved, decode_events(what.events)):
                wrong(entry, "settles more than was reserved")
    return f"{count(settled, 'settlement')}, none above its reservation"


def mechanism(case: Case, wrong: Faults) -> str:
    """Adversary: an operator who charges for more noise, fewer steps or more honest shares than
    there were."""
    privacy = _claimed(case)
    charged = 0
    for log in case.silos.values():
        survivors = {what.round: len(what.seeds_of) for _, what in of(log, Unmasked)}
        survivors |= {what.round: len(what.survivors) for _, what in of(log, Told)}
        begun = {what.round: what for _, what in of(log, Round)}
        for entry, what in charges(log):
            if what.unit != privacy.unit:
                wrong(entry, f"charges the unit {what.unit}; the study's is {privacy.unit}")
            if what.round not in begun:
                name = sum_name(case.study, what.round)
                wrong(entry, f"charges {name}, which has not begun")
                continue
            if isinstance(what, Reserved | Settled):
                shares = survivors.get(what.round) if isinstance(what, Settled) else None
                events = decode_events(what.events)
                fault = _fits(case, what.round, events, shares) or _named(
                    case, events, begun[what.round]
                )
                charged += 1
                if fault:
                    wrong(entry, fault)
    noise = "DP-SGD steps" if privacy.noise == "local" else "noised sums"
    noise += " and noised counts" if case.study.validation else ""
    return f"{count(charged, 'charge')} for {noise} as in the study"


def _fits(case: Case, sum_: int, events: tuple[Event, ...], survivors: int | None) -> str:
    """The fault of a sum's charge; ``survivors``: of the sum, for a settlement."""
    counts = validates(case.study, sum_)
    local = case.study.privacy is not None and case.study.privacy.noise == "local"
    # Adversary: an operator who reserves nothing at all, so that there is no noise to compare.
    if (counts or not local) and len(events) != 1:
        return f"is of {len(events)} releases; the study's is one"
    if counts and case.study.privacy and case.study.privacy.noise == "local":
        for event in events:
            if not isinstance(event, DiscreteGaussian) or event.q != 1.0 or event.count != 1:
                return "is not one pair of noised counts, which the study asks for"
            if (event.shares, event.colluders) != (1, 0):
                return "counts other silos' noise; the study's is each silo's own"
        return ""
    if case.study.privacy and case.study.privacy.noise == "local":
        steps = case.study.local.steps
        if not all(isinstance(event, PoissonGaussian) for event in events):
            return "is not DP-SGD, which the study asks for"
        found = sum(times(event) for event in events)
        return "" if found == steps else f"charges {found} steps; the study has {steps} a round"
    shares = case.study.noise_shares(survivors)
    rate = case.study.local.sampling_rate if case.study.joint and not counts else 1.0
    for event in events:
        if not isinstance(event, DiscreteGaussian) or event.q != rate or event.count != 1:
            return "is not one noised sum, which the study asks for"
        if event.colluders != case.study.silos.colluders:
            return f"allows for {event.colluders} colluders, not {case.study.silos.colluders}"
        if not _as_layered(case.study, event, counts=counts):
            return "is not the noise, whole or in layers, which the study asks for"
        # A failed training is settled at what was reserved: it gave no vector to any sum.
        if event.shares not in {shares, case.study.noise_shares()}:
            return f"counts {event.shares} noise shares; the sum has {shares}"
    return ""


def _as_layered(study: Study, event: DiscreteGaussian, *, counts: bool) -> bool:
    """Whether the noise is in layers exactly if the study removes what a sum does not need.

    Adversary: an operator who opened layers and is charged as if all noise were there.
    """
    assert study.privacy is not None
    if not isinstance(event, LayeredGaussian):
        return study.privacy.excess_noise == "keep" or counts
    made = (event.design, event.least, event.most)
    wanted = (study.silos.colluders, study.noise_shares(), study.silos.count)
    return study.privacy.excess_noise == "remove" and not counts and made == wanted


def _named(case: Case, events: tuple[Event, ...], begun: Round) -> str:
    """Whether the noise charged for is that which all silos bound into the round's header."""
    if validates(case.study, begun.round):
        return _counted(events, begun)
    clip = _clip(case.study, begun)
    if clip is None:
        return "its round has a clip norm that the study cannot lead to"
    for event in events:
        if not isinstance(event, DiscreteGaussian):
            continue
        if _identity(case.study, event, clip) != begun.mechanism:
            return "charges for other noise than the round's header names"
    return ""


def _counted(events: tuple[Event, ...], begun: Round) -> str:
    """The same for a validation, whose sensitivity is the integers of one record."""
    for event in events:
        if not isinstance(event, DiscreteGaussian) or event.values != counting.VALUES:
            return "is not one pair of noised counts, which the study asks for"
        if counting.identity_of(event.share_sigma, event.sensitivity).hex() != begun.mechanism:
            return "charges for other noise than the round's header names"
    return ""


def _clip(study: Study, begun: Round) -> tuple[float, float] | None:
    """(C, s of the count) of a round: the study's, or the round's own where the study lets it
    adapt; None if that is impossible.

    Adversary: a server that names another C, so that updates are spoilt or lost in the noise.
    """
    assert study.privacy is not None
    adapting, adaptive = adaptive_clip(study), study.privacy.adaptive
    if adapting is None or adaptive is None:
        return None if begun.clip else (study.privacy.clip_norm, 0.0)
    if begun.clip is None:
        return None
    norm, counted = begun.clip
    least, most = adapting.reach(begun.round)
    # z_Δ/z_b with z_b = k·z (adaptive_clip.split): 1/√(k² − 1), whatever z is.
    share = norm / math.sqrt(adaptive.count_noise**2 - 1.0)
    return begun.clip if least <= norm <= most and math.isclose(counted, share) else None


def _identity(study: Study, event: DiscreteGaussian, clip: tuple[float, float]) -> str:
    """Name (hex) of the mechanism that releases this event in a round of the study."""
    assert study.privacy is not None
    sigma, bound = event.share_sigma, event.sensitivity
    setting = joint_setting(study, event.values)
    if setting is None:
        return silo_unit.identity_of((*clip, sigma), (bound, event.values)).hex()
    return joint.identity_of(setting, clip[0], sigma, bound).hex()


def budget(case: Case, wrong: Faults) -> str:
    """Adversary: a silo that has spent more than it agreed to, and says so only in its ledger.

    It states its total with every sum that may be the run's last, so none is left out. Only a total
    that no later charge has overtaken counts.
    """
    privacy = _claimed(case)
    worst, said, each = 0.0, 0, sums_to_an_end(case.study)
    for log in case.silos.values():
        reserved = list(of(log, Reserved))
        limits = [(what.epsilon, what.delta) for _, what in reserved]
        for entry, what in of(log, Settled):
            if what.spent is None:
                if -(what.round + 1) % each < stating_sums(case.study):
                    wrong(entry, "may be the run's last, and does not state the total ε spent")
                continue
            said += not reserved or entry.seq > reserved[-1][0].seq
            worst = max(worst, what.spent.epsilon)
            if not limits or what.spent.delta != limits[-1][1]:
                wrong(entry, f"a claim at δ = {what.spent.delta:g}, which was not agreed")
            elif what.spent.epsilon > limits[-1][0]:
                wrong(entry, f"ε = {what.spent.epsilon:.3f} spent of {limits[-1][0]:g}")
    if not said:
        raise NotCovered("no silo has settled the last round yet")
    return f"{count(said, 'claim')}: at most ε = {worst:.3f}; the study allows {privacy.epsilon:g}"


def second_accountant(case: Case, wrong: Faults) -> str:
    """Adversary: an operator whose claim of ε is lower than what was released; a mistake in the
    first accountant."""
    privacy = _claimed(case)
    low = high = 0.0
    methods, others = set(), 0
    for name, log in case.silos.items():
        newest = log[-1] if log else f"logs/{name}.jsonl"
        for part in by_part(case.study, trainings(log)):
            events = merge(event for training in part for event in training.counted)
            tight = bracket(events, TIGHT_SHARE * privacy.delta)
            if not events:
                continue
            low, high = max(low, tight.low), max(high, tight.high)
            methods.add(tight.method)
            if bracket(events, privacy.delta).low > privacy.epsilon:
                wrong(newest, f"its releases cost ε ≥ {tight.low:.3f}; the study allows less")
            for entry, spent in last_claim(part):  # it covers what the earlier ones did
                before = merge(
                    event
                    for kind in by_part(case.study, trainings(log[: entry.seq + 1]))
                    for done in kind
                    if validates(case.study, done.sum) == validates(case.study, part[0].sum)
                    for event in done.counted
                )
                least = bracket(before, spent.delta).low
                if spent.epsilon < least - 1e-9:
                    wrong(entry, f"claims ε = {spent.epsilon:.4f}; it is ≥ {least:.4f}")
                others += spent.epsilon > tight.high * (1.0 + TOLERANCE) + TOLERANCE
    if not methods:
        raise NotCovered("nothing was charged")
    cause = "earlier studies, or choices made on the way"
    more = f"; {count(others, 'claim')} higher, for {cause}" if others else ""
    return f"{' and '.join(sorted(methods))}: ε between {low:.3f} and {high:.3f}{more}"


def last_claim(part: Sequence[Training]) -> list[tuple[Entry, Spent]]:
    """The newest total that a part's settlements state, if one does."""
    found = [training.settled for training in part if training.settled]
    claims = [(entry, what.spent) for entry, what in found if what.spent]
    return sorted(claims, key=lambda claim: claim[0].seq)[-1:]


CHECKS = (
    Check("charged-first", "Nothing left a silo before it was charged", charged_first),
    Check("ledger-order", "Charges are reserved, released, settled, in this order", ledger_order),
    Check("settled", "Nothing was settled above its reservation", settled_within),
    Check("mechanism", "What was charged is what the study asks for", mechanism),
    Check("budget", "ε stays within what was agreed", budget),
    Check("second-accountant", "A second accountant agrees on ε", second_accountant),
)
