"""Compare the participants that the verifier knows from elsewhere with those of the bundle.

Adversary: an outsider who makes keys for five famous hospitals and a bundle in their names. The
bundle is consistent. Only a study or a key from another source shows that they never took part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import printable
from securefedcollm.primitives import KEY_BYTES
from securefedcollm.study import Study, digest, load_study
from securefedcollm_audits.verification.case import Case, NotCovered, count
from securefedcollm_audits.verification.verdict import Check, Faults, Result, carry_out

_MOST_NAMES: Final = 8


class Expected(NamedTuple):
    """The verifier's own knowledge: the study, and participants' Ed25519 public keys by name; and
    the bundles of earlier runs, from which the study says that it starts."""

    study: Study | None = None
    keys: Mapping[str, bytes] = {}
    earlier: Sequence[Path] = ()


def expectation(study: Path | None, keys: Sequence[str], earlier: Sequence[Path] = ()) -> Expected:
    """The values of the options ``--study FILE``, ``--key NAME=HEX`` and ``--earlier BUNDLE``.

    Raises:
        ConfigError: the file is no study, or a key is none.
    """
    known: dict[str, bytes] = {}
    for text in keys:
        name, _, spelt = text.rpartition("=")
        try:
            key = bytes.fromhex(spelt)
        except ValueError:
            key = b""
        if not name or len(key) != KEY_BYTES or known.setdefault(name, key) != key:
            raise ConfigError(
                f"{text!r} is not NAME=HEX, or is another key of a name that was given before",
                where="--key",
                hint="the 64 hex digits that `identity show` prints as `public`",
            )
    return Expected(None if study is None else load_study(study), known, tuple(earlier))


def compare(case: Case, expected: Expected) -> tuple[Result, list[str]]:
    """The row of the table, and the list of things that were not compared."""
    silent = _silent(case, expected)
    title = "Study and keys are those that you know from elsewhere"
    check = Check("expected", title, lambda case, wrong: _compared(case, expected, silent, wrong))
    return carry_out(check, case), silent


def _silent(case: Case, expected: Expected) -> list[str]:
    silent = []
    if expected.study is None:
        silent.append("the study (--study FILE: your own copy of it)")
    if expected.study is None or not expected.study.roster:  # else the study names all keys
        names = [name for name in case.keys if name not in expected.keys]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        if names:
            said = ", ".join(map(printable, names[:_MOST_NAMES])) + more
            silent.append(
                f"the owners of the keys: {said} (--key NAME=HEX: as you have it from them)"
            )
    return silent


def _compared(case: Case, expected: Expected, silent: Sequence[str], wrong: Faults) -> str:
    if expected.study is None and not expected.keys:
        raise NotCovered("neither a study nor a key was named: anybody can make up participants")
    said = []
    if expected.study is not None:
        own = digest(expected.study)
        said.append("the study is the one named")
        if own != case.digest:
            wrong("study.json", f"is study {case.digest.hex()[:16]}…, expected {own.hex()[:16]}…")
    for name, key in expected.keys.items():
        here = case.keys.get(name)
        if here is None:
            wrong(
                "study.json" if case.study.roster else "opened", f"{printable(name)} takes no part"
            )
        elif here != key:
            wrong(printable(name), f"has the key {here.hex()[:16]}…, expected {key.hex()[:16]}…")
    if expected.keys:
        said.append(f"{count(len(expected.keys), 'key')} as named")
    return "; ".join(said) + ("; the rest was not compared" if silent else "")
