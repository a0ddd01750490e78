"""Shamir's secret sharing of 32-byte secrets (Shamir 1979), in batches.

The field has prime order p = 2^256 + 297, the least prime above 2^256, so any 32-byte string is one
field element and a share takes 33 bytes. Lagrange weights depend only on the set of responders.
They are computed once per set; then each secret costs one dot product.

Shares alone are not checked here: the sum of a wrong share and good ones is a wrong secret. Callers
check every share against its dealer's commitment and every rebuilt secret against its own.
Arithmetic is on Python integers, not constant time; the timing of the dealing silo is not
observable through the protocol beyond network noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from securefedcollm.errors import CryptoError
from securefedcollm.primitives import RandomSource

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33
_COEFFICIENT_BYTES: Final = 48  # reduced mod p: the bias is below 2^-127


def deal(
    secret: bytes, threshold: int, holders: Sequence[int], random: RandomSource
) -> list[bytes]:
    """Share ``secret`` so that any ``threshold`` of ``holders`` rebuild it and fewer learn nothing.

    Args:
        secret: 32 bytes.
        threshold: t >= 2; the polynomial has degree t - 1.
        holders: distinct x-coordinates, 1 <= x < 2^16.
        random: read once, 48·(t - 1) bytes.

    Returns:
        One 33-byte big-endian share per holder, in order.
    """
    noise = random(_COEFFICIENT_BYTES * (threshold - 1))
    coefficients = [
        int.from_bytes(noise[start : start + _COEFFICIENT_BYTES], "big") % PRIME
        for start in range(0, len(noise), _COEFFICIENT_BYTES)
    ]
    constant = int.from_bytes(secret, "big")
    shares = []
    for x in holders:
        value = 0
        for coefficient in coefficients:  # Horner, highest degree first
            value = (value + coefficient) * x % PRIME
        shares.append(((value + constant) % PRIME).to_bytes(SHARE_BYTES, "big"))
    return shares


def weights(holders: Sequence[int]) -> list[int]:
    """Lagrange weights at zero for distinct ``holders``: Π_{k≠j} x_k / (x_k − x_j) mod p."""
    result = []
    for j in holders:
        numerator = denominator = 1
        for k in holders:
            if k != j:
                numerator = numerator * k % PRIME
                denominator = denominator * (k - j) % PRIME
        result.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return result


def rebuild(shares: Sequence[bytes], lagrange: Sequence[int]) -> bytes:
    """The 32-byte secret from threshold ``shares`` and the :func:`weights` of their holders.

    Raises:
        CryptoError: the result is no 32-byte secret: the shares do not belong together.
    """
    total = sum(
        int.from_bytes(share, "big") * weight
        for share, weight in zip(shares, lagrange, strict=True)
    )
    value = total % PRIME
    if value >> 256:
        raise CryptoError("the shares do not rebuild a secret")
    return value.to_bytes(SECRET_BYTES, "big")
