"""The bytes that the tokens of a vocabulary stand for: two tokenizers have those in common."""

from __future__ import annotations

import re
from typing import Any

Vocabulary = tuple[bytes | None, ...]
"""By token id: its bytes, a word's leading space included; None for special tokens and gaps."""

_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """Byte-level tokens (GPT-2, Llama 3, Qwen), SentencePiece's (Llama 2, Gemma), or plain words.

    In the first, every byte is spelled as a printable character; in the second, ``▁`` is a space
    and ``<0xNN>`` a byte; in a vocabulary of words without spaces every word follows one, except
    for the continuations of WordPiece (``##``).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spelled = backend.to_str() if backend is not None else ""
    words: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    found: list[bytes | None] = [None] * (max(words.values()) + 1)
    if '"ByteLevel"' in spelled:
        known = _printable_bytes()
        for word, i in words.items():
            if all(letter in known for letter in word):
                found[i] = bytes(known[letter] for letter in word)
    elif '"Metaspace"' in spelled or any(word.startswith("▁") for word in words):
        for word, i in words.items():
            byte = _BYTE.match(word)
            found[i] = bytes([int(byte[1], 16)]) if byte else word.replace("▁", " ").encode()
    else:
        for word, i in words.items():
            found[i] = (word[2:] if word.startswith("##") else f" {word}").encode()
    return tuple(None if i in special else value for i, value in enumerate(found))


def shared_tokens(one: Vocabulary, two: Vocabulary) -> tuple[list[int], list[int]]:
    """The ids, in each vocabulary, of the tokens that stand for the same bytes in both."""
    first: dict[bytes, int] = {}
    for i, value in enumerate(one):
        if value:
            first.setdefault(value, i)
    ids: list[tuple[int, int]] = []
    for i, value in enumerate(two):
        if value in first:
            ids.append((first.pop(value), i))
    return [a for a, _ in ids], [b for _, b in ids]


def _printable_bytes() -> dict[str, int]:
    """GPT-2's spelling: printable Latin-1 stands for itself, the rest follow from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(others)}
