"""The interface of the schemes: the roles' protocols, and the values that they return.

A round is a fixed number of exchanges. In each, the coordinator has one frame for every silo that
takes part, and every silo returns one frame or is lost. No role does I/O. The federation's engines
carry the bytes, and only its journal outlives a process.
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import ProtocolError

SERVER: Final = "server"
"""The name of the coordinator in errors: no silo has it."""


class AbandonedError(ProtocolError):
    """The attempt cannot go on without the silos that were lost; the others may repeat it.

    Args:
        lost: name -> reason.
    """

    def __init__(self, message: str, *, lost: dict[str, str], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.lost = lost


class Journal(Protocol):
    """A silo's write-ahead record of its answers, kept across crashes and restarts."""

    def record(self, key: bytes, value: bytes) -> bytes:
        """Store ``value`` under ``key`` unless something is stored there; return what is stored.

        Must be atomic across processes: the first writer wins. The record must survive a power
        failure before the reply of this step leaves, so the store writes it before this returns,
        or before whoever sends the reply does. Keys and values are short (at most 64 bytes) and not
        secret. Raises whatever the store raises; the silo then answers nothing.
        """
        ...


class Word(msgspec.Struct, frozen=True):
    """The authority's signed statement of what it opened: for the evidence log.

    Args:
        survivors: names whose vectors are in the sum.
        share: SHA-256 of its partial decryption.
        signature: over the header's digest, the transcript, the share and the survivors.
    """

    survivors: tuple[str, ...]
    share: bytes
    signature: bytes


class Sealing(msgspec.Struct, frozen=True):
    """The content of a CKKS attempt's transcript digest, for the evidence log.

    Args:
        key: id of the key, 32 bytes.
        roots: name -> digest of its ciphertext, and its 64-byte signature over that.
        offer: SHA-256 of the key, and the authority's 64-byte signature; empty for a joint key.
    """

    key: bytes
    roots: dict[str, tuple[bytes, bytes]]
    offer: tuple[bytes, bytes] | None = None


class RoundResult(msgspec.Struct, frozen=True):
    """The server's result of a completed round.

    Args:
        sum: int64 [d], the exact sum of the survivors' vectors; int32 where a ``narrow`` one was
            asked for, and holds it.
        survivors: names whose vectors are in the sum, in roster order.
        dropouts: names that dealt shares but whose vectors are not in the sum.
        excluded: name -> reason for every silo that stopped taking part. A silo that left after its
            upload is still among the survivors.
        header_digest: 32 bytes.
        transcript: 32 bytes that fix what is in the sum; every name in ``agreements`` signed it.
        agreements: name -> 64-byte signature that covers the transcript, for the audit log.
        word: the authority's statement of what it opened, if an authority holds the key.
    """

    sum: npt.NDArray[np.int64] | npt.NDArray[np.int32]
    survivors: tuple[str, ...]
    dropouts: tuple[str, ...]
    excluded: dict[str, str]
    header_digest: bytes
    transcript: bytes
    agreements: dict[str, bytes]
    word: Word | None = None

    def __repr__(self) -> str:
        return f"RoundResult(survivors={self.survivors}, excluded={self.excluded})"


class Transcript(msgspec.Struct, frozen=True):
    """The agreements so far, as one side has seen them: public, for the evidence log.

    Args:
        header, delivery, lists: digests, 32 bytes each; empty if not there yet.
        survivors, dropouts: names, in roster order.
        agreements: coordinator only: name -> 64-byte signature over the lists (masking), over its
            verdict (CKKS) or over the delivery (under an authority's key).
        sealing: coordinator only: the content of which ``delivery`` is the digest, under CKKS.
        word: silo only: the authority's, once it was seen.
        tally: silo on a graph only: the root of the agreements that the server counted, and the set
            of silos that made them, once it was seen.
    """

    header: bytes
    delivery: bytes = b""
    lists: bytes = b""
    survivors: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    agreements: dict[str, bytes] = {}
    sealing: Sealing | None = None
    word: Word | None = None
    tally: bytes = b""


class SiloSide(Protocol):
    """A silo's side of one attempt at one round."""

    @property
    def step(self) -> Step: ...

    @property
    def transcript(self) -> Transcript:
        """What this silo has accepted so far."""
        ...

    def handle(self, frame: bytes) -> bytes:
        """Answer the server's next request.

        Raises:
            RemoteProtocolError: the request must not be answered. This side has failed for good and
                has dropped its secrets.
        """
        ...

    def close(self) -> None:
        """Drop the secrets: this attempt is over."""
        ...


class AuthoritySide(Protocol):
    """The key holder's side of one attempt at one round."""

    @property
    def step(self) -> Step: ...

    @property
    def transcript(self) -> Transcript:
        """The ciphertexts that it was shown, once it has opened a sum."""
        ...

    @property
    def key_id(self) -> bytes:
        """32 bytes that stand for this attempt's key; empty before there is one."""
        ...

    def handle(self, frame: bytes) -> bytes:
        """As :meth:`SiloSide.handle`."""
        ...

    def close(self) -> None:
        """As :meth:`SiloSide.close`."""
        ...


class CoordinatorSide(Protocol):
    """The server's side of one attempt at one round."""

    @property
    def step(self) -> Step: ...

    @property
    def transcript(self) -> Transcript:
        """What the silos have agreed to so far."""
        ...

    @property
    def excluded(self) -> dict[str, str]:
        """Name -> reason for every silo that has stopped taking part so far."""
        ...

    def requests(self) -> dict[str, bytes]:
        """One frame for everybody who takes part in this step: silos, or the authority."""
        ...

    def receive(self, silo: str, frame: bytes | memoryview) -> None:
        """Take a silo's reply.

        Raises:
            RemoteProtocolError: the reply does not fit; that silo is out. A second or a late reply
                changes nothing.
        """
        ...

    def lost(self, silo: str, reason: str) -> None:
        """Take note that a silo will not reply (timeout, disconnected, refused)."""
        ...

    def advance(self) -> bool:
        """Close this step; whoever has not replied is out. True while there is a next step.

        Raises:
            ProtocolError: too few silos are left, or one of them (``RemoteProtocolError.peer``)
                made the sum impossible to open. The attempt has failed and nothing was learnt.
        """
        ...

    @property
    def result(self) -> RoundResult:
        """The sum, once :meth:`advance` has returned False."""
        ...
