"""Questions to records: charged and noised as the study says, and the same in everybody's log.

A poll is signed by its asker, and the header of its sum follows from it, from the study and from
the roster. So whoever was asked something else, or noises less, has another header.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from securefedcollm.aggregation.masking.messages import Agreement
from securefedcollm.aggregation.messages import UNSIGNED, lists_digest
from securefedcollm.errors import CryptoError, SecureFedCoLLMError
from securefedcollm.evidence.entries import Entry, Polled, Slip, Tallied, Voted, Voting
from securefedcollm.federation.questions.polls import (
    Poll,
    poll_digest,
    poll_header,
    sum_header,
    votes_of,
)
from securefedcollm.primitives import verify
from securefedcollm.privacy.votes import MOST_CHOICES, Votes
from securefedcollm.study import Study
from securefedcollm_audits.verification.case import Case, NotCovered, count, of
from securefedcollm_audits.verification.charged import decode_events
from securefedcollm_audits.verification.verdict import Check, Faults


class _Asked(NamedTuple):
    """A poll in its asker's log, and what came of it."""

    asker: str
    entry: Entry
    tallied: Tallied | None


def charged(case: Case, wrong: Faults) -> str:
    """Adversary: a silo's operator who charges less than left, or noises less than was agreed; an
    asker who puts another question to every silo; a silo that makes up a member's questions."""
    _need(case)
    votes = 0
    for silo, log in case.silos.items():
        begun: dict[str, Voting] = {}
        ended: set[str] = set()
        for entry in log:
            what = entry.what
            if isinstance(what, Voting):
                votes += 1
                fault = _begun(case, what) or ("votes twice" if what.header in begun else "")
                begun[what.header] = what
            elif isinstance(what, Voted):
                voting = begun.get(what.header)
                fault = "opens votes that never left" if voting is None else ""
                fault = fault or ("opens twice" if what.header in ended else "")
                fault = fault or _settled(case, silo, what, voting)
                ended.add(what.header)
            else:
                continue
            if fault:
                wrong(entry, fault)
    return f"{count(votes, 'vote')} of {count(len(case.silos), 'silo')}, each charged and noised"


def agree(case: Case, wrong: Faults) -> str:
    """Adversary: an asker that hides a question, or says that others answered it; silos that say
    so of each other."""
    _need(case)
    asked = _asked(case, wrong)
    said = 0
    for silo, log in case.silos.items():
        left = {what.header for _, what in of(log, Voting)}
        for entry, what in of(log, Voting):
            if what.asker in case.logs and what.header not in asked:
                wrong(entry, f"{what.asker} signed this question, and its own log does not have it")
        for entry, voted in of(log, Voted):
            poll = asked.get(voted.header)
            told = poll.tallied if poll else None
            if told is not None and (told.lists, told.survivors) != (voted.lists, voted.survivors):
                wrong(entry, f"{silo} and its asker name other silos of this sum")
        for header, poll in asked.items():
            if poll.tallied is None or silo not in poll.tallied.survivors:
                continue
            said += 1
            # A silo that is in the sum uploaded; it may have been lost before it unmasked.
            if header not in left:
                wrong(poll.entry, f"{silo} is in the sum, and its own log does not have it")
    return f"{count(len(asked), 'question')}, {count(said, 'vote')} the same at both ends"


def concern(case: Case) -> bool:
    """Whether there is anything to check."""
    plan = case.study.retrieval
    return (plan is not None and plan.mode == "answers") or any(_all(case))


def _all(case: Case) -> Iterator[Entry]:
    kinds = (Polled, Tallied, Voting, Voted)
    return (e for log in case.logs.values() for e in log if isinstance(e.what, kinds))


def _need(case: Case) -> None:
    if not any(_all(case)):
        raise NotCovered("nobody asked records")
    if case.study.retrieval is None or case.study.retrieval.mode != "answers":
        raise NotCovered("the study asks no records")


def _begun(case: Case, what: Voting) -> str:
    """The fault of votes that left a silo; empty if there is none."""
    votes = _mechanism(case.study, what.values)
    if votes is None:
        return "has an impossible number of choices"
    events = decode_events(what.events)
    if events != (votes.event(),):
        return "charges for other noise than the study's"
    return _unsigned(case, what.asker, what.poll) or _other_sum(case, what.poll, votes, what.header)


