"""The context of a round's signatures and keys: parameters, roster, round header.

A silo makes the header from its *own* view: the study it signed, the round it is in, and the global
model state it was sent. The server's copy is only compared with it. The hash of the model defeats a
server that sends different models to different silos so that the "sum" consists of one silo's
update (Pasquini et al., arXiv 2111.07380). Silos with different models have different headers, so
they neither accept each other's keys nor open a sum together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Final, NoReturn

import msgspec

from securefedcollm.errors import ConfigError, LocalProtocolError
from securefedcollm.primitives import KEY_BYTES, merkle_root, sha256

SUITE: Final = "securefedcollm-masking-v1"
"""X25519, Ed25519, HKDF-SHA256, ChaCha20-Poly1305, AES-256-CTR, Shamir over 2^256 + 297."""

GRAPH_SUITE: Final = "securefedcollm-masking-graph-v1"
"""The same on a random graph; its sizes k and t follow, as in ``…-v1/114/78``."""

MIN_SILOS: Final = 3
MAX_SILOS: Final = 128
"""The complete graph of pairwise masks is quadratic; beyond this a sparse graph is needed."""
MAX_COHORT: Final = 10_000
"""Silos on a sparse graph."""

MOST_ATTEMPTS: Final = 64
"""At one sum that a silo takes part in, restarts included. Each writes into journal and evidence
log, and on a graph draws new neighbours. An honest server takes a few, and under a threshold key
one more for every silo that is lost."""

MAX_VALUES: Final = 2**32
MAX_SUM: Final = 2**62
"""Bound that no sum may reach, so that sums and their offsets are exact in int64."""

WORD_BITS: Final = 64

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
RunId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Counter = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


def _refuse(where: str, message: str, hint: str) -> NoReturn:
    raise ConfigError(message, where=where, hint=hint)


class RingParameters(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Sizes and floors of a round, from the signed study. The server chooses none of them.

    Args:
        values: d, length of a silo's vector.
        bound: every entry q of a vector satisfies abs(q) <= bound (integers).
        field_bits: b, bits a packed field takes; 2·bound·silos + 1 values must fit.
        silos: n, size of the roster.
        min_silos: least number of vectors in a sum that is opened.
        threshold: t, Shamir threshold and least number of agreeing survivors.
        colluders: c, silos that may work with the server without breaking the guarantee.

    Raises:
        ConfigError: a floor is not kept; the message names the field.
    """

    values: Size
    bound: Size
    field_bits: Size
    silos: Size
    min_silos: Size
    threshold: Size
    colluders: Size

    def __post_init__(self) -> None:
        n, t, c = self.silos, self.threshold, self.colluders
        if not MIN_SILOS <= n <= MAX_COHORT:
            _refuse("silos", f"{n} silos", f"between {MIN_SILOS} and {MAX_COHORT}")
        if not 1 <= self.values <= MAX_VALUES:
            _refuse("values", f"a vector of {self.values} values", f"between 1 and {MAX_VALUES}")
        # Adversary: a server that asks for a tiny modulus, or a ring that wraps unnoticed. The
        # offset sum of all n silos must fit one field, or it would carry into its neighbour.
        if self.bound < 1 or 2 * self.bound * n >= MAX_SUM:
            _refuse("bound", f"bound {self.bound} for {n} silos", "at least 1, sums below 2^62")
        if not (2 * self.bound * n).bit_length() <= self.field_bits <= WORD_BITS:
            needed = (2 * self.bound * n).bit_length()
            _refuse(
                "field_bits",
                f"{self.field_bits} bits cannot hold a sum of {n} values bounded by {self.bound}",
                f"between {needed} and {WORD_BITS}",
            )
        # Adversary: a server that shows two quorums different survivor sets, to collect both kinds
        # of share of one silo. Two quorums of t share more than c silos exactly when 2t > n + c:
        # one of these is honest, and an honest silo answers once.
        if not n + c < 2 * t <= 2 * n:
            _refuse(
                "threshold",
                f"threshold {t} for {n} silos of which {c} may collude",
                f"between {(n + c) // 2 + 1} and {n} (twice the threshold must exceed {n} + {c})",
            )
        # Adversary: the server and c silos subtract what they know from the sum; two honest
        # vectors must remain in it.
        if not c + 2 <= self.min_silos <= n:
            _refuse(
                "min_silos",
                f"a sum over {self.min_silos} silos of which {c} may collude",
                f"between colluders + 2 = {c + 2} and {n}",
            )

    @property
    def per_word(self) -> int:
        """m: packed fields in one 64-bit word."""
        return WORD_BITS // self.field_bits

    @property
    def words(self) -> int:
        """w: 64-bit words of a packed vector."""
        return -(-self.values // self.per_word)

    @property
    def quorum(self) -> int:
        """Least number of silos with which any step may close."""
        return max(self.threshold, self.min_silos)

    @classmethod
    def smallest(cls, *, values: int, bound: int, silos: int, colluders: int = 0) -> RingParameters:
        """The narrowest field and the least floors that still keep the guarantee.

        Raises:
            ConfigError: as the class.
        """
        return cls(
            values=values,
            bound=bound,
            field_bits=(2 * bound * max(1, silos)).bit_length(),
            silos=silos,
            min_silos=colluders + 2,
            threshold=(silos + colluders) // 2 + 1,
            colluders=colluders,
        )


class RoundHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The context of one attempt at one round. Two parties agree on all of it or on nothing.

    Args:
        study_digest: 32 bytes, digest of the study that every participant signed.
        run_id: 16 bytes.
        round: number of the round, from 0.
        attempt: number of the attempt at this round; every attempt has fresh keys.
        model_digest: SHA-256 of the global model state that *this* party holds (32 bytes).
        parameters: sizes and floors.
        roster_root: Merkle root of the roster (:attr:`Roster.root`).
    """

    study_digest: Digest
    run_id: RunId
    round: Counter
    attempt: Counter
    model_digest: Digest
    parameters: RingParameters
    roster_root: Digest
    suite: str = SUITE

    def __post_init__(self) -> None:
        for name, length in (
            ("study_digest", 32),
            ("run_id", 16),
            ("model_digest", 32),
            ("roster_root", 32),
        ):
            if len(getattr(self, name)) != length:
                _refuse(name, "wrong length", f"{length} bytes")
        for name in ("round", "attempt"):
            if not 0 <= getattr(self, name) < 2**32:
                _refuse(name, "out of range", "between 0 and 2^32 - 1")
        if self.parameters.silos > MAX_SILOS and not self.on_graph:
            _refuse(
                "silos",
                f"{self.parameters.silos} silos",
                f"between {MIN_SILOS} and {MAX_SILOS}; more take a graph",
            )

    @property
    def on_graph(self) -> bool:
        """Whether masks are between neighbours in a random graph."""
        return self.suite.startswith(f"{GRAPH_SUITE}/")

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for the whole header in messages, signatures and key derivations."""
        return sha256(b"securefedcollm/v1/header\0", msgspec.msgpack.encode(self))

    @property
    def attempt_scope(self) -> bytes:
        """32 bytes that name this attempt, independent of model, parameters and roster."""
        return attempt_scope(self.study_digest, self.run_id, self.round, self.attempt)

    @property
    def round_scope(self) -> bytes:
        """32 bytes that name this round, all attempts together: at most one of them is opened."""
        return round_scope(self.study_digest, self.run_id, self.round)

    def differences(self, other: RoundHeader) -> list[str]:
        """Names of the fields in which ``other`` differs."""
        return [
            name for name in self.__struct_fields__ if getattr(self, name) != getattr(other, name)
        ]


def attempt_scope(study_digest: bytes, run_id: bytes, round_: int, attempt: int) -> bytes:
    """:attr:`RoundHeader.attempt_scope` for code that has no header."""
    place = study_digest + run_id + round_.to_bytes(4, "big")
    return sha256(b"securefedcollm/v1/attempt\0", place, attempt.to_bytes(4, "big"))


def round_scope(study_digest: bytes, run_id: bytes, round_: int) -> bytes:
    """:attr:`RoundHeader.round_scope` for code that has no header."""
    return sha256(b"securefedcollm/v1/round\0", study_digest, run_id, round_.to_bytes(4, "big"))


def names_digest(names: Iterable[str]) -> bytes:
    """32 bytes that stand for the silos of a sum, by index: the journal's record of it."""
    return sha256(*(sha256(name.encode()) for name in names))


class Roster:
    """The silos of a study: names, Ed25519 public keys, and 1-based indices by sorted name.

    The index of a silo is also its Shamir x-coordinate; it comes from the signed roster and never
    from a message, so a share cannot be presented under another silo's coordinate.

    Args:
        keys: name -> 32-byte Ed25519 public key.

    Raises:
        ConfigError: a name is unusable, a key has the wrong length or serves two names.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        for name, key in keys.items():
            if not name.isprintable() or not 1 <= len(name) <= 64 or name == "server":
                _refuse("roster", f"unusable silo name {name!r}", "1-64 printable characters")
            if len(key) != KEY_BYTES:
                _refuse(f"roster.{name}", "wrong key length", "an Ed25519 public key: 32 bytes")
        # Adversary: one party on the roster under several names outvotes the threshold.
        if len(set(keys.values())) != len(keys):
            _refuse("roster", "two silos have the same public key", "one key for each organisation")
        self.names: tuple[str, ...] = tuple(sorted(keys))
        self.keys: tuple[bytes, ...] = tuple(keys[name] for name in self.names)
        self._indices = {name: i for i, name in enumerate(self.names, start=1)}
        self.root: bytes = merkle_root(
            [msgspec.msgpack.encode(pair) for pair in zip(self.names, self.keys, strict=True)]
        )
        """RFC 9162 Merkle root over msgpack ``[name, key]``, in index order."""

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._indices

    def index(self, name: str) -> int:
        """1-based index of ``name``.

        Raises:
            ConfigError: not on the roster.
        """
        if name not in self._indices:
            _refuse("roster", f"{name!r} is not on it", "names are those in the signed study")
        return self._indices[name]

    def name(self, index: int) -> str:
        """Name of the silo with a 1-based ``index`` (the caller has checked the range)."""
        return self.names[index - 1]

    def key(self, index: int) -> bytes:
        """Ed25519 public key of the silo with a 1-based ``index``."""
        return self.keys[index - 1]


class Authority(msgspec.Struct, frozen=True):
    """The party that holds the key in ``ckks-authority``: its name and Ed25519 public key."""

    name: str
    key: bytes


def check_roster(header: RoundHeader, roster: Roster) -> None:
    """Both sides' first check: the header speaks of this roster.

    Raises:
        LocalProtocolError: another roster or another number of silos.
    """
    if header.roster_root != roster.root or header.parameters.silos != len(roster):
        raise LocalProtocolError(
            f"the header is not for this roster of {len(roster)} silos",
            hint="make roster, parameters and header from one study",
        )
