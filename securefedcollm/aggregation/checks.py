"""The checks of silos, and of the authority, on the frames that the server relays, in every scheme.

The adversary is the server, together with up to c silos: it may alter, drop, repeat, delay or
invent every frame. Each check below names its adversary. A check that fails raises
:class:`~securefedcollm.errors.RemoteProtocolError` with the server as the peer, and this side then
answers nothing more in this attempt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

from securefedcollm.aggregation.header import SUITE, Roster, RoundHeader
from securefedcollm.aggregation.messages import Signable, Signed
from securefedcollm.aggregation.roles import SERVER, Journal
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import CryptoError, LocalProtocolError, RemoteProtocolError
from securefedcollm.primitives import KEY_BYTES, SigningKey, equal, verify


def refuse(message: str, hint: str) -> NoReturn:
    """The server sent a frame that must not be answered."""
    raise RemoteProtocolError(message, peer=SERVER, hint=hint)


def refuse_late(step: Step) -> NoReturn:
    """The server sent a frame to a side that is done or has failed."""
    refuse(
        f"sent a frame although this attempt is over ({step.value})",
        "start a new attempt or the next round",
    )


def accuse(name: str, what: str) -> NoReturn:
    """The server relayed something wrong of ``name``; one of the two is to blame."""
    refuse(
        f"relayed a frame that does not check: {name}'s {what}",
        "start a new attempt; report the server, or that silo if others say the same",
    )


def check_identity(roster: Roster, name: str, key: SigningKey, vector_id: bytes) -> int:
    """A silo's first check, of its own input; its 1-based index on the roster.

    Raises:
        LocalProtocolError: the roster has another key for ``name``, or the id is not 32 bytes.
        ConfigError: ``name`` is not on the roster.
    """
    index = roster.index(name)
    if roster.key(index) != key.public:
        raise LocalProtocolError(
            f"this identity is not {name}'s on the roster",
            hint="run with the identity that signed the study",
        )
    if len(vector_id) != KEY_BYTES:
        raise LocalProtocolError(
            f"a vector id has {KEY_BYTES} bytes",
            hint="use a hash of the data from which the vector was made",
        )
    return index


def check_suite(header: RoundHeader) -> None:
    """A party's own header is for masks between all silos.

    Raises:
        LocalProtocolError: it names other algorithms, so that what is signed under it could be
            shown as of those.
    """
    if header.suite != SUITE:
        raise LocalProtocolError(
            f"the header names {header.suite}; this side is of {SUITE}",
            hint="choose the side by the study's scheme",
        )


def check_announced(
    own: RoundHeader,
    announced: RoundHeader,
    *,
    whose: str = "this silo's",
    held: str = "the signed study and the global model",
) -> None:
    """The server announces the round that this side is in.

    Adversary: a server that runs another study, model or round, or other parameters, say a lower
    quorum. Only this side's own header is ever used; the comparison is for a message that names the
    field.
    """
    if announced != own:
        fields = ", ".join(own.differences(announced))
        refuse(
            f"announced a round that differs from {whose} in: {fields}",
            f"compare {held} that both sides hold",
        )


def check_list(
    members: Sequence[int],
    allowed: Iterable[int],
    quorum: int,
    *,
    own: int | None = None,
    what: str = "list",
) -> None:
    """``members`` ascend strictly, are ``allowed``, include ``own`` and are a quorum.

    Adversary: a server that runs the round with one silo alone, with that silo and colluders, or
    with silos that are not in the study or left an earlier step.
    """
    if list(members) != sorted(set(members)) or not set(members) <= set(allowed):
        refuse(f"sent a {what} with repeated or unknown silos", "report the server")
    if own is not None and own not in members:
        refuse(f"left this silo out of the {what}", "start a new attempt")
    if len(members) < quorum:
        refuse(
            f"sent a {what} of {len(members)} silos; {quorum} are needed",
            "wait until more silos are online",
        )


def check_signatures(entries: Iterable[Signed], what: str, header: bytes, roster: Roster) -> None:
    """Every entry is of this round and of the silo that it names.

    Adversary: a relay that puts itself in the middle or invents silos; a silo that was shown
    another model has another header.
    """
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


def check_own(own: Signed, relayed: Signed, what: str = "a frame") -> None:
    """The server relays as this silo's exactly what this silo sent in this attempt.

    Adversary: a relay that replaces it by something that this silo signed elsewhere.
    """
    if (relayed.signed(), relayed.signature) != (own.signed(), own.signature):
        refuse(f"relayed {what} that this silo did not send", "start a new attempt")


def record_once(journal: Journal, key: bytes, value: bytes, step: Step) -> None:
    """Record the coming answer in the journal; refuse if it holds another one.

    One answer per step and attempt, one vector and one set of survivors per round, whatever happens
    to the process.

    Adversary: a server that restarts this process, or talks to a clone or a snapshot of it.
    """
    if not equal(journal.record(key, value), value):
        what = "this round" if key.startswith((b"open:", b"vector:")) else "this attempt"
        refuse(
            f"asks a second time for what was answered in {what} ({step.value})",
            "normal after a restart: go on with the next attempt or round",
        )
