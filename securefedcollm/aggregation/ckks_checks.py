"""Checks that silos and the authority make alike of what the server relays in a CKKS round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from securefedcollm.aggregation import ckks_ring
from securefedcollm.aggregation.ckks.parameters import MOST_OPENINGS, CkksRing
from securefedcollm.aggregation.ckks_ring import Residues
from securefedcollm.aggregation.header import Roster, RoundHeader, names_digest
from securefedcollm.aggregation.messages import Signable, Signed
from securefedcollm.aggregation.roles import SERVER, Journal
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import CryptoError, RemoteProtocolError
from securefedcollm.primitives import equal, verify


def refuse(message: str, hint: str) -> NoReturn:
    """The server sent what must not be answered."""
    raise RemoteProtocolError(message, peer=SERVER, hint=hint)


def accuse(name: str, what: str) -> NoReturn:
    """The server relayed something of ``name`` that is wrong; one of them is to blame."""
    refuse(
        f"relayed a frame that does not check: {name}'s {what}",
        "start a new attempt; report the server, or that silo if others say the same",
    )


def check_list(members: Sequence[int], allowed: Sequence[int], quorum: int) -> None:
    """Ascending, allowed, and a quorum.

    Adversary: a server that runs the round with one silo alone, or with colluders only.
    """
    if list(members) != sorted(set(members)) or not set(members) <= set(allowed):
        refuse("sent a list with repeated or unknown silos", "report the server")
    if len(members) < quorum:
        refuse(
            f"sent a list of {len(members)} silos; {quorum} are needed",
            "wait until more silos are online",
        )


def check_signatures(entries: Sequence[Signed], what: str, header: bytes, roster: Roster) -> None:
    """Every entry is of this round and of the silo that it names."""
    for entry in entries:
        said = f"{roster.name(entry.index)}'s {what}"
        check_header(entry.header, header, said)
        check_signature(entry, entry.signature, roster.key(entry.index), said)


def check_header(said: bytes, header: bytes, what: str) -> None:
    """Adversary: the relay replays a frame of another round, attempt, run, study or model."""
    if said != header:
        refuse(
            f"relayed {what} for another round, study or global model",
            "all silos must hold the same study and the same global model",
        )


def check_signature(message: Signable, signature: bytes, key: bytes, what: str) -> None:
    """Adversary: the relay invents members, or speaks for the authority."""
    try:
        verify(key, message.CONTEXT, message.signed(), signature)
    except CryptoError:
        refuse(f"relayed {what} with a bad signature", "report the server")


def accumulate(total: Residues, data: bytes, ring: CkksRing, name: str) -> None:
    """Add what ``name`` sent to ``total``, if it is as many polynomials."""
    try:
        ckks_ring.accumulate(total, data, ring)
    except CryptoError as error:
        accuse(name, f"polynomials are malformed ({error})")


def record_once(journal: Journal, key: bytes, value: bytes, step: Step) -> None:
    """Write down what is about to be said; refuse if something else was said before.

    Adversary: a server that restarts this process, or talks to a clone of it.
    """
    if not equal(journal.record(key, value), value):
        refuse(
            f"asks a second time for what was answered already ({step.value})",
            "normal after a restart: go on with the next attempt or round",
        )


def record_opening(journal: Journal, header: RoundHeader, names: Sequence[str], step: Step) -> None:
    """Write down that the sum of ``names`` is about to be opened; refuse if it must not be.

    Adversary: a server that opens two sums of a round; their difference would bare the silos in
    which they differ. One set of silos a round, whatever the attempt. And one that opens the same
    sum over and over, to average the flooding noise out: so many attempts may, and no more.
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


def split(digests: bytes) -> list[bytes]:
    """Concatenated 32-byte digests, one by one."""
    return [digests[at : at + 32] for at in range(0, len(digests), 32)]
