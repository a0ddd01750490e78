"""A key holder's work before it helps to open a sum: it reads polynomials, and keeps a record.

The holder is every silo (threshold), or the authority. The adversary is the server together with up
to c silos, as in :mod:`~.checks`.
"""

from __future__ import annotations

from collections.abc import Sequence

from securefedcollm.aggregation.checks import accuse, record_once, refuse
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.parameters import MOST_OPENINGS, CkksRing
from securefedcollm.aggregation.ckks.polynomials import Residues
from securefedcollm.aggregation.header import RoundHeader, names_digest
from securefedcollm.aggregation.roles import Journal
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import CryptoError
from securefedcollm.primitives import equal


def read(data: bytes, ring: CkksRing, rows: int, name: str) -> Residues:
    """The ``rows`` polynomials that ``name`` sent, uint64 [rows, N].

    Raises:
        RemoteProtocolError: not as many polynomials; ``name`` is accused.
    """
    try:
        return polynomials.unpack(data, ring, rows)
    except CryptoError as error:
        accuse(name, f"polynomials are malformed ({error})")


def accumulate(total: Residues, data: bytes, ring: CkksRing, name: str) -> None:
    """Add the polynomials that ``name`` sent to ``total``, uint64 [k, N], in place.

    Raises:
        RemoteProtocolError: not as many polynomials; ``name`` is accused.
    """
    try:
        polynomials.accumulate(total, data, ring)
    except CryptoError as error:
        accuse(name, f"polynomials are malformed ({error})")


def record_opening(journal: Journal, header: RoundHeader, names: Sequence[str], step: Step) -> None:
    """Write down that the sum of ``names`` is about to be opened; refuse if it must not be.

    Adversary: a server that opens two sums of a round; their difference would reveal the silos in
    which they differ. So one set of silos is opened in a round, in every attempt. Or a server that
    opens the same sum over and over, to average out the flooding noise. So ``MOST_OPENINGS``
    attempts may open it.
    """
    record_once(journal, b"open:" + header.round_scope, names_digest(names), step)
    for number in range(MOST_OPENINGS):
        key = b"opening:" + bytes([number]) + header.round_scope
        if equal(journal.record(key, header.attempt_scope), header.attempt_scope):
            return
    refuse(
        f"asks for another opening of a sum that was opened {MOST_OPENINGS} times",
        "this sum's updates are lost if none of them arrived; go on with the next round",
    )
