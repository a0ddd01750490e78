"""What a silo keeps to itself during one attempt of CKKS aggregation, and the uses it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation import ckks_ring
from securefedcollm.aggregation.ckks_messages import CipherUpload
from securefedcollm.aggregation.ckks_ring import ROWS, Residues
from securefedcollm.aggregation.ckks_seal import Seal
from securefedcollm.errors import LocalProtocolError
from securefedcollm.primitives import RandomSource
from securefedcollm.study.ring import DEGREE, CkksRing, Shape


class CkksSecrets:
    """Fresh shares of the keys, the vector, and its ciphertext until that has left.

    Args:
        shape: how many keys there are, and which chunk is under which.
        vector: int64 [d], within the ring's bound.
        common: the polynomial a that all keys have in common, coefficients [1, N].
        random: of errors and flooding noise. SEAL draws secrets from the system by itself.

    Raises:
        LocalProtocolError: the vector is out of bounds.
    """

    def __init__(
        self,
        ring: CkksRing,
        shape: Shape,
        vector: npt.NDArray[np.int64],
        common: Residues,
        random: RandomSource,
    ) -> None:
        self._ring = ring
        self._shape = shape
        self._common = common
        self._random = random
        ckks_ring.check_vector(vector, ring)
        self._vector = vector.copy()
        self._seal = Seal(ring)
        self._shares = [self._seal.secret() for _ in range(shape.keys)]
        self._upload: CipherUpload | None = None

    def __repr__(self) -> str:
        return "CkksSecrets(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("CkksSecrets are neither copied nor pickled")

    def key_parts(self) -> bytes:
        """b = e − a·s for every key, packed."""
        minus = ckks_ring.subtract(np.zeros_like(self._common), self._common, self._ring)[0]
        errors = self._errors(self._shape.keys)
        return self._pack(
            self._seal.product(share, minus, error)
            for share, error in zip(self._shares, errors, strict=True)
        )

    def encrypt(self, joint: Residues) -> CipherUpload:
        """The vector under the joint keys [keys, N], transformed; it is needed no longer.

        For each group a fresh ternary u: (b·u + e0 + Δ·v for its chunks, a·u + e1).
        """
        keys, joint = self._shape.keys, self._seal.coefficients(joint)
        first: list[bytes] = []
        second: list[bytes] = []
        for start in range(0, self._shape.chunks, keys):
            values = self._vector[start * DEGREE : (start + keys) * DEGREE]
            rows = ckks_ring.encode(values, self._ring)
            ephemeral = self._seal.secret()
            noise = ckks_ring.add(rows, self._errors(len(rows)), self._ring)
            first.append(
                self._pack(
                    self._seal.product(ephemeral, key, masked)
                    for key, masked in zip(joint, noise, strict=False)
                )
            )
            error = self._errors(1)[0]
            second.append(self._pack([self._seal.product(ephemeral, self._common[0], error)]))
        self._vector = np.zeros(0, dtype=np.int64)
        self._upload = CipherUpload(b"".join(first), b"".join(second))
        return self._upload

    def take_upload(self) -> CipherUpload:
        """The ciphertext, once."""
        upload, self._upload = self._upload, None
        if upload is None:
            raise LocalProtocolError("there is no ciphertext to upload", hint="it leaves once")
        return upload

    def decrypt(self, second: bytes) -> bytes:
        """c1·s + flooding noise, packed, for every chunk; ``second`` has a packed c1 per group.

        Raises:
            CryptoError: ``second`` holds no polynomials.
        """
        shape = self._shape
        groups = self._seal.coefficients(ckks_ring.unpack(second, self._ring, shape.groups))
        shares: list[bytes] = []
        for start in range(0, shape.chunks, ROWS):
            chunks = range(start, min(start + ROWS, shape.chunks))
            noise = ckks_ring.flooding(len(chunks), self._ring, self._random)
            shares.append(
                self._pack(
                    self._seal.product(self._shares[j % shape.keys], groups[j // shape.keys], flood)
                    for j, flood in zip(chunks, noise, strict=True)
                )
            )
        return b"".join(shares)

    def _errors(self, rows: int) -> Residues:
        return ckks_ring.errors(rows, self._ring, self._random)

    def _pack(self, polynomials: Iterable[npt.NDArray[np.uint64]]) -> bytes:
        return ckks_ring.pack(np.stack(list(polynomials)), self._ring)

    def close(self) -> None:
        """Give SEAL's anonymous memory back."""
        self._seal.close()
