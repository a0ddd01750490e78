"""A Parquet file's footer, read here and not by Arrow.

Arrow's own reader ends the process (an exception that crosses C++ uncaught) when it is asked for
the sizes in a malformed footer. The footer is a Thrift struct in the compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md; fields as in
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).

Adversary: whoever made the file.
"""

from __future__ import annotations

import struct
from typing import IO, Any, Final, NamedTuple

_MOST: Final = 16 << 20
"""Bytes of a footer: a hundred thousand column chunks."""
_DEEPEST: Final = 16
_TAIL: Final = struct.Struct("<I4s")


class Chunk(NamedTuple):
    """One column of one row group."""

    column: str
    """The outermost name."""
    unfolded: int
    """Bytes of its pages once decompressed."""
    values: int


class Footer(NamedTuple):
    """Rows and column chunks of a file."""

    rows: int
    chunks: list[Chunk]


def read_footer(file: IO[bytes]) -> Footer:
    """The footer of an open file.

    Raises:
        ValueError: there is none, or it is malformed.
    """
    end = file.seek(0, 2)
    if end < 12:
        raise ValueError("too short")
    file.seek(end - _TAIL.size)
    length, mark = _TAIL.unpack(file.read(_TAIL.size))
    if mark != b"PAR1" or length > min(_MOST, end - 12):
        raise ValueError("no footer")
    file.seek(end - _TAIL.size - length)
    try:
        about = _Compact(file.read(length)).struct(0)
        chunks = [_chunk(chunk[3]) for group in about.get(4, []) for chunk in group.get(1, [])]
        return Footer(_count(about.get(3, 0)), chunks)
    except (LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"a malformed footer ({type(error).__name__})") from None


def _chunk(about: dict[int, Any]) -> Chunk:
    return Chunk(about[3][0].decode("utf-8"), _count(about[6]), _count(about[5]))


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("a malformed footer: a count that is none")
    return value


class _Compact:
    """Thrift's compact protocol: structs as {field id: value}, texts as bytes."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 0

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > _DEEPEST:
            raise ValueError("a malformed footer: nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2 | 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._signed()
            case 7:
                return self._bytes(8)
            case 8:
                return self._bytes(self._varint())
            case 9 | 10:
                head = self._byte()
                count = head >> 4 if head >> 4 < 15 else self._varint()
                return self._many(count, lambda: self._value(head & 15, depth + 1))
            case 11:
                count = self._varint()
                kinds = self._byte() if count else 0
                return self._many(count, lambda: self._pair(kinds, depth + 1))
            case 12:
                return self.struct(depth + 1)
        raise ValueError(f"a malformed footer: a value of kind {kind}")

    def _pair(self, kinds: int, depth: int) -> tuple[Any, Any]:
        return self._value(kinds >> 4, depth), self._value(kinds & 15, depth)

    def _many(self, count: int, one: Any) -> list[Any]:
        if count > len(self._raw) - self._at:  # every value has a byte at least
            raise ValueError("a malformed footer: a list beyond its end")
        return [one() for _ in range(count)]

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, count: int) -> bytes:
        found = self._raw[self._at : self._at + count]
        if len(found) != count:
            raise ValueError("a malformed footer: it breaks off")
        self._at += count
        return found

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a malformed footer: a number without end")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
