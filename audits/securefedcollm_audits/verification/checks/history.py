"""The server's log against the others': what the server alone could omit, write off or misdate.

These lies need nobody else's key, and the server's log is consistent in itself. The logs of silos,
and of the authority, reveal them.
"""

from __future__ import annotations

import calendar
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from operator import attrgetter
from typing import Final

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
    Round,
    Tallied,
    Told,
    Unmasked,
    Uploaded,
    Witnessed,
)
from securefedcollm.federation.plan import sum_name
from securefedcollm_audits.verification.case import SERVER, Case, NotCovered, count, of
from securefedcollm_audits.verification.verdict import Check, Faults

STEP_BACK: Final = 3600
"""Seconds that a clock may be set back while a log is kept."""
APART: Final = 24 * 3600
"""Seconds that the clocks of two honest organisations may differ."""
DELIVERY: Final = 24 * 3600
"""Seconds from when the server begins an attempt until a silo, back by then, hears of it."""


def attempts(case: Case, wrong: Faults) -> str:
    """Adversary: a server that leaves out an attempt for which silos trained, uploaded and agreed,
    and so how often it asked; one that goes on after its log says that the run is over."""
    case.need_server()
    others = {name: log for name, log in case.logs.items() if name != SERVER}
    if not others:
        raise NotCovered("only the server's log is in this bundle")
    known = {what.header for _, what in of(case.server, Round)}
    begun = [(what.round, what.attempt) for _, what in of(case.server, Round)]
    newest = max(begun, default=(-1, -1))
    finished = max((what.round for _, what in of(case.server, Finished)), default=-1)
    seen, newer = set[str](), 0
    for log in others.values():
        vouched, hidden = False, dict[str, Entry]()
        for entry in reversed(log):
            what = entry.what
            if isinstance(what, Witnessed) and what.size <= len(case.server):
                vouched = True  # the server's log says all that this silo did before
            if not isinstance(what, Round | Keyed | Uploaded | Agreed):
                continue
            seen.add(what.header)
            if what.header in known:
                continue
            past = case.over or what.round <= finished or (what.round, what.attempt) <= newest
            if vouched or past:
                hidden[what.header] = entry
            else:
                newer += 1
        for entry in reversed(hidden.values()):
            wrong(entry, "the server's log hides this attempt")
    late = f"; {newer} of their entries are newer than the server's log" if newer else ""
    return f"{count(len(seen), 'attempt')} in the logs of {count(len(others), 'other')}" + late


def lost(case: Case, wrong: Faults) -> str:
    """Adversary: a server that keeps a sum and writes that it was lost.

    An honest one calls a sum lost when two attempts in a row have failed for which enough silos had
    trained; on a graph, where no second attempt can succeed, when one has. A server that really
    lets them fail cannot be told from an unlucky one: then the sum counts as released if enough
    silos have answered its opening.

    On a graph silos are bound before the server's log has an opening. So a quorum must at least
    have uploaded, by silos' logs.
    """
    case.need_server()
    failed: dict[int, list[tuple[Entry, Failed]]] = defaultdict(list)
    before: Entry | None = None
    sums, openable, opened, bound = 0, _openable(case), [], _bindable(case)
    knowing = _knowing(case)
    least, words = (1, "an attempt") if case.study.graph else (2, "two attempts")
    for entry in case.server:
        what = entry.what
        if isinstance(what, Failed):
            failed[what.round].append((entry, what))
        elif isinstance(what, Lost):
            sums += 1
            last = failed[what.round][-least:]
            if len(last) < least or before is not last[-1][0]:
                wrong(entry, f"called lost without {words} that failed")
            if what.round not in bound:
                wrong(entry, "called lost, and too few silos had uploaded to be bound to a list")
            for where, attempt in last:
                if knowing[attempt.round, attempt.attempt] < case.study.minimum:
                    wrong(where, "the failure of an attempt that too few silos know of")
            if what.round in openable:
                opened.append(sum_name(case.study, what.round))
        if not isinstance(what, Audited | Asked | Heard | Polled | Tallied):
            before = entry
    if not sums:
        return "no sum is called lost"
    said = f"{count(sums, 'sum')} called lost, each after {words} that failed"
    if opened:
        said += f"; enough silos answered to open {', '.join(opened)}: count it as released"
    return said


def _knowing(case: Case) -> Counter[tuple[int, int]]:
    """(sum, attempt) of the server's log → silos that were in it, or whose logs are not here."""
    told = Counter(
        header
        for log in case.silos.values()
        for header in {what.header for _, what in of(log, Round)}
    )
    absent = case.study.silos.count - len(case.silos)
    return Counter(
        {(w.round, w.attempt): absent + told[w.header] for _, w in of(case.server, Round)}
    )


