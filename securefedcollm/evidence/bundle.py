"""The archive that an auditor gets: logs, heads, study and hashes; never keys, vectors or data.

An uncompressed ZIP with one spelling: the same members give the same bytes, and a bundle that is
not what this module would write from its members is refused, so no bit of it goes unread.

::

    manifest.json            format and SHA-256 of every other member
    study.json               the study, RFC 8785
    study.signatures.json    who signed it (DSSE), where the study names its participants
    logs/NAME.jsonl          a participant's log, one entry a line
    heads/NAME.json          its signed heads: the newest, and all that were cosigned
    sbom.json                bill of materials of the server's software (CycloneDX)
    roster.json              more than 128 silos that the study does not name: their keys
    signatures/ROOT          likewise more than 128: the signatures under a root that a log names
    artefacts.json           SHA-256 of the adapters that the run left behind; those of the best
                             round, if the study keeps them, under adapters-best/

Adversary of the reader: the maker of the file. Nothing in it is unpacked to disk, inflated or
trusted. Sizes and counts are checked before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec

from securefedcollm.aggregation.header import Roster
from securefedcollm.errors import ConfigError, EvidenceError, SecureFedCoLLMError
from securefedcollm.evidence.archive import unzipped, zipped
from securefedcollm.evidence.entries import (
    Audited,
    Entry,
    canonical,
    decode_canonical,
    decode_entry,
)
from securefedcollm.evidence.ledger import VOTES, check_anchors
from securefedcollm.evidence.log import FILE_NAME, EvidenceLog
from securefedcollm.evidence.many import (
    ROSTER,
    Many,
    are_many,
    decode_roster,
    members_of,
    silos_of,
)
from securefedcollm.evidence.note import Checkpoint, parse_checkpoint
from securefedcollm.primitives import sha256
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import Study, digest, load_study, study_from_tree
from securefedcollm.study.signing import Envelope, read_envelope, signatures_path

FORMAT: Final = "securefedcollm-bundle-v1"
MAX_BYTES: Final = 512 << 20
"""Largest bundle: three rounds of 4 silos take 50 kB, a hundred rounds of 128 about 100 MB."""
BEST: Final = "adapters-best"
"""Next to ``adapters/`` in a run's directory: the adapters of the best round."""
_MAX_STUDY: Final = 4 << 20
_HINT: Final = "ask its maker for the bundle again; `audit bundle RUN` writes one"


class Bundle(msgspec.Struct, frozen=True):
    """A decoded bundle. Its hashes fit; its entries are not verified yet."""

    study: Study
    envelope: Envelope | None
    logs: dict[str, list[Entry]]
    leaves: dict[str, list[bytes]]
    heads: dict[str, list[Checkpoint]]
    sbom: bytes | None
    artefacts: dict[str, str] | None
    """Path → SHA-256 (hex) of the run's adapters."""
    silos: Roster | None = None
    """Those of a study of more than 128."""
    signatures: dict[str, bytes] = {}
    """Root (hex) → signatures one after another."""

    def of_many(self) -> dict[str, bytes]:
        """See :func:`.many.members_of`; nothing, if there are fewer silos."""
        return {} if self.silos is None else members_of(self.study, self.silos, self.signatures)


def make_bundle(run: Path, only: Sequence[str] = ()) -> bytes:
    """The bundle of a run directory.

    Each silo's ledgers are first checked against the heads that its log anchored.

    Args:
        only: participants whose logs go in; empty for all that are there.

    Raises:
        ConfigError: not a run with evidence, or a participant that is not in it.
        EvidenceError: a log or ledger does not verify.
    """
    study_file, study = run / "study.yaml", _study(run)
    homes, silos = _homes(run, only), silos_of(study, run)
    members: dict[str, bytes] = {"study.json": canonical(study.tree)}
    for name, home in homes.items():
        log = EvidenceLog(home / FILE_NAME, study=digest(study), owner=name, key=None, silos=silos)
        if silos is not None:
            members |= members_of(study, silos, log.kept)
        members[f"logs/{name}.jsonl"] = b"".join(leaf + b"\n" for leaf in log.leaves)
        members[f"heads/{name}.json"] = canonical([head.note for head in log.heads()])
        if (home / "ledger.sqlite").exists():
            with Ledger(home / "ledger.sqlite", name) as ledger:
                check_anchors(log, ledger)
        for book in sorted(home.glob("ledger.answers-*.sqlite")):
            with Ledger(book, name) as ledger:
                check_anchors(log, ledger, VOTES)
        if (home / "sbom.json").exists():
            members["sbom.json"] = (home / "sbom.json").read_bytes()
            best = {f"{BEST}/{path}": found for path, found in file_digests(run / BEST).items()}
            members["artefacts.json"] = canonical(file_digests(run / "adapters") | best)
        log.close()
    if signatures_path(study_file).exists():
        envelope = read_envelope(signatures_path(study_file), study)
        members["study.signatures.json"] = canonical(msgspec.to_builtins(envelope))
    if sum(map(len, members.values())) > MAX_BYTES // 2:
        raise ConfigError(
            f"its evidence is over {MAX_BYTES >> 21} MiB",
            where=str(run),
            hint="bundle fewer participants at a time with --only",
        )
    return pack(members)


