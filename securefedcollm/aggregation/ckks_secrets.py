"""What a silo, or an authority, keeps to itself during one attempt of CKKS aggregation, and the
uses it has."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation import ckks_ring
from securefedcollm.aggregation.ckks_messages import CipherUpload
from securefedcollm.aggregation.ckks_ring import ROWS, Residues
from securefedcollm.aggregation.ckks_seal import Seal, Secret
from securefedcollm.errors import LocalProtocolError
from securefedcollm.primitives import RandomSource
from securefedcollm.study.ring import DEGREE, CkksRing, Shape


class CkksSecrets:
    """Fresh shares of the keys, the vector, and its ciphertext until that has left.

    Args:
        shape: how many keys there are, and which chunk is under which.
        vector: int64 [d], within the ring's bound; empty for an authority, which encrypts nothing.
        common: the polynomial a that all keys have in common, [1, N], transformed.
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
        self._shares: list[Secret] = []
        self._upload: CipherUpload | None = None

    def __repr__(self) -> str:
        return "CkksSecrets(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("CkksSecrets are neither copied nor pickled")

    def key_parts(self) -> bytes:
        """b = e − a·s for every key, with fresh secrets s, packed."""
        self._shares = [self._seal.secret() for _ in range(self._shape.keys)]
        zero = np.zeros_like(self._common)
        minus = self._seal.load(ckks_ring.subtract(zero, self._common, self._ring))
        errors = self._errors(self._shape.keys)
        parts = [
            self._seal.products(share, minus, error[np.newaxis])
            for share, error in zip(self._shares, errors, strict=True)
        ]
        return ckks_ring.pack(np.concatenate(parts), self._ring)

    def encrypt(self, joint: Residues) -> CipherUpload:
        """The vector under the joint keys [keys, N]; it is needed no longer.

        For each group a fresh ternary u: b·u + e0 + Δ·v for its chunks, and a·u + e1.
        """
        keys, chunks = self._shape.keys, self._shape.chunks
        first: list[bytes] = []
        second: list[bytes] = []
        for start in range(0, chunks, keys):
            count = min(keys, chunks - start)
            if start == 0 or count < keys:
                loaded = self._seal.load(np.concatenate([joint[:count], self._common]))
            noise = self._errors(count + 1)
            values = self._vector[start * DEGREE : (start + count) * DEGREE]
            noise[:-1] = ckks_ring.add(noise[:-1], ckks_ring.encode(values, self._ring), self._ring)
            made = self._seal.products(self._seal.secret(), loaded, noise)
            first.append(ckks_ring.pack(made[:-1], self._ring))
            second.append(ckks_ring.pack(made[-1:], self._ring))
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
        keys, chunks = self._shape.keys, self._shape.chunks
        shares: list[bytes] = [b""] * chunks
        groups = ckks_ring.unpack(second, self._ring, self._shape.groups)
        size = ckks_ring.polynomial_bytes(self._ring)
        for start in range(0, len(groups), ROWS):
            block = groups[start : start + ROWS]
            loaded = self._seal.load(block)
            for key, share in enumerate(self._shares):
                noise = ckks_ring.flooding(len(block), self._ring, self._random)
                made = ckks_ring.pack(self._seal.products(share, loaded, noise), self._ring)
                for row in range(len(block)):
                    chunk = (start + row) * keys + key
                    if chunk < chunks:
                        shares[chunk] = made[row * size : (row + 1) * size]
        return b"".join(shares)

    def _errors(self, rows: int) -> Residues:
        return ckks_ring.errors(rows, self._ring, self._random)

    def close(self) -> None:
        """Give SEAL's anonymous memory back."""
        self._seal.close()
