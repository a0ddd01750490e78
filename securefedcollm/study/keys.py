"""Every key of a study with its type, limits, default and meaning, read from the schema itself."""

from __future__ import annotations

import inspect
import types
from typing import Any, Final, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec

from securefedcollm.study.bounds import MOST
from securefedcollm.study.config import Hex32, Name, Study

_WORDS: Final = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_PATTERNS: Final = {
    get_args(Name)[1].pattern: "a to z, 0 to 9, . _ and -; at most 63 characters",
    get_args(Hex32)[1].pattern: "64 hexadecimal digits",
    r"^[0-9a-f]{40}(?!\n)$": "40 hexadecimal digits",
    r"^[1-8]/[1-8](?!\n)$": "two numbers from 1 to 8, with a stroke between them",
}


class Key(NamedTuple):
    """One key. ``path`` is dotted, as in ``--set``; the roster's entries have ``roster[]``."""

    path: str
    kind: str
    """Its type, in words; ``section`` if it holds keys of its own."""
    allowed: str
    """Values or range; empty if any value of the type may be given."""
    required: bool
    """Whether it has no default."""
    default: Any
    """In plain values; None also where it is required."""
    meaning: str
    needed: str
    """When a key must be given although it has a default; empty if never."""
    section: type[msgspec.Struct] | None = None
    """The section that it holds."""

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def depth(self) -> int:
        """Sections that the key is inside of."""
        return self.path.count(".")


def study_keys() -> tuple[Key, ...]:
    """All keys in the order of the schema, a section right before its own."""
    return tuple(_keys(Study, ""))


def about(section: type[msgspec.Struct]) -> str:
    """What a section is, in Markdown."""
    return (inspect.getdoc(section) or "").replace("``", "`")


def _keys(section: type[msgspec.Struct], prefix: str) -> list[Key]:
    found = []
    hints = get_type_hints(section, include_extras=True)
    for item in msgspec.structs.fields(section):
        metas = _metas(hints[item.name])
        kind, limits, inner = _described(hints[item.name])
        path = prefix + item.encode_name
        if path in MOST:
            limits.append(f"at most {MOST[path]:,}")
        says = next(m for m in reversed(metas) if m.description)
        found.append(
            Key(
                path=path,
                kind=kind,
                allowed=", ".join(limits),
                required=item.required,
                default=_default(item),
                meaning=says.description or "",
                needed=(says.extra or {}).get("needed", ""),
                section=inner,
            )
        )
        if inner is not None:
            found += _keys(inner, path + ("[]." if kind.startswith("list") else "."))
    return found


def _metas(hint: Any) -> list[msgspec.Meta]:
    return [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, msgspec.Meta)]


def _described(hint: Any) -> tuple[str, list[str], type[msgspec.Struct] | None]:
    """(type in words, limits, section) of an annotation."""
    if metas := _metas(hint):
        kind, limits, inner = _described(get_args(hint)[0])
        return kind, limits + [limit for meta in metas for limit in _limits(meta)], inner
    origin = get_origin(hint)
    if origin is Literal:
        return (
            "word" if isinstance(get_args(hint)[0], str) else "whole number",
            [" or ".join(f"`{value}`" for value in get_args(hint))],
            None,
        )
    if origin in {Union, types.UnionType}:
        parts = [_described(part) for part in get_args(hint) if part is not type(None)]
        kinds = " or ".join(dict.fromkeys(kind for kind, _, _ in parts))
        inner = next((section for _, _, section in parts if section), None)
        return kinds, [limit for _, limits, _ in parts for limit in limits], inner
    if origin is list:
        kind, limits, inner = _described(get_args(hint)[0])
        return f"list of {kind}s", limits, inner
    if origin is dict:
        return "mapping of text to text", [], None
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return "section", [], hint
    return _WORDS[hint], [], None


def _limits(meta: msgspec.Meta) -> list[str]:
    found = [
        f"{words} {value:,g}" if isinstance(value, float) else f"{words} {value:,}"
        for words, value in (
            ("at least", meta.ge),
            ("above", meta.gt),
            ("at most", meta.le),
            ("below", meta.lt),
        )
        if value is not None
    ]
    if meta.pattern is not None:
        found.append(_PATTERNS[meta.pattern])
    if meta.min_length:
        found.append("not empty")
    return found


def _default(item: Any) -> Any:
    if item.default is not msgspec.NODEFAULT:
        return msgspec.to_builtins(item.default)
    return None if item.required else item.default_factory()
