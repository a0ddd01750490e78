"""Questions to documents: within each silo's limit, and the same in the logs of both ends.

A frame of a question is signed by its author over everything before it. The logs keep signatures,
so whoever made an entry up, or left one out, contradicts what the other end holds and is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from securefedcollm.errors import CryptoError
from securefedcollm.evidence.entries import Answers, Asked, Counted, Entry, Heard, Served, Slip
from securefedcollm.primitives import verify
from securefedcollm_audits.verification.case import Case, NotCovered, count
from securefedcollm_audits.verification.verdict import Check, Faults

if TYPE_CHECKING:
    from securefedcollm.aggregation.messages import Signable


class _Answered(NamedTuple):
    """A question in the log of the silo that answered it, signed by its asker."""

    entry: Entry
    what: Counted
    served: Served | None


class _Put(NamedTuple):
    """A question to one silo in its asker's log. ``heard``: the entry that says what came back."""

    entry: Entry
    terms: str
    heard: Entry | None
    answers: Answers | None


def counted(case: Case, wrong: Faults) -> str:
    """Adversary: a silo that answers an asker more often than the study allows, or the same
    question twice; that makes up a member's questions, to use up its limit; that spreads one
    member's questions over several names."""
    _need_questions(case)
    plan = case.study.retrieval
    most = plan.questions if plan else 0
    total = highest = 0
    for silo in case.silos:
        numbers: dict[bytes | None, set[int]] = {}
        for found in _answered_by(case, silo, wrong).values():
            asker, number = found.what.asker, found.what.number
            # By key, so that no two names of one member have a limit each.
            mine = numbers.setdefault(case.key(asker), set())
            if number in mine:
                wrong(found.entry, f"{silo} counts two questions of {asker} as number {number}")
            mine.add(number)
            if max(number, len(mine)) > most:
                wrong(found.entry, f"{silo} answered question {number} of {asker}, beyond {most}")
            total, highest = total + 1, max(highest, number)
    _same_terms(case, wrong)
    return (
        f"{count(total, 'answer')} in the logs of {count(len(case.silos), 'silo')}; the most for "
        f"one asker is {highest}, of {most}"
    )


def agree(case: Case, wrong: Faults) -> str:
    """Adversary: an asker that hides a question which it asked; a silo that hides an answer, or
    says that it gave another; either of them with an entry that it made up in the other's name."""
    _need_questions(case)
    both = lost = 0
    put = {name: _put_by(case, name, wrong) for name in case.logs}
    answered = {name: _answered_by(case, name, Faults()) for name in case.silos}
    for silo, mine in answered.items():
        for question, found in mine.items():
            asker = found.what.asker
            if asker in put and (silo, question) not in put[asker]:
                wrong(
                    found.entry,
                    f"{asker} signed this question to {silo}, and its own log does not have it",
                )
    for asker, theirs in put.items():
        for (silo, question), asked in theirs.items():
            seen = answered.get(silo, {}).get(question)
            if asked.answers is None:
                lost += seen is not None
                continue
            both += _same_answers(case, (asker, silo, question), asked, seen, wrong)
    said = f"{count(both, 'answer')} the same at both ends"
    return said + (f"; {count(lost, 'answer')} did not arrive" if lost else "")


def concern(case: Case) -> bool:
    """Whether there is anything to check: the study's section, or an entry about a question."""
    plan = case.study.retrieval
    return (plan is not None and plan.mode == "documents") or _asked(case)


def _asked(case: Case) -> bool:
    kinds = (Asked, Heard, Counted, Served)
    return any(isinstance(entry.what, kinds) for log in case.logs.values() for entry in log)


def _need_questions(case: Case) -> None:
    if not _asked(case):
        raise NotCovered("nobody asked for documents")


def _answered_by(case: Case, silo: str, wrong: Faults) -> dict[str, _Answered]:
    """Question → what ``silo`` wrote of it; only those that their askers signed."""
    from securefedcollm.retrieval.messages import Question

    found: dict[str, _Answered] = {}
    for entry in case.logs[silo]:
        what = entry.what
        if isinstance(what, Counted):
            if case.log_name(what.asker) != what.asker:
                wrong(entry, f"{silo} answered {what.asker!r}, and no log is called that")
                continue
            header = _header(case, what.asker, silo, what.terms)
            question = _after(case, what.asker, header, (Question, what.question), header)
            if question is None or what.asker == silo:
                wrong(entry, f"{silo} has no question that {what.asker} signed")
            elif question.hex() in found:
                wrong(entry, f"{silo} answered one question of {what.asker} twice")
            else:
                found[question.hex()] = _Answered(entry, what, None)
        elif isinstance(what, Served):
            before = found.get(what.question)
            if before is None or before.served is not None:
                wrong(entry, f"{silo} served passages without a question, or twice")
            else:
                found[what.question] = before._replace(served=what)
    return found