def _bindable(case: Case) -> set[int]:
    """Sums of which silos may have agreed to a list: one was opened, or a quorum had uploaded for
    one attempt, counting silos whose logs are not here."""
    uploads = Counter(
        (what.round, what.header) for log in case.silos.values() for _, what in of(log, Uploaded)
    )
    absent = case.study.silos.count - len(case.silos)
    opened = {opening.round for _, opening in of(case.server, Opening)}
    if absent >= case.study.quorum:
        return opened | set(range(case.study.sums))
    enough = case.study.quorum - absent
    return opened | {round_ for (round_, _), many in uploads.items() if many >= enough}


def _openable(case: Case) -> set[int]:
    """Sums that can be opened with what silos, or the authority, say they gave away."""
    answers = Counter(
        entry.what.header
        for log in case.logs.values()
        for entry in log
        if isinstance(entry.what, Unmasked | Told | Decrypted)
    )
    found = set()
    for _, opening in of(case.server, Opening):
        graph, survivors = case.study.graph, len(opening.survivors)
        needed = case.study.threshold if case.study.masked else survivors
        needed = 1 if case.keyed else graph.shares if graph else needed
        if answers[opening.header] >= needed:
            found.add(opening.round)
    return found


def clocks(case: Case, wrong: Faults) -> str:
    """Adversary: a server that writes false times; a participant whose clock runs backwards."""
    for log in case.logs.values():
        for entry, latest in zip(log[1:], accumulate(map(_time, log), max), strict=False):
            if _time(entry) < latest - STEP_BACK:
                wrong(entry, f"is dated {entry.time}, over an hour before an earlier entry")
    compared = _against_witnesses(case, wrong) + _against_attempts(case, wrong)
    if not compared:
        return f"{count(len(case.logs), 'log')}, none runs backwards; no two clocks to compare"
    return f"{count(len(case.logs), 'log')}, none runs backwards; {compared} times agree to a day"


_dated = attrgetter("time")  # one spelling, which sorts as time does


def _time(entry: Entry) -> int:
    return calendar.timegm(time.strptime(entry.time, "%Y-%m-%dT%H:%M:%SZ"))


def _against_witnesses(case: Case, wrong: Faults) -> int:
    """Entries that silos vouched for had happened by then, and the rest had not."""
    latest = list(accumulate(case.server, partial(max, key=_dated)))
    earliest = list(accumulate(case.server[::-1], partial(min, key=_dated)))[::-1]
    compared = 0
    for name, size, when in _vouched(case):
        compared += 1
        if size > len(case.server):
            continue  # the server's log here is older
        if size and _time(latest[size - 1]) > when + APART:
            entry = latest[size - 1]
            wrong(entry, f"is dated {entry.time}, over a day after {name} vouched for it")
        if size < len(case.server) and _time(earliest[size]) < when - APART:
            entry = earliest[size]
            wrong(entry, f"is dated {entry.time}, over a day before {name} vouched for less")
    return compared


def _vouched(case: Case) -> Iterator[tuple[str, int, int]]:
    """(silo, entries of the server's log, time by the silo's clock): as its log has it, or, if that
    is not here, its countersignature."""
    if not case.server:
        return
    for name, log in case.silos.items():
        for entry, what in of(log, Witnessed):
            yield name, what.size, _time(entry)
    for head in case.bundle.heads[SERVER]:
        for line in head.lines[1:]:
            name, _ = case.witnesses.get(line[0], ("", b""))
            if name and name not in case.silos:
                yield name, head.size, case.vouched(head, line)


def _against_attempts(case: Case, wrong: Faults) -> int:
    """Silos and the authority hear of an attempt after the server began it, and soon."""
    begun = {what.header: entry for entry, what in of(case.server, Round)}
    compared = 0
    for log in case.logs.values():
        for entry in log:
            if entry.owner == SERVER or not isinstance(entry.what, Round | Keyed):
                continue
            start = begun.get(entry.what.header)
            if start is None:
                continue
            compared += 1
            if not -APART <= _time(entry) - _time(start) <= APART + DELIVERY:
                wrong(start, f"is dated {start.time}, and {entry.place} {entry.time}")
    return compared


def released_sum(case: Case, wrong: Faults) -> str:
    """Adversary: a server that releases adapters which have nothing to do with the opened sums, or
    writes down the hash of another sum. Of a sum there is only a hash here, silos never see it, and
    the server's phase lies between it and the next adapter: no check can tell."""
    raise NotCovered("that the adapters follow from the opened sums is the server's word alone")


CHECKS = (
    Check("attempts", "The server's log knows every attempt that others took part in", attempts),
    Check("lost", "Sums that are called lost were given up as an honest server does", lost),
    Check("clocks", "Nobody's clock runs backwards, and they agree", clocks),
    Check("released-sum", "The adapters follow from the opened sums", released_sum),
)
