"""The words of a record, in one form: what makes it the record that it is."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable


def folded(text: str) -> str:
    """``text`` in one Unicode form, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def content_digest(words: Iterable[str], choices: Iterable[str]) -> bytes:
    """SHA-256 (32 bytes) of a record's words, and of its choices as a set.

    Args:
        words: already :func:`folded`; empty ones and repetitions do not count.
    """
    listed = sorted({folded(choice) for choice in choices})
    canonical = json.dumps([sorted({*words} - {""}), listed]).encode()
    return hashlib.sha256(b"securefedcollm/record-content/v1\0" + canonical).digest()


def row_digest(texts: Iterable[str]) -> bytes:
    """SHA-256 (32 bytes) of all texts of a row, as a set; already :func:`folded`. Empty of none."""
    said = sorted({*texts} - {""})
    if not said:
        return b""
    return hashlib.sha256(b"securefedcollm/record-row/v1\0" + json.dumps(said).encode()).digest()
