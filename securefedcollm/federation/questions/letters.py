"""Letters: how the server carries the frames of questions between members.

Silos open no port and call nobody. So the server calls every member in turn (:class:`Carry`),
brings what others have for it, and takes what it has for others (:class:`Carried`). The frames of
:mod:`securefedcollm.retrieval` are signed by their author over study, run and all frames before.
So are a poll (:mod:`~.polls`), and all that silos sign in the sum of its votes. Nobody else needs
to believe the coordinator of a sum, the asker. The letter around a frame is not signed, and nothing
is believed of it but where to look.

Adversary: the server, which may write, alter, drop, repeat and exchange every letter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, NamedTuple, TypeVar

import msgspec

from securefedcollm.aggregation.masking.messages import Deal, Delivery, Opening, Roll
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.federation.messages import trains
from securefedcollm.federation.questions.polls import Poll
from securefedcollm.retrieval import Terms
from securefedcollm.retrieval.messages import limit

THREAD_BYTES: Final = 16
MOST_MEMBERS: Final = 129
"""Of a study: 128 silos and the server."""
_SLACK: Final = 4096
_EACH: Final = 512
"""Bytes of a letter without its content, at most."""

Kind = (
    Literal["question", "scores", "selection", "blocks"]
    | Literal["poll", "ready", "request", "reply"]
    | Literal["declined"]
)
ANSWER: Final[dict[Kind, Kind]] = {
    "question": "scores",
    "selection": "blocks",
    "poll": "ready",
    "request": "reply",
}
"""``poll`` asks records; each ``request`` of the sum of their votes then has a ``reply``."""
ASKS: Final = frozenset(ANSWER)
"""Kinds that an asker sends; the others come back."""

REASONS: Final[dict[bytes, str]] = {
    b"spent": "has answered all of your questions that it agreed to",
    b"refused": "refused the question; its own log says why",
    b"unable": "could not count the question, or not write its evidence",
    b"none": "has nothing to answer from here",
    b"away": "is not connected to the server",
}
"""What a silo, or the server in its place, may say instead of an answer; no other word is shown."""
_WORD: Final = max(map(len, REASONS))

Name = Annotated[str, msgspec.Meta(max_length=64)]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Letter(_Message, frozen=True):
    """One frame on its way.

    ``who``: the other end; from a member, whom it is for; to a member, whom it is from. ``thread``:
    16 random bytes that the asker chose for its question to this silo. ``content``: a frame, or one
    of :data:`REASONS`.
    """

    who: Name
    thread: Annotated[bytes, msgspec.Meta(min_length=THREAD_BYTES, max_length=THREAD_BYTES)]
    kind: Kind
    content: bytes

    def __repr__(self) -> str:
        return f"Letter({self.kind}, {len(self.content)} bytes)"


Letters = Annotated[list[Letter], msgspec.Meta(max_length=2 * MOST_MEMBERS)]


class Carry(_Message, frozen=True, tag="carry"):
    """Server → member: this is for you; what have you? ``run``: the run's id."""

    run: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    letters: Letters


class Carried(_Message, frozen=True, tag="carried"):
    """Member → server: these are for others."""

    letters: Letters


_M = TypeVar("_M")
_carry: Final[msgspec.msgpack.Decoder[Carry]] = msgspec.msgpack.Decoder(Carry)
_carried: Final[msgspec.msgpack.Decoder[Carried]] = msgspec.msgpack.Decoder(Carried)
encode = msgspec.msgpack.Encoder().encode


def decode_carry(frame: bytes) -> Carry:
    """Raises: RemoteProtocolError, if the server sent something else."""
    return _decoded(frame, _carry, "server")


def decode_carried(frame: bytes, member: str) -> Carried:
    """Raises: RemoteProtocolError naming ``member``, if it sent something else."""
    return _decoded(frame, _carried, member)


def _decoded(frame: bytes, decoder: msgspec.msgpack.Decoder[_M], peer: str) -> _M:
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if trains(frame):
            theirs, ours = "server", "shelf relay"
            if peer != "server":
                theirs, ours = "client", "shelf serve"
            raise RemoteProtocolError(
                f"runs `securefedcollm {theirs}`, a training, and this side carries questions",
                peer=peer,
                hint=f"have it run `securefedcollm {ours}`",
            ) from None
        raise RemoteProtocolError(
            "sent what is no letter", peer=peer, hint="do both sides run the same version?"
        ) from None


class Sizes(NamedTuple):
    """What letters of a study may be.

    ``longest``: bytes of the longest content of every kind that it has. ``seconds``: within which a
    silo answers on a slow machine.
    """

    longest: Mapping[Kind, int]
    seconds: float

    def largest(self, members: int) -> int:
        """Bytes of the longest :class:`Carry` or :class:`Carried` that makes sense: a letter of an
        asker to each other member, and one of a silo to each."""
        asking = max(size for kind, size in self.longest.items() if kind in ASKS)
        answering = max(size for kind, size in self.longest.items() if kind not in ASKS)
        return _SLACK + members * (asking + answering + 2 * _EACH)


def of_documents(terms: Terms) -> Sizes:
    """A silo with 100,000 documents takes 4 s on a fast machine."""
    longest: dict[Kind, int] = {
        "question": limit(terms.scoring.query_bytes),
        "scores": limit(terms.scoring.answer_bytes),
        "selection": limit(terms.fetching.query_bytes),
        "blocks": limit(terms.fetching.answer_bytes),
        "declined": _WORD,
    }
    return Sizes(longest, 30.0 + terms.documents / 5000)


def of_answers(silos: int, slot: float, *, reads: bool) -> Sizes:
    """Of questions to records.

    Args:
        silos: of the study; a request of the sum may hold what each dealt to one.
        slot: seconds, at whose multiples replies to polls leave.
        reads: whether a model reads the records.
    """
    longest: dict[Kind, int] = {
        "poll": Poll.LIMIT,
        "ready": 16,
        "request": max(Roll.LIMIT, Opening.LIMIT, Delivery.LIMIT * silos // 128 + (16 << 10)),
        "reply": Deal.LIMIT,
        "declined": _WORD,
    }
    return Sizes(longest, 30.0 + 2 * slot + (60.0 if reads else 0.0))
