"""Canonical JSON (RFC 8785): one spelling of every value, so that a document can be hashed."""

from __future__ import annotations

from typing import Any

import rfc8785

from securefedcollm.foreign import decode_json


def canonical(plain: Any) -> bytes:
    """RFC 8785 form of plain JSON values.

    Raises:
        ValueError: a value that JSON cannot carry exactly (an integer beyond 2^53, NaN).
    """
    try:
        return rfc8785.dumps(plain)
    except rfc8785.CanonicalizationError as error:
        raise ValueError(str(error)) from None


def decode_canonical(raw: bytes) -> Any:
    """Plain values of a canonical JSON document.

    Raises:
        ValueError: not JSON, or not in canonical form (duplicate keys, spaces, huge numbers).
    """
    try:
        plain = decode_json(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({str(error)[:120]})") from None
    try:
        same = canonical(plain) == raw
    except (RecursionError, ValueError):  # a number that canonical JSON cannot carry
        same = False
    if not same:
        raise ValueError("not in canonical form (RFC 8785)")
    return plain
