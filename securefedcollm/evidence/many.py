"""How a log of more than 128 silos writes them down: sets as bits, keys and signatures as a root.

With n names an entry, and n keys or signatures, an entry would grow by some 100 bytes a silo. A set
of bits grows by a quarter of a byte. The logs of n silos together still grow with n², by n² / 4
bytes a set. Only the spelling differs. In memory an entry has the same lists, so every reader is
the same.

::

    "survivors": "ff0f…"                   a set, as in docs/protocol.md: bit (i − 1) mod 8, lowest
                                           first, of byte (i − 1) div 8 is silo i of the roster; hex
    "agreements": "<root><set>"            RFC 9162 root, hex, of the signatures of this set of
                                           silos, by index: 64 bytes each, in a file of their own
    "roster": {"others": […], "silos": …}  the participants that are no silos; the roster's root

Adversary: the keeper of a log. It signs the root, so it can neither exchange signatures later nor
leave one out; a reader of the whole bundle gets all of them and verifies each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec

from securefedcollm.aggregation.header import MAX_SILOS, Roster
from securefedcollm.aggregation.masking.graph.choice import pack_set, read_set
from securefedcollm.errors import ConfigError, StateError
from securefedcollm.evidence.canonical import canonical, decode_canonical
from securefedcollm.evidence.fields import Member
from securefedcollm.primitives import SIGNATURE_BYTES, merkle_root
from securefedcollm.study import Study

SETS: Final = ("survivors", "dropouts", "seeds_of", "keys_of")
ROSTER: Final = "roster.json"
"""Beside the server's log, in a run whose study names no participants: the silos and their keys."""
ROOT_DIGITS: Final = 64
"""Hex digits of a root."""
IS_ROOT: Final = re.compile(f"[0-9a-f]{{{ROOT_DIGITS}}}")


def are_many(silos: int) -> bool:
    """Whether logs about so many silos are written as this module says."""
    return silos > MAX_SILOS


class Many:
    """The spelling of one log.

    Args:
        silos: of the study.
        kept: root (hex) → the signatures under it, one after another; None for a reader who has
            none, and to whom entries show no agreements.
    """

    def __init__(self, silos: Roster, kept: Mapping[str, bytes] | None = None) -> None:
        self.silos = silos
        self.kept = None if kept is None else dict(kept)
        self.read: set[str] = set()
        """Roots whose signatures an entry that was decoded needs."""

    def short(self, what: dict[str, Any]) -> dict[str, Any]:
        """An entry's content as the log has it. The signatures go to :attr:`kept`."""
        found = dict(what)
        for key in SETS:
            if key in found:
                found[key] = bits_of(self.silos, tuple(found[key]))
        if "agreements" in found:
            found["agreements"] = self._keep(found["agreements"])
        if "roster" in found:
            others = [member for member in found["roster"] if member["role"] != "silo"]
            found["roster"] = {"others": others, "silos": self.silos.root.hex()}
        return found

    def _keep(self, agreements: dict[str, str]) -> str:
        names = sorted(agreements, key=self.silos.index)
        signatures = [bytes.fromhex(agreements[name]) for name in names]
        root = merkle_root(signatures).hex()
        if self.kept is not None:
            self.kept[root] = b"".join(signatures)
        return root + bits_of(self.silos, tuple(names))

    def long(self, what: dict[str, Any]) -> dict[str, Any]:
        """Inverse of :meth:`short`, but for the silos in ``roster``: see :meth:`whole`.

        Raises:
            ValueError: it is not what :meth:`short` writes; signatures are missing or others.
        """
        found = dict(what)
        for key in SETS:
            if key in found:
                found[key] = names_of(self.silos, _text(found[key]))
        if "agreements" in found:
            found["agreements"] = self._signed(found["agreements"])
        if "roster" in found:
            roster = found["roster"]
            if not isinstance(roster, dict) or set(roster) != {"others", "silos"}:
                raise ValueError("a roster without its root")
            if roster["silos"] != self.silos.root.hex():
                raise ValueError("names other silos or keys than the study or the roster here")
            found["roster"] = roster["others"]
        return found

    def _signed(self, said: object) -> dict[str, str]:
        whole = _text(said)
        root, names = whole[:ROOT_DIGITS], names_of(self.silos, whole[ROOT_DIGITS:])
        # Adversary: a server whose opening silos vouch for, and nobody who has the bundle can read.
        if not IS_ROOT.fullmatch(root):
            raise ValueError("agreements without the root of their signatures")
        if self.kept is None:
            return {}
        self.read.add(root)
        signatures = split(self.kept.get(root, b""))
        if len(signatures) != len(names) or merkle_root(signatures).hex() != root:
            raise ValueError(f"the signatures under the root {root[:16]}… are missing or others")
        return {name: one.hex() for name, one in zip(names, signatures, strict=True)}

    def whole(self, others: list[Member]) -> list[Member]:
        """All participants: the others, then the silos. One list for all logs of a process."""
        if any(member.role == "silo" for member in others):
            raise ValueError("a silo beside the roster's root")
        return _whole(self.silos, tuple(others))