def audits_of(run: Path) -> list[tuple[str, Audited]]:
    """What privacy audits found, by the evidence logs in a run directory: (owner, finding).

    Raises:
        ConfigError: not a run with evidence.
        EvidenceError: a log does not verify.
    """
    study, found = _study(run), []
    silos = silos_of(study, run)
    for name, home in _homes(run, ()).items():
        log = EvidenceLog(home / FILE_NAME, study=digest(study), owner=name, key=None, silos=silos)
        found += [(name, e.what) for e in log.entries if isinstance(e.what, Audited)]
        log.close()
    return found


def _study(run: Path) -> Study:
    if not (run / "study.yaml").is_file():
        raise ConfigError(
            "is not a run directory", where=str(run), hint="name the directory given to --out"
        )
    return load_study(run / "study.yaml")


def _homes(run: Path, only: Sequence[str]) -> dict[str, Path]:
    found = {path.name: path for path in sorted((run / "silos").glob("*")) if path.is_dir()}
    found = {
        name: path
        for name, path in {
            "server": run / "server",
            "authority": run / "authority",
            **found,
        }.items()
        if (path / FILE_NAME).exists()
    }
    unknown = [name for name in only if name not in found]
    if unknown or not found:
        raise ConfigError(
            f"no evidence log of {', '.join(unknown) or 'anybody'}",
            where=str(run),
            hint=f"there are logs of: {', '.join(found) or 'nobody; the run is an older one'}",
        )
    return {name: path for name, path in found.items() if not only or name in only}


def file_digests(directory: Path) -> dict[str, str]:
    """Path below ``directory`` → SHA-256 (hex) of every file in it."""
    return {
        path.relative_to(directory).as_posix(): sha256(path.read_bytes()).hex()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def pack(members: Mapping[str, bytes]) -> bytes:
    """Members → the archive, manifest added: the same bytes for the same members."""
    manifest = {
        "format": FORMAT,
        "files": {name: sha256(content).hex() for name, content in members.items()},
    }
    return zipped({**members, "manifest.json": canonical(manifest)})


def read_content(path: Path) -> bytes:
    """The file's bytes, read once, so that the same bytes are hashed and decoded.

    Adversary: somebody who can exchange the file between two readings.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
        EvidenceError: it is larger than any bundle.
    """
    hint = "`audit bundle RUN --out FILE` makes one"
    if not path.is_file():
        raise ConfigError("there is no such file", where=str(path), hint=hint)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", where=str(path), hint=hint
        ) from None
    if len(content) > MAX_BYTES:
        raise EvidenceError(f"{path}: over {MAX_BYTES >> 20} MiB, no bundle is", hint=_HINT)
    return content


def read_members(path: Path) -> dict[str, bytes]:
    """The members of the archive at ``path``; raises what its two halves raise."""
    return decode_members(read_content(path), path)


def decode_members(content: bytes, path: Path) -> dict[str, bytes]:
    """The members of the archive at ``path``, hashes checked.

    Raises:
        EvidenceError: one line that names the fault of the file.
    """
    try:
        members = unzipped(content)
    except Exception as error:  # zipfile raises a dozen kinds on garbage
        raise EvidenceError(f"{path}: not a bundle ({str(error)[:120]})", hint=_HINT) from None
    try:
        manifest = decode_canonical(members.get("manifest.json", b""))
        listed = manifest["files"]
        if manifest["format"] != FORMAT or set(manifest) != {"format", "files"}:
            raise ValueError("of another format")
        hashes = {name: sha256(raw).hex() for name, raw in members.items()}
        hashes.pop("manifest.json")
    except (ValueError, KeyError, TypeError) as error:
        raise EvidenceError(f"{path}: the manifest is {error}", hint=_HINT) from None
    for name in sorted({*hashes, *listed}):
        if hashes.get(name) != listed.get(name):
            raise EvidenceError(f"{path}: {name} does not match the manifest", hint=_HINT)
    return members