def _put_by(case: Case, asker: str, wrong: Faults) -> dict[tuple[str, str], _Put]:
    """(silo, question) → what ``asker`` wrote of it."""
    found: dict[tuple[str, str], _Put] = {}
    waiting: dict[int, Asked] = {}
    for entry in case.logs[asker]:
        what = entry.what
        if isinstance(what, Asked):
            waiting[entry.seq] = what
            for silo, question in what.questions.items():
                found[silo, question] = _Put(entry, what.terms, None, None)
        elif isinstance(what, Heard):
            asked = waiting.pop(what.asked, None)
            if asked is None or not what.answers.keys() <= asked.questions.keys():
                wrong(entry, f"{asker} heard answers to what it did not ask, or twice")
                continue
            for silo, question in asked.questions.items():
                before = found[silo, question]
                found[silo, question] = before._replace(heard=entry, answers=what.answers.get(silo))
    return found


def _same_answers(
    case: Case,
    names: tuple[str, str, str],
    asked: _Put,
    seen: _Answered | None,
    wrong: Faults,
) -> int:
    """Whether an answer that the asker holds is the one of the silo's log: 1 or 0."""
    asker, silo, _ = names
    assert asked.heard is not None
    made = _transcripts(case, names, asked)
    if made is None:
        wrong(asked.heard, f"{asker} has no answer that {silo} signed to this question")
        return 0
    if silo not in case.silos:
        return 0
    scores, blocks = made
    if seen is None:
        wrong(
            asked.heard, f"{silo} signed this answer to {asker}, and its own log does not have it"
        )
        return 0
    if seen.what.scores != scores:
        wrong(seen.entry, f"{silo} signed other scores for {asker} than its own log says")
        return 0
    if blocks and (seen.served is None or seen.served.blocks != blocks):
        wrong(seen.entry, f"{silo} signed other passages for {asker} than its own log says")
        return 0
    return 1


def _transcripts(case: Case, names: tuple[str, str, str], asked: _Put) -> tuple[str, str] | None:
    """The digests of all frames up to the scores, and up to the passages (empty: none came).

    None if a signature is not the silo's, or not over what went before.
    """
    from securefedcollm.retrieval.messages import Blocks, Scores, Selection

    asker, silo, question = names
    answers = asked.answers
    header = _header(case, asker, silo, asked.terms)
    assert answers is not None
    scores = _after(case, silo, header, (Scores, answers.scores), bytes.fromhex(question))
    if scores is None or (answers.selection is None) != (answers.blocks is None):
        return None
    if answers.selection is None or answers.blocks is None:
        return scores.hex(), ""
    selection = _after(case, asker, header, (Selection, answers.selection), scores)
    blocks = _after(case, silo, header, (Blocks, answers.blocks), selection)
    return None if blocks is None else (scores.hex(), blocks.hex())


def _header(case: Case, asker: str, silo: str, terms: str) -> bytes | None:
    """The digest of the header of their conversation; None if one of them is no participant, or
    is not called as its log is."""
    from securefedcollm.retrieval.messages import header_digest

    keys = case.key(asker), case.key(silo)
    if keys[0] is None or keys[1] is None:
        return None
    if (case.log_name(asker), case.log_name(silo)) != (asker, silo):
        return None
    return header_digest(case.digest, case.run, keys[0], keys[1], bytes.fromhex(terms))


def _after(
    case: Case,
    author: str,
    header: bytes | None,
    frame: tuple[type[Signable], Slip],
    before: bytes | None,
) -> bytes | None:
    """The transcript after a frame; None if ``author`` did not sign it after ``before``."""
    from securefedcollm.retrieval.messages import Receipt, transcript

    kind, slip = frame
    receipt = Receipt(bytes.fromhex(slip.signed), bytes.fromhex(slip.signature))
    key = case.key(author)
    if header is None or key is None or before is None or receipt.before != before:
        return None
    try:
        verify(key, kind.CONTEXT, receipt.signed, receipt.signature)
    except CryptoError:
        return None
    return transcript(header, kind, receipt.signed)


def _same_terms(case: Case, wrong: Faults) -> None:
    """Adversary: a participant with another encoder, or other sizes, than was agreed; and one that
    writes first, so that the others seem to be that participant."""
    agreed = _agreed_terms(case)
    seen: dict[str, Entry] = {}
    for log in case.logs.values():
        for entry in log:
            if isinstance(entry.what, Asked | Counted):
                if agreed is None:
                    seen.setdefault(entry.what.terms, entry)
                elif entry.what.terms != agreed:
                    wrong(entry, "has other terms (sizes, encoder or reduction) than were agreed")
    different = list(seen.values())
    for entry in different[1:]:
        wrong(
            entry,
            f"this and {different[0].place} have different terms (sizes, encoder or reduction); "
            "the study pins none, so nothing says which of the two is right",
        )


def _agreed_terms(case: Case) -> str | None:
    """The digest of the study's terms; None where it does not pin encoder and reduction."""
    from securefedcollm.retrieval.terms import Terms, space_digest

    plan = case.study.retrieval
    if plan is None or plan.encoder.sha256 is None or plan.reduction is None:
        return None
    reduction = bytes.fromhex(plan.reduction.sha256)
    space = space_digest(plan.encoder.sha256, plan.encoder.layer, reduction)
    terms = Terms(plan.documents, plan.dimension, plan.block_bytes, plan.fetched, space)
    return terms.digest.hex()


CHECKS = (
    Check("questions", "No silo answered more questions than the study allows", counted),
    Check("answers", "Askers and silos tell the same story of every question", agree),
)
