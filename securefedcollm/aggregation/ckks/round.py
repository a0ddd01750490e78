"""The handling of ciphertexts that the coordinators of both CKKS schemes share.

The adversary is up to c malicious silos and the network: every ciphertext is bound to the
commitment before it, and only polynomials are added up, whatever they decrypt to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.attendance import AttendedRound
from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.aggregation.ckks.polynomials import Residues
from securefedcollm.aggregation.ckks.seal import Seal
from securefedcollm.aggregation.header import Roster, RoundHeader
from securefedcollm.aggregation.messages import decode
from securefedcollm.aggregation.steps import Step, Transition
from securefedcollm.errors import CryptoError
from securefedcollm.primitives import sha256


class CkksAttendedRound(AttendedRound):
    """A coordinator that adds first polynomials and fuses the sum with partial decryptions.

    Adding needs no key and no library. The arguments are those of
    :class:`~.attendance.AttendedRound`.

    Raises:
        LocalProtocolError: the header is for another roster.
        ConfigError: no ring holds the sum.
    """

    def __init__(
        self,
        header: RoundHeader,
        roster: Roster,
        transitions: Mapping[Step, Transition],
        others: Collection[str] = (),
    ) -> None:
        super().__init__(header, roster, transitions, others)
        self._ring = m.ring_of(header)
        self._size = polynomials.polynomial_bytes(self._ring)
        self._shape = m.shape_of(header)
        self._key_id = b""
        self._sealed: dict[int, m.Sealed] = {}
        self._transcript = b""
        self._sum = _zeros(0)  # of first polynomials, then of decryptions too

    def _forget(self) -> None:
        self._sum = _zeros(0)

    def _limit(self, count: int) -> int:
        return m.frame_limit(self._parameters, self._ring, count)

    def _on_sealed(self, name: str, frame: bytes | memoryview) -> None:
        """Take a silo's commitment to its ciphertext."""
        sealed = decode(m.Sealed, frame, name)
        index = self._check_signed(name, sealed)
        if sealed.key != self._key_id:
            self._blame(name, "encrypted under another key")
        self._sealed[index] = sealed

    def _commit(self) -> None:
        """The list of commitments is complete: uploads can be added."""
        self._transcript = m.transcript(self._key_id, tuple(self._sealed.values()))
        self._sum = _zeros(self._shape.chunks)

    def _add_ciphertext(
        self, index: int, first: bytes, second: bytes, seconds: int
    ) -> tuple[bytes, bytes]:
        """Check a silo's ciphertext, and add its first polynomials to the sum.

        Args:
            first, second: packed polynomials.
            seconds: how many second ones there must be.

        Returns:
            The digest of the first polynomials, and those of the second, concatenated.

        Raises:
            RemoteProtocolError: not what it committed to, or no polynomials; the sum is as it was.
        """
        name = self._roster.name(index)
        # Adversary: a silo or the network that replaces a ciphertext after the commitments were
        # shown; a flipped bit, which SEAL would decrypt to garbage without an error.
        digest, digests = sha256(first), m.polynomial_digests(second, self._size)
        if m.cipher_root(self._key_id, index, digest, digests) != self._sealed[index].root:
            self._blame(name, "uploaded another ciphertext than it committed to")
        # Adversary: a silo that committed to no polynomials, to spoil the sum for the others.
        self._check_polynomials(name, second, seconds)
        self._accumulate(name, first)
        return digest, digests

    def _check_polynomials(self, name: str, data: bytes, count: int) -> None:
        # Adversary: an empty or short vector, which SEAL's loader would take for a valid one.
        try:
            polynomials.unpack(data, self._ring, count)
        except CryptoError as error:
            self._blame(name, f"sent malformed polynomials: {error}")

    def _accumulate(self, name: str, data: bytes) -> None:
        # Adversary: as above. The sum is then as it was before.
        try:
            polynomials.accumulate(self._sum, data, self._ring)
        except CryptoError as error:
            self._blame(name, f"sent malformed polynomials: {error}")

    def _decoded(self, count: int) -> npt.NDArray[np.int64]:
        """The sum of ``count`` vectors, int64 [d], once every decryption is added.

        Raises:
            ProtocolError: it is not one that ``count`` honest vectors can make.
        """
        with Seal(self._ring) as seal:
            coefficients = seal.coefficients(self._sum)
        return polynomials.decode(coefficients, self._ring, self._parameters.values, count)

    def _roots(self) -> dict[str, tuple[bytes, bytes]]:
        """Name -> digest of its ciphertext and its signature over that, for the evidence log."""
        return {self._roster.name(i): (s.root, s.signature) for i, s in self._sealed.items()}


def _zeros(rows: int) -> Residues:
    return np.zeros((rows, DEGREE), dtype=np.uint64)
