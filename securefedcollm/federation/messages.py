"""The messages of coordinator and silo around the aggregation protocol.

One request, one reply. The inner aggregation frames are opaque here; they carry their own
signatures and bindings (:mod:`securefedcollm.aggregation`). A silo trusts nothing in these
messages beyond type and size: the adapter is bound into the round header by its hash, so a server
that sends different adapters to different silos cannot unmask their sum.
"""

from __future__ import annotations

import typing
from typing import Annotated, Any, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.header import MAX_SILOS
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.primitives import KEY_BYTES, sha256
from securefedcollm.privacy.events import EARLIER_KIND, SUM_KIND, SumKind
from securefedcollm.study.config import Name

MAX_FRAME = 1 << 31  # 2 GiB: above any adapter and packed vector that a silo would agree to


# Adversary: a silo whose reply is a list of millions of tiny values.
_FEW = msgspec.Meta(max_length=MAX_SILOS)
_Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class BeginRound(_Message, frozen=True, tag="begin"):
    """Server → silo: tune this adapter. ``adapter``: little-endian float32 in layout order, a view
    of the frame where it was decoded.

    ``clip_norm``: C of this round, where the study lets it adapt; else 0.
    """

    run_id: bytes
    round: int
    attempt: int
    layout: bytes
    adapter: memoryview
    clip_norm: float = 0.0

    @property
    def kind(self) -> SumKind:
        """As what the run charges its noised sums, by the server's word."""
        return SUM_KIND


class BeginEarlier(BeginRound, frozen=True, tag="begin-earlier"):
    """The same, in a run with noised sums that earlier code began: it charges them as that did."""

    @property
    def kind(self) -> SumKind:
        return EARLIER_KIND


class MakeKey(_Message, frozen=True, tag="make-key"):
    """Server → authority: begin an attempt. The authority derives the round's header itself, except
    for ``model`` (digest of the global model) and ``values`` (length of a silo's vector), which it
    cannot know: the silos sign theirs, and it opens nothing of silos that signed others.
    """

    run_id: bytes
    round: int
    attempt: int
    model: bytes
    values: int


class EndRun(_Message, frozen=True, tag="end"):
    """Server → silo: there is no further attempt at any round of this run."""

    run_id: bytes


class Aggregate(_Message, frozen=True, tag="aggregate"):
    """Server → silo: the next request of the aggregation protocol."""

    frame: bytes


class Shown(_Message, frozen=True):
    """The entry of the server's log at ``index``, with its RFC 9162 inclusion proof."""

    index: int
    entry: bytes
    inclusion: list[bytes]


class Witness(_Message, frozen=True, tag="witness"):
    """Server → silo: vouch for the head of my evidence log.

    ``consistency``: RFC 9162 proof from the head of ``old`` entries, the last one that this silo
    vouched for. ``openings``: those since then that name this silo, and those of the newest round
    that has any, one per attempt.
    """

    checkpoint: str
    old: int
    consistency: list[bytes]
    openings: list[Shown]


class Deliver(_Message, frozen=True, tag="deliver"):
    """Server → silo: the SLM adapter at a round's end, for the silo to keep.

    ``finished``: the entry of my evidence log that says so, under ``checkpoint``: the head that
    this silo vouched for last, with a quorum's cosignatures. ``layout`` and ``adapter``: as in
    :class:`BeginRound`.
    """

    run_id: bytes
    checkpoint: str
    finished: Shown
    layout: bytes
    adapter: memoryview


class Ended(_Message, frozen=True, tag="ended"):
    """Silo → server: I take part in no further attempt at this run."""


class Trained(_Message, frozen=True, tag="trained"):
    """Silo → server: my update is ready. Deliberately empty: no counts, no norms, no metrics."""


class Ready(_Message, frozen=True, tag="ready"):
    """Authority → server: go on."""


class Aggregated(_Message, frozen=True, tag="aggregated"):
    """Silo, or authority → server: my answer in the aggregation protocol.

    ``frame``: a view of the frame where it was decoded, since an upload is long.
    """

    frame: memoryview


class Unmasked(Aggregated, frozen=True, tag="unmasked"):
    """The same, of the last step where noise is removed. ``statement``: 64 bytes, that this silo
    opened this sum (:func:`.excess.state_opened`)."""

    statement: _Signature