def _settled(case: Case, silo: str, what: Voted, begun: Voting | None) -> str:
    if begun is None:
        return ""
    survivors = set(what.survivors)
    if silo not in survivors or len(survivors) < case.study.quorum:
        return f"opens a sum of {len(survivors)} silos; {case.study.quorum} are needed"
    if lists_of(case, bytes.fromhex(begun.delivery), what) != what.lists:
        return "what was signed is not the digest of these lists"
    due = decode_events(begun.events)
    return "" if decode_events(what.events) == due else "settles for other noise than there was"


def lists_of(case: Case, delivery: bytes, what: Voted | Tallied) -> str:
    """What survivors signed, hex; empty where a name is on no roster."""
    roster = case.roster
    known = set(roster.names)
    if not {*what.survivors, *what.dropouts} <= known:
        return ""
    places = [[roster.index(name) for name in names] for names in (what.survivors, what.dropouts)]
    return lists_digest(delivery, *places).hex()


def _asked(case: Case, wrong: Faults) -> dict[str, _Asked]:
    """Header → the poll of its asker's log."""
    found: dict[str, _Asked] = {}
    for asker, log in case.logs.items():
        for entry in log:
            what = entry.what
            if isinstance(what, Polled):
                votes = _mechanism(case.study, what.values)
                fault = _unsigned(case, asker, what.poll)
                if votes is None or what.header in found:
                    fault = fault or "asks twice, or with an impossible number of choices"
                else:
                    fault = fault or _other_sum(case, what.poll, votes, what.header)
                    found[what.header] = _Asked(asker, entry, None)
            elif isinstance(what, Tallied):
                before = found.get(what.header)
                if before is None or before.asker != asker or before.tallied is not None:
                    fault = "sums what was not asked, or twice"
                else:
                    found[what.header] = before._replace(tallied=what)
                    fault = _tallied(case, what)
            else:
                continue
            if fault:
                wrong(entry, fault)
    return found


def _tallied(case: Case, what: Tallied) -> str:
    lists = lists_of(case, bytes.fromhex(what.delivery), what)
    if lists != what.lists or len({*what.survivors}) < case.study.quorum:
        return "opens a sum of too few silos, or of others than were signed"
    if not set(what.agreements) <= set(what.survivors):
        return "an agreement by a silo that is not in the sum"
    if len(what.agreements) < case.study.threshold:
        return f"{len(what.agreements)} agreements; {case.study.threshold} are needed"
    for name, signature in what.agreements.items():
        index = case.roster.index(name)
        said = Agreement(
            header=bytes.fromhex(what.header),
            index=index,
            signature=UNSIGNED,
            lists=bytes.fromhex(lists),
        )
        if not _signed(case.roster.key(index), said.CONTEXT, said.signed(), signature):
            return f"the agreement of {name} does not verify"
    return ""


def _unsigned(case: Case, asker: str, poll: Slip) -> str:
    """The fault of a poll's signature. The asker is called as its log is."""
    key = case.key(asker)
    signed = bytes.fromhex(poll.signed)
    if key is None or case.log_name(asker) != asker or len(signed) != 64:
        return f"{asker!r} is no participant that can ask"
    if signed[:32] != poll_header(case.digest, case.run, key):
        return "the question is of another study, run or asker"
    if not _signed(key, Poll.CONTEXT, signed, poll.signature):
        return f"{asker} did not sign this question"
    return ""


def _other_sum(case: Case, poll: Slip, votes: Votes, header: str) -> str:
    made = sum_header(case.study, case.roster, poll_digest(bytes.fromhex(poll.signed)), votes)
    if made.digest.hex() != header:
        return "the header is not that of the study, roster, question and noise"
    return ""


def _signed(key: bytes, context: bytes, content: bytes, signature: str) -> bool:
    try:
        verify(key, context, content, bytes.fromhex(signature))
    except CryptoError:
        return False
    return True


def _mechanism(study: Study, choices: int) -> Votes | None:
    if not 2 <= choices <= MOST_CHOICES:
        return None
    try:
        return votes_of(study, choices)
    except SecureFedCoLLMError:  # a study whose field has no room: nobody can have voted
        return None


CHECKS = (
    Check("votes", "Every vote of records was charged and noised as the study says", charged),
    Check("tallies", "Askers and silos tell the same story of every question to records", agree),
)
