"""What a silo's records pay before they answer anything: all the answers that each may give.

Which records a question retrieved shows in how much each has answered. So nothing but
:class:`~.voting.Booth` may depend on that: neither whether a study may tune on the file, nor which
of its records, nor what ε a silo states. To all of them a record has spent the whole claim of the
study's answers, whatever was asked. Adversary: an asker who chooses what is retrieved, and then
watches the rest.

A record that cannot pay casts no vote. Whether it can follows from its own account. So the others
vote as if it were not in the file, and the silo takes part. Adversary: whoever learns from a silo
that stays away that some record of it has spent its budget, in a study that the record was in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.errors import BudgetExceeded, EvidenceError
from securefedcollm.evidence.ledger import PREPAID_RUN
from securefedcollm.federation.questions.polls import (
    answers_name,
    answers_of,
    answers_study,
    claim_of,
    votes_of,
)
from securefedcollm.primitives import sha256
from securefedcollm.privacy.events import Event, encode_events
from securefedcollm.privacy.identities import Records, key_path, name_of
from securefedcollm.privacy.journal import Head
from securefedcollm.privacy.ledger import Entry, Key, Ledger, Reservation
from securefedcollm.privacy.votes import MOST_CHOICES
from securefedcollm.study import Study

log = logging.getLogger(__name__)

UNIT: Final = "record"

_PREPAID: Final = b"securefedcollm/answers/prepaid/v1\0"

Bools = npt.NDArray[np.bool_]


def whole_claim(study: Study) -> Event:
    """What all the answers that one record may give release about it."""
    event = votes_of(study, MOST_CHOICES).event()
    return msgspec.structs.replace(event, count=answers_of(study).questions)


def prepay(ledger: Ledger, study: Study, records: Records, dataset: str, book: str) -> Bools:
    """Charge every record that can pay with all the answers that it may give, once.

    Args:
        ledger: the silo's, which all its studies share.
        dataset: fingerprint of the file.
        book: names the ledger of answers that this pays for: the key of its records. A new one,
            in which nobody has answered anything, is paid for anew. So are other records, and
            other noise.

    Returns:
        which records have paid: bool [n], in file order. What one has paid depends on no other.

    Raises:
        BudgetExceeded: the study asks for more than the owner pinned, whatever is spent.
    """
    _require_pinned(ledger, study)
    answers, event = answers_study(study), whole_claim(study)
    for entry in [*prepayments(ledger, answers, book)]:
        if entry.state == "reserved":  # a kill between the two, perhaps of an older version
            _finish(ledger, Reservation(entry.key, entry.reserved, entry.row))
    paid = paid_for(ledger, study, records, book)
    while not paid.all():
        able = ~paid & _able(ledger, study, records, dataset)
        if not able.any():
            break
        some = records if able.all() else records.only(able)
        try:
            _charge(ledger, study, some, dataset, book, event)
        except BudgetExceeded:  # another process charged one of them just now
            if bool((able == (~paid & _able(ledger, study, records, dataset))).all()):
                log.error("a charge to records that can pay was refused; they cast no vote")
                break
        paid = paid_for(ledger, study, records, book)
    if not paid.any() and not any(True for _ in prepayments(ledger, answers, book)):
        # A charge to no record, so that a ledger which was put back is noticed in any case.
        _charge(ledger, study, records.only(paid), dataset, book, event)
    return paid


def begin_answering(ledger: Ledger, study: Study, answers: Ledger, book: str) -> bytes:
    """Note in the silo's ledger that a process begins to answer, and where its count of answers is.

    Every start writes this row, whoever has paid, so the head differs after each. Adversary: a
    reader of the evidence of votes, who sees under the log's blind whether that head is the same
    after a restart: it was if no record was new that could pay.

    Args:
        answers: the study's ledger of answers at this silo.
        book: its name, as for :func:`prepay`.

    Returns:
        the head of ``ledger``, 32 bytes.

    Raises:
        EvidenceError: ``answers`` does not contain what the last start noted.
    """
    of = f"{answers_study(study)} {book}"
    noted, rows = ledger.noted(of), answers.rows()
    if noted is not None and noted.rows:  # else the first start had noted an empty one
        found = rows[noted.rows - 1].digest if noted.rows <= len(rows) else None
        if found != noted.digest:
            raise EvidenceError(
                f"{answers.owner}: the ledger of answers is older than {answers.owner}'s own "
                "ledger, which noted a newer state",
                hint="restore the newest copies of both; an older one would let records answer "
                "more questions than they paid for, so nothing is answered",
            )
    ledger.note(of, Head(len(rows), rows[-1].digest) if rows else answers.head)
    return ledger.head.digest


def able_to_prepay(
    ledger: Ledger, study: Study, records: Records, dataset: str, book: str
) -> Bools:
    """Which records have paid or can: bool [n]; as :func:`prepay`, and charges nothing."""
    _require_pinned(ledger, study)
    paid = paid_for(ledger, study, records, book)
    return paid | _able(ledger, study, records, dataset)


def paid_for(ledger: Ledger, study: Study, records: Records, book: str) -> Bools:
    """Which records have paid: bool [n]."""
    paid = np.zeros(len(records), dtype=np.bool_)
    events = encode_events([whole_claim(study)])
    for entry in prepayments(ledger, answers_study(study), book):
        if entry.state != "reserved" and encode_events(entry.reserved) == events:
            paid |= records.exactly_in(ledger.stored(entry.about.records))
    return paid


def prepayments(ledger: Ledger, answers: str, book: str) -> Iterator[Entry]:
    """A ledger's charges for this study's answers by this ledger of answers.

    Adversary: a ledger that was put back and has some other study's prepayment. A name says
    study, records, ledger of answers and noise, so each is recomputed from what is charged.

    Args:
        answers: :func:`~.polls.answers_study`.
    """
    for entry in ledger.entries():
        if len(entry.key.run) == PREPAID_RUN and entry.state != "void":
            name = _name(answers, entry.about.records, book, entry.reserved)
            if entry.key.run == name[:PREPAID_RUN]:
                yield entry


def answers_ledger(ledger: Path, answers: str) -> Path:
    """Where the ledger of a study's answers is: beside the silo's own, ``ledger``."""
    place = ledger.resolve()
    return place.with_name(f"{place.stem}.answers-{answers[:12]}.sqlite")


def has_prepaid(ledger: Ledger, path: Path, study: bytes) -> bool:
    """Whether a silo's ledger at ``path`` knows that the answers of a study were paid for.

    Args:
        study: its digest, 32 bytes.
    """
    answers = answers_name(study)
    try:
        book = name_of(key_path(answers_ledger(path, answers)).read_bytes())
    except OSError:  # without its key no record in it is known: nothing could be answered
        return False
    return any(True for _ in prepayments(ledger, answers, book))


def paying(answers: Ledger, study: Study, records: Records, dataset: str, event: Event) -> Bools:
    """Which records can pay for one question more in the ledger of answers, each by itself.

    Raises:
        BudgetExceeded: the study asks for more than is pinned there.
    """
    return answers.payers(
        *(dataset, UNIT, [event], 1, claim_of(study)),
        records=records,
        study=answers_study(study),
        individually=True,
    )


def _require_pinned(ledger: Ledger, study: Study) -> None:
    claim, pinned = claim_of(study), ledger.pinned
    if pinned is not None and (claim[0] > pinned.epsilon or claim[1] > pinned.delta):
        raise BudgetExceeded(
            "the study asks for more than the owner of these records pinned",
            hint="the owner decides: `securefedcollm budget set`",
        )


def _able(ledger: Ledger, study: Study, records: Records, dataset: str) -> Bools:
    """Which records can pay now, each by itself: bool [n]."""
    about = (dataset, UNIT, [whole_claim(study)], 1, claim_of(study))
    return ledger.payers(*about, records=records, study=answers_study(study))


def _charge(
    ledger: Ledger, study: Study, records: Records, dataset: str, book: str, event: Event
) -> None:
    name = _name(answers_study(study), records.digest, book, [event])
    place = Key(dataset, UNIT, name[:PREPAID_RUN], 0, 0)
    _finish(ledger, ledger.reserve(*place, [event], claim_of(study), records=records, study=name))


def _finish(ledger: Ledger, reservation: Reservation) -> None:
    ledger.release(reservation)
    ledger.settle(reservation, reservation.events)


def _name(answers: str, records: str, book: str, events: Sequence[Event]) -> str:
    what = [answers, records, book, *encode_events(events)]
    return sha256(_PREPAID, msgspec.json.encode(what)).hex()
