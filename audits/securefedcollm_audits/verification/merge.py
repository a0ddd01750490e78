"""Join several participants' bundles of one run into one, so that their logs check each other.

Every silo gives away only its own log. Each alone says little; together they show whether the
server told all of them the same.

Adversary: the maker of one of the bundles. Without another participant's key it cannot add a log of
that participant. If a participant signed two logs of one run, the error names it, and nothing is
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from securefedcollm.aggregation.header import MAX_COHORT
from securefedcollm.errors import ConfigError, EvidenceError
from securefedcollm.evidence.bundle import MAX_BYTES, Bundle, decode_bundle, pack, read_content
from securefedcollm.evidence.entries import canonical
from securefedcollm.evidence.note import Checkpoint
from securefedcollm.foreign import printable
from securefedcollm_audits.verification.case import SERVER, Case
from securefedcollm_audits.verification.checks import logs
from securefedcollm_audits.verification.verdict import carry_out

MOST_BUNDLES: Final = MAX_COHORT + 2
"""A server, an authority and the silos."""
_AUTHENTIC: Final = ("study-signed", "membership", "heads")
"""Checks that each bundle has to pass by itself: its logs are what their owners signed. The
verifier of the joined bundle sees the others' findings."""
_AGAIN: Final = "ask whoever made it for the bundle again; `audit verify` says more"


class _Part(NamedTuple):
    path: Path
    bundle: Bundle
    case: Case


def merge(paths: Sequence[Path]) -> bytes:
    """One bundle of all logs in the bundles at ``paths``, in whatever order they are given.

    Where several hold a participant's log, the longest goes in, with the signatures of all.

    Raises:
        ConfigError: fewer than two bundles or too many, a file that is missing, or bundles of
            different studies or runs.
        EvidenceError: a file is no bundle, holds a log that its owner did not sign, or contradicts
            another: somebody signed two logs of one run.
    """
    if not 2 <= len(paths) <= MOST_BUNDLES:
        raise ConfigError(
            f"{len(paths)} bundles were named; from 2 to {MOST_BUNDLES} can be joined",
            where="BUNDLE",
            hint="e.g. `audit merge server.zip silo-1.zip silo-2.zip --out merged.zip`",
        )
    parts = _read_all(paths)
    for part in parts[1:]:
        _require_one_run(parts[0], part)
    names = sorted({name for part in parts for name in part.bundle.logs})
    members = {"study.json": canonical(parts[0].bundle.study.tree)}
    for part in parts:
        members |= part.bundle.of_many()
    for name in names:
        holders = [part for part in parts if name in part.bundle.logs]
        longest = _longest(name, holders)
        members[f"logs/{name}.jsonl"] = b"".join(leaf + b"\n" for leaf in longest)
        heads = _joined_heads(head for part in holders for head in part.bundle.heads[name])
        members[f"heads/{name}.json"] = canonical([head.note for head in heads])
    envelope = parts[0].bundle.envelope
    if envelope is not None:  # each bundle's was checked: all signed this study
        members["study.signatures.json"] = canonical(msgspec.to_builtins(envelope))
    return pack({**members, **_of_server(parts)})


def _read_all(paths: Sequence[Path]) -> list[_Part]:
    parts: list[_Part] = []
    total = 0
    for path in paths:
        content = read_content(path)
        total += len(content)
        if total > MAX_BYTES:
            raise EvidenceError(
                f"{path}: with this one the bundles are over {MAX_BYTES >> 20} MiB, no bundle is",
                hint="join fewer of them",
            )
        bundle = decode_bundle(content, path)
        part = _Part(path, bundle, Case(bundle))
        _require_authentic(part, parts[0] if parts else part)
        parts.append(part)
    return parts


def _require_authentic(part: _Part, first: _Part) -> None:
    """Adversary: the maker of this bundle, with a log in another's name.

    The same study with the same signatures is as well signed as in the ``first`` bundle.
    """
    same = part is not first and (part.case.digest, part.bundle.envelope) == (
        first.case.digest,
        first.bundle.envelope,
    )
    for check in logs.CHECKS:
        if check.name in _AUTHENTIC and not (same and check.name == "study-signed"):
            found = carry_out(check, part.case)
            if found.status == "fail":
                raise EvidenceError(
                    f"{part.path}: cannot be joined, {check.name}: {found.faults[0]}", hint=_AGAIN
                )


def _require_one_run(first: _Part, other: _Part) -> None:
    pair = f"{first.path} and {other.path}"
    hint = "join bundles of one run"
    if first.case.digest != other.case.digest:
        raise ConfigError("are not of one study", where=pair, hint=hint)
    if first.case.run != other.case.run:
        said = [part.case.run.hex()[:8] for part in (first, other)]
        raise ConfigError(
            f"are of two runs of the study, {said[0]}… and {said[1]}…", where=pair, hint=hint
        )
    if first.case.keys != other.case.keys:
        raise EvidenceError(
            f"{pair}: name other participants, or other keys of theirs, in one run",
            hint="one of them is made up; ask each participant for its key",
        )


def _longest(name: str, holders: Sequence[_Part]) -> list[bytes]:
    """The longest of one participant's logs, of which all others are the beginning.

    Adversary: a participant who showed two readers two logs. Each was found signed by its key.
    """
    best = max(holders, key=lambda part: len(part.bundle.leaves[name]))
    longest = best.bundle.leaves[name]
    for part in holders:
        mine = part.bundle.leaves[name]
        if mine == longest[: len(mine)]:
            continue
        at = next(seq for seq, leaf in enumerate(mine) if leaf != longest[seq])
        places = part.bundle.logs[name][at].place, best.bundle.logs[name][at].place
        who = printable(name)
        raise EvidenceError(
            f"{part.path} and {best.path}: {who} signed two different logs of this run "
            f"({places[0]} in the one, another {places[1]} in the other): that is equivocation, "
            f"and evidence that {who} lied to somebody",
            hint="keep both bundles as they are: its two signatures are the proof; nothing was "
            "joined",
        )
    return longest


def _joined_heads(heads: Iterable[Checkpoint]) -> list[Checkpoint]:
    """One head a size, with the cosignatures of all. Of two by one witness, one."""
    found: dict[int, list[Checkpoint]] = {}
    for head in heads:
        found.setdefault(head.size, []).append(head)
    return [_with_all_lines(found[size]) for size in sorted(found)]


def _with_all_lines(versions: Sequence[Checkpoint]) -> Checkpoint:
    whole = max(versions, key=lambda head: (len(head.lines), head.note))
    for name, blob in sorted({line for head in versions for line in head.lines}):
        if name not in {signer for signer, _ in whole.lines}:
            whole = whole.with_line(name, blob)
    return whole


def _of_server(parts: Sequence[_Part]) -> Mapping[str, bytes]:
    """Bill of materials and list of adapters, from the bundle with the server's newest log."""
    most = max(len(part.bundle.logs.get(SERVER, ())) for part in parts)
    holders = [part for part in parts if most and len(part.bundle.logs.get(SERVER, ())) == most]
    members: dict[str, bytes] = {}
    for part in holders:
        listed = part.bundle.artefacts
        here = {
            "sbom.json": part.bundle.sbom,
            "artefacts.json": None if listed is None else canonical(listed),
        }
        for name, content in here.items():
            if content is not None and members.setdefault(name, content) != content:
                raise EvidenceError(
                    f"{part.path}: its {name} is not that of another bundle with the same log of "
                    "the server",
                    hint="one was changed; `audit verify` says which",
                )
    return members