class _Unnamed(Many):
    """For a reader who does not know the silos, and needs nothing that names them."""

    def __init__(self) -> None:
        self.kept = None

    def long(self, what: dict[str, Any]) -> dict[str, Any]:
        found = dict(what)
        for key in SETS:
            if isinstance(found.get(key), str):
                found[key] = []
        if isinstance(found.get("agreements"), str):
            found["agreements"] = {}
        if isinstance(found.get("roster"), dict):
            found["roster"] = found["roster"].get("others")
        return found

    def whole(self, others: list[Member]) -> list[Member]:
        return others


UNNAMED: Final = _Unnamed()


def agreements_of(raw: bytes) -> str:
    """The root and set of an opening's agreements, as this entry of many silos' log has them."""
    return str(msgspec.json.decode(raw)["what"]["agreements"])


def split(signatures: bytes) -> list[bytes]:
    """Signatures, one after another, apart."""
    step = SIGNATURE_BYTES
    return [signatures[at : at + step] for at in range(0, len(signatures), step)]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a list where a log of many silos has a set")
    return value


# All silos of a process, and all logs of a bundle, speak of a few sets.


@lru_cache(maxsize=256)
def bits_of(silos: Roster, names: tuple[str, ...]) -> str:
    """The set of these silos, hex.

    Raises:
        ConfigError: one is not on the roster.
    """
    return pack_set([silos.index(name) for name in names], len(silos)).hex()


@lru_cache(maxsize=256)
def names_of(silos: Roster, bits: str) -> list[str]:
    """Inverse of :func:`bits_of`; the names by index. The list is shared: nobody may change it.

    Raises:
        ValueError: no set of these silos.
    """
    found = read_set(bytes.fromhex(bits), len(silos))
    if found is None or bits != pack_set(found, len(silos)).hex():
        raise ValueError("no set of the silos of this study")
    return [silos.name(index) for index in found]


@lru_cache(maxsize=16)
def silo_members(silos: Roster) -> tuple[Member, ...]:
    """The silos as participants."""
    keys = zip(silos.names, silos.keys, strict=True)
    return tuple(Member(name, "silo", key.hex()) for name, key in keys)


@lru_cache(maxsize=16)
def _whole(silos: Roster, others: tuple[Member, ...]) -> list[Member]:
    return [*others, *silo_members(silos)]


def silos_of(study: Study, run: Path) -> Roster | None:
    """The silos of a run whose logs are written as this module says; None where they are not.

    Raises:
        StateError: the study names no participants, and the run's list of them cannot be read.
    """
    if not are_many(study.silos.count):
        return None
    if study.roster:
        return Roster(study.silo_keys)
    return read_roster(run / "server" / ROSTER)


def read_roster(path: Path) -> Roster:
    """The list of a run's silos that lies at ``path``.

    Raises:
        StateError: it cannot be read.
    """
    try:
        return decode_roster(path.read_bytes())
    except (OSError, ValueError) as error:
        why = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise StateError(
            f"{path}: the list of the run's silos cannot be read ({why})", hint="restore it"
        ) from None


def members_of(study: Study, silos: Roster, signatures: Mapping[str, bytes]) -> dict[str, bytes]:
    """What a bundle of more than 128 silos holds beside the logs.

    Args:
        signatures: root, hex → the signatures under it, one after another.
    """
    found = {f"signatures/{root}": raw for root, raw in signatures.items()}
    return found if study.roster else found | {ROSTER: encode_roster(silos)}


def encode_roster(silos: Roster) -> bytes:
    """The silos' names and Ed25519 keys (hex), RFC 8785."""
    pairs = zip(silos.names, silos.keys, strict=True)
    return canonical([[name, key.hex()] for name, key in pairs])


@lru_cache(maxsize=2)
def decode_roster(raw: bytes) -> Roster:
    """Inverse of :func:`encode_roster`.

    Raises:
        ValueError: it is no roster.
    """
    try:
        pairs = msgspec.convert(decode_canonical(raw), list[tuple[str, str]])
        found = Roster({name: bytes.fromhex(key) for name, key in pairs})
    except (msgspec.ValidationError, ConfigError) as error:
        raise ValueError(f"no roster ({str(error)[:120]})") from None
    if encode_roster(found) != raw:
        raise ValueError("no roster in the order of names")
    return found