class Surplus(_Message, frozen=True, tag="surplus"):
    """Server → silo: open the layers of your noise that the sum of these silos does not need.

    ``statements``: silo → its own, that it opened this very sum; a threshold of them.
    """

    run_id: bytes
    round: int
    survivors: Annotated[list[Name], _FEW]
    statements: Annotated[dict[Name, _Signature], _FEW]


class Layers(_Message, frozen=True, tag="layers"):
    """Silo → server: the keys of those layers, 32 bytes each; none if this silo was restarted
    since it drew them."""

    keys: Annotated[list[_Key], _FEW]

    def __repr__(self) -> str:
        return f"Layers({len(self.keys)} keys)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("keys", len(self.keys))]


class Delivered(_Message, frozen=True, tag="delivered"):
    """Silo → server: I have the adapter. Deliberately empty: what I do with it stays here."""


class Witnessed(_Message, frozen=True, tag="witnessed"):
    """Silo → server: my cosignature line; or, if it is empty, the ``size`` that I vouched for last,
    from which a proof is needed."""

    size: int
    cosignature: bytes


class Refused(_Message, frozen=True, tag="refused"):
    """Silo → server: I refuse. ``kind`` is a class name of the error tree."""

    kind: str
    message: str
    hint: str


Request = BeginRound | BeginEarlier | MakeKey | Aggregate | Surplus | Witness | Deliver | EndRun
Reply = Trained | Ready | Aggregated | Unmasked | Layers | Witnessed | Delivered | Refused | Ended

_T = TypeVar("_T")
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
encode = msgspec.msgpack.Encoder().encode


def decode_request(frame: bytes) -> Request:
    """Decode a request. Raises: RemoteProtocolError if the server's frame is not one."""
    return _checked(frame, _requests, "server")


def decode_reply(frame: bytes, silo: str) -> Reply:
    """Decode a reply. Raises: RemoteProtocolError naming ``silo`` if its frame is not one."""
    return _checked(frame, _replies, silo)


def _checked(frame: bytes, decoder: msgspec.msgpack.Decoder[_T], peer: str) -> _T:
    if len(frame) > MAX_FRAME:
        raise RemoteProtocolError(f"a frame of {len(frame)} bytes is too large", peer=peer)
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if _tag(frame) in ("carry", "carried"):
            theirs, ours = ("shelf relay", "server")
            if peer != "server":
                theirs, ours = ("shelf serve", "client")
            raise RemoteProtocolError(
                f"runs `securefedcollm {theirs}`, questions, and this side trains",
                peer=peer,
                hint=f"have it run `securefedcollm {ours}`",
            ) from None
        raise RemoteProtocolError(
            f"a frame does not decode ({error})",
            peer=peer,
            hint="do both sides run the same version?",
        ) from None


def trains(frame: bytes) -> bool:
    """Whether this is a frame of a training, by its tag alone."""
    return _tag(frame) in _TAGS


_TAGS: Final = frozenset(
    str(kind.__struct_config__.tag) for kind in (*typing.get_args(Request), *typing.get_args(Reply))
)


def _tag(frame: bytes) -> str:
    """The word that a frame begins with; "" if it is none."""
    # Adversary: the author of the frame. Only the first 16 bytes are read.
    if len(frame) < 3 or not 0x91 <= frame[0] <= 0x9F or not 0xA1 <= frame[1] <= 0xAE:
        return ""
    return frame[2 : 2 + (frame[1] & 0x1F)].decode("ascii", "replace")


def adapter_bytes(adapter: npt.NDArray[np.float32]) -> memoryview:
    """float32 [d] → 4·d bytes, little-endian; a view if they are little-endian already."""
    return np.ascontiguousarray(adapter, dtype="<f4").data.cast("B")


def model_digest(
    base: bytes, layout: bytes, adapter: bytes | memoryview, mechanism: bytes = b""
) -> bytes:
    """SHA-256 of "the global model I was sent": base weights, layout and adapter.

    ``mechanism``: identifies the noise that the sum of its updates gets, if any.
    """
    return model_digest_of(base, layout, sha256(adapter), mechanism)


def model_digest_of(base: bytes, layout: bytes, adapter_digest: bytes, mechanism: bytes) -> bytes:
    """:func:`model_digest` for who knows only the adapter's SHA-256."""
    return sha256(b"securefedcollm/global-model/v1\0", base, layout, adapter_digest, mechanism)
