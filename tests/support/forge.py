"""A forger of bundles who holds every participant's key: what is left to catch it is the content.

``Forger`` edits entries as plain values, then numbers, hashes and signs everything anew, so that a
doctored bundle is wrong in the one place that a test made wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from securefedcollm.evidence.bundle import pack, read_members
from securefedcollm.evidence.entries import canonical
from securefedcollm.evidence.note import (
    Checkpoint,
    cosign,
    origin,
    parse_checkpoint,
    sign_checkpoint,
)
from securefedcollm.federation.plan import round_header
from securefedcollm.primitives import SigningKey, merkle_root
from securefedcollm.study import digest, study_from_tree
from tests.support.arithmetic import ROSTER
from tests.support.runs import ALL_KEYS

Entries = list[dict[str, Any]]


class Forger:
    def __init__(self, bundle: Path, keys: Mapping[str, SigningKey] = ALL_KEYS) -> None:
        self.keys = keys
        self.members = read_members(bundle)
        del self.members["manifest.json"]
        self.study = digest(study_from_tree(json.loads(self.members["study.json"])))
        self.logs: dict[str, Entries] = {}
        self.heads: dict[str, list[tuple[dict[str, Any], list[str]]]] = {}
        """Per head: the newest entry under it, and who cosigned."""
        self.times: dict[str, int] = {}
        """When a silo cosigned last, seconds."""
        for name in [n for n in self.members if n.startswith("logs/")]:
            who = name[5:-6]
            lines = self.members[name].splitlines()
            self.logs[who] = [json.loads(line) for line in lines]
            notes = json.loads(self.members[f"heads/{who}.json"])
            heads = [parse_checkpoint(note) for note in notes]
            for head in heads:
                for signer, blob in head.lines[1:]:
                    self.times[signer.rpartition("/")[2]] = int.from_bytes(blob[4:12], "big")
            self.heads[who] = [
                (self.logs[who][head.size - 1], [s.rpartition("/")[2] for s, _ in head.lines[1:]])
                for head in heads
            ]

    def find(self, who: str, kind: str, nth: int = 0) -> dict[str, Any]:
        """The nth entry of a kind; negative from the end."""
        return [e for e in self.logs[who] if e["what"]["kind"] == kind][nth]

    def what(self, who: str, kind: str, nth: int = 0) -> dict[str, Any]:
        return self.find(who, kind, nth)["what"]

    def remove(self, who: str, kind: str, nth: int = 0) -> None:
        self.logs[who].remove(self.find(who, kind, nth))

    def seal(self, cascade: bool = True) -> None:
        """Number and sign everything. ``cascade``: silos saw the server's log as it is now."""
        for who in sorted(self.logs, key=lambda name: name != "server"):
            log, before = self.logs[who], {id(e): e["seq"] + 1 for e in self.logs[who]}
            for seq, entry in enumerate(log):
                entry["seq"] = seq
            if who == "server":
                moved = {size: index + 1 for index, size in enumerate(before.values())}
            elif cascade and "server" in self.logs:
                self._show_server(log, moved)
            leaves = [canonical(entry) for entry in log]
            self.members[f"logs/{who}.jsonl"] = b"".join(leaf + b"\n" for leaf in leaves)
            self._sign(who, leaves)

    def _show_server(self, log: Entries, moved: dict[int, int]) -> None:
        leaves = [canonical(entry) for entry in self.logs["server"]]
        for entry in log:
            if entry["what"]["kind"] == "witnessed":
                size = entry["what"]["size"]
                new = max((m for old, m in moved.items() if old <= size), default=0)
                entry["what"].update(size=new, root=merkle_root(leaves[:new]).hex())

    def _sign(self, who: str, leaves: list[bytes]) -> None:
        log = self.logs[who]
        heads = {}
        for newest, signers in self.heads[who]:
            under = [e["seq"] + 1 for e in log if e is newest]
            size = under[0] if under else min(newest["seq"], len(log))
            heads[size] = signers
        heads.setdefault(len(log), [])
        self.members[f"heads/{who}.json"] = canonical(
            [self._head(who, leaves[:size], heads[size]).note for size in sorted(heads)]
        )

    def _head(self, who: str, leaves: list[bytes], signers: list[str]) -> Checkpoint:
        name = origin(self.study, who)
        head = sign_checkpoint(name, self.keys[who], len(leaves), merkle_root(leaves))
        for signer in signers:
            key_name = origin(self.study, signer)
            head = head.with_line(
                key_name, cosign(head, key_name, self.keys[signer], self.times[signer])
            )
        return head

    def write(self, path: Path) -> Path:
        path.write_bytes(pack(self.members))
        return path


def doctor(
    bundle: Path,
    target: Path,
    edit: Callable[[Forger], Any],
    keys: Mapping[str, SigningKey] = ALL_KEYS,
) -> Path:
    """``bundle`` with ``edit`` applied and everything signed anew, in ``target``.

    An ``edit`` that returns something has sealed the forgery itself.
    """
    forger = Forger(bundle, keys)
    if edit(forger) is None:
        forger.seal()
    return forger.write(target)


def by_name(verdict):
    return {result.name: result for result in verdict.results}


def header_of(f, begun, attempt):
    return round_header(
        study_from_tree(json.loads(f.members["study.json"])),
        roster=ROSTER,
        run_id=bytes.fromhex(f.what("server", "opened")["run"]),
        round_=begun["round"],
        attempt=attempt,
        model=bytes.fromhex(begun["model"]),
        values=begun["values"],
    ).digest.hex()
