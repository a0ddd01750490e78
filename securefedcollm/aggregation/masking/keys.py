"""The key schedule: every key, commitment and transcript digest of a round, in one place.

Every derivation is HKDF-SHA256 with the header digest as salt, so keys of another study, run,
round, attempt, model, parameter set or roster are unrelated; and with an ``info`` that names the
role, the transcript so far and the two silos, so the two ends agree on a key only if the relay
showed both the same transcript. A raw Diffie-Hellman output is never used as a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from securefedcollm.aggregation.masking.messages import Advertise, Parcel, Statement
from securefedcollm.aggregation.messages import index_bytes
from securefedcollm.primitives import AgreementKey, hkdf, sha256

ZERO_NONCE: Final = bytes(12)
"""Every box key seals one box: one dealer, one holder, one direction, one attempt."""

Kind = Literal["seed", "key"]

_PREFIX: Final = b"securefedcollm/v1/"


def roll_digest(header: bytes, advertisements: Sequence[Advertise]) -> bytes:
    """Transcript after R0: the participants and their keys."""
    return sha256(
        _PREFIX, b"roll\0", header, *(entry.signed() + entry.signature for entry in advertisements)
    )


def delivery_digest(roll: bytes, statements: Sequence[Statement]) -> bytes:
    """Transcript after R1: the silos whose masks are in the sum, and their commitments."""
    return sha256(
        _PREFIX, b"delivery\0", roll, *(sha256(s.signed(), s.signature) for s in statements)
    )


def parcel_digest(parcel: Parcel) -> bytes:
    """A dealer's digest of one parcel, for its statement."""
    return sha256(_PREFIX, b"parcel\0", parcel.encode())


def box_key(
    own: AgreementKey, peer_public: bytes, header: bytes, roll: bytes, dealer: int, holder: int
) -> bytes:
    """ChaCha20-Poly1305 key of the box from ``dealer`` to ``holder``; either end can derive it."""
    info = _PREFIX + b"box\0" + roll + index_bytes(dealer, holder)
    return hkdf(own.agree(peer_public), salt=header, info=info)


def box_associated(header: bytes, roll: bytes, dealer: int, holder: int) -> bytes:
    """Associated data of a box."""
    return _PREFIX + b"box\0" + header + roll + index_bytes(dealer, holder)


def pair_mask_key(
    own: AgreementKey, peer_public: bytes, header: bytes, delivery: bytes, a: int, b: int
) -> bytes:
    """AES-256-CTR key of the mask between silos ``a`` and ``b``, in either order.

    The silo with the lower index adds the mask, the other subtracts it.
    """
    info = _PREFIX + b"pair\0" + delivery + index_bytes(min(a, b), max(a, b))
    return hkdf(own.agree(peer_public), salt=header, info=info)


def self_mask_key(seed: bytes, header: bytes, delivery: bytes, index: int) -> bytes:
    """AES-256-CTR key of the mask that only silo ``index`` knows until a quorum opens it."""
    return hkdf(seed, salt=header, info=_PREFIX + b"self\0" + delivery + index_bytes(index, index))


def seed_commitment(header: bytes, dealer: int, seed: bytes) -> bytes:
    """Commitment to a self-mask seed; hiding because the seed has 256 bits of entropy."""
    return sha256(_PREFIX, b"seed-commitment\0", header, index_bytes(dealer, dealer), seed)


def share_commitment(header: bytes, dealer: int, holder: int, kind: Kind, share: bytes) -> bytes:
    """Commitment to one share, so that a wrong share shows whose fault it is: dealer's or holder's.

    Hiding: below the threshold any one share is uniform over the 257-bit field.
    """
    return sha256(
        _PREFIX,
        b"share-commitment\0",
        header,
        index_bytes(dealer, holder),
        kind.encode(),
        b"\0",
        share,
    )