def decode_bundle(content: bytes, path: Path) -> Bundle:
    """Decode the bundle that was read from ``path``.

    Raises:
        EvidenceError: naming the member that cannot be read.
    """
    members = decode_members(content, path)
    members.pop("manifest.json")
    study_bytes = members.pop("study.json", b"")
    try:
        study, named = _signed(study_bytes)
        sbom = members.pop("sbom.json", None)
        artefacts = _typed(members.pop("artefacts.json", None), dict[str, str])
        envelope = _typed(members.pop("study.signatures.json", None), Envelope)
    except (ValueError, TypeError, AttributeError, msgspec.MsgspecError) as error:
        raise EvidenceError(f"{path}: {str(error)[:200]}", hint=_HINT) from None
    except SecureFedCoLLMError as error:
        raise EvidenceError(f"{path}: study.json: {error.message}", hint=_HINT) from None
    many = _many(study, named, members, path)
    logs, leaves, heads = {}, {}, {}
    for name in sorted(members):
        room, _, base = name.partition("/")
        who = base.rpartition(".")[0]
        if name != {"logs": f"logs/{who}.jsonl", "heads": f"heads/{who}.json"}.get(room):
            raise EvidenceError(f"{path}: {name} has no place in a bundle", hint=_HINT)
        if room == "logs":
            leaves[who] = members[name].split(b"\n")[:-1]
            if not members[name].endswith(b"\n"):
                raise EvidenceError(f"{path}: {name} breaks off", hint=_HINT)
            logs[who] = [
                decode_entry(raw, f"{path}: {who}#{seq}", many)
                for seq, raw in enumerate(leaves[who])
            ]
        else:
            heads[who] = _heads(members[name], f"{path}: {name}")
    if set(logs) != set(heads) or not logs:
        raise EvidenceError(f"{path}: logs and signed heads do not pair up", hint=_HINT)
    bundle = Bundle(study, envelope, logs, leaves, heads, sbom, artefacts)
    if many is None:
        return bundle
    kept = many.kept or {}
    if unread := sorted(set(kept) - many.read):
        raise EvidenceError(f"{path}: no log names signatures/{unread[0]}", hint=_HINT)
    return msgspec.structs.replace(bundle, silos=many.silos, signatures=kept)


@lru_cache(maxsize=2)  # of one run's thousand bundles, `merge` reads the study once
def _signed(raw: bytes) -> tuple[Study, Roster | None]:
    """The study of these bytes; and its silos, if they are more than 128 and it names them.

    Raises:
        ValueError, ConfigError: it is none.
    """
    if len(raw) > _MAX_STUDY:
        raise ValueError(f"study.json is over {_MAX_STUDY >> 20} MiB")
    study = study_from_tree(decode_canonical(raw))
    if canonical(study.tree) != raw:
        raise ValueError("not a study with every default written out")
    if not (are_many(study.silos.count) and study.roster):
        return study, None
    return study, Roster(study.silo_keys)


def _many(study: Study, named: Roster | None, members: dict[str, bytes], path: Path) -> Many | None:
    """How the logs of this bundle are written; takes its own members from ``members``.

    Args:
        named: the silos that the study names.

    Raises:
        EvidenceError: the silos are not named, or not as they must be.
    """
    if not are_many(study.silos.count):
        return None
    try:
        if named is None and ROSTER not in members:
            raise ValueError("missing: neither it nor the study names the silos")
        silos = named or decode_roster(members.pop(ROSTER))
    except (ValueError, ConfigError) as error:
        raise EvidenceError(f"{path}: {ROSTER}: {str(error)[:200]}", hint=_HINT) from None
    kept: dict[str, bytes] = {}
    for name in [name for name in members if name.startswith("signatures/")]:
        kept[name.partition("/")[2]] = members.pop(name)
        if not kept[name.partition("/")[2]]:
            raise EvidenceError(f"{path}: {name} is empty", hint=_HINT)
    return Many(silos, kept)


def _typed(raw: bytes | None, kind: Any) -> Any:
    return None if raw is None else msgspec.convert(decode_canonical(raw), kind)


def _heads(raw: bytes, place: str) -> list[Checkpoint]:
    try:
        notes = _typed(raw, list[str])
    except (ValueError, msgspec.MsgspecError) as error:
        raise EvidenceError(f"{place}: {str(error)[:120]}", hint=_HINT) from None
    return [parse_checkpoint(note) for note in notes]
