"""What a silo keeps to itself during one attempt of CKKS aggregation, and the uses it has."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation import ckks_ring
from securefedcollm.aggregation.ckks_messages import CipherUpload
from securefedcollm.aggregation.ckks_ring import ROWS, Residues
from securefedcollm.aggregation.ckks_seal import Seal
from securefedcollm.errors import LocalProtocolError
from securefedcollm.primitives import RandomSource
from securefedcollm.study.ring import DEGREE, CkksRing


class CkksSecrets:
    """A fresh share of the key, the vector, and its ciphertext until that has left.

    Args:
        vector: int64 [d], within the ring's bound.
        random: of the flooding noise.

    Raises:
        LocalProtocolError: the vector is out of bounds.
    """

    def __init__(
        self, ring: CkksRing, vector: npt.NDArray[np.int64], common: Residues, random: RandomSource
    ) -> None:
        self._ring = ring
        self._common = common
        self._random = random
        self._message = ckks_ring.encode(vector, ring)
        self._seal = Seal(ring)
        self._key = self._seal.secret()
        self._upload: CipherUpload | None = None

    def __repr__(self) -> str:
        return "CkksSecrets(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("CkksSecrets are neither copied nor pickled")

    def key_part(self) -> bytes:
        """b = e − a·s, packed."""
        return ckks_ring.pack(self._seal.key_part(self._key, self._common), self._ring)

    def encrypt(self, joint: Residues) -> CipherUpload:
        """The vector under the joint key [1, N]; the vector itself is dropped."""
        encryptor = self._seal.encryptor(joint, self._common)
        first: list[bytes] = []
        second: list[bytes] = []
        c0, c1 = np.empty((2, ROWS, DEGREE), dtype=np.uint64)
        for start in range(0, len(self._message), ROWS):
            rows = self._message[start : start + ROWS]
            for row, message in enumerate(rows):
                c0[row], c1[row] = self._seal.encrypt(encryptor, message)
            first.append(ckks_ring.pack(c0[: len(rows)], self._ring))
            second.append(ckks_ring.pack(c1[: len(rows)], self._ring))
        self._message = np.zeros((0, 0), dtype=np.uint64)
        self._upload = CipherUpload(b"".join(first), b"".join(second))
        return self._upload

    def take_upload(self) -> CipherUpload:
        """The ciphertext, once."""
        upload, self._upload = self._upload, None
        if upload is None:
            raise LocalProtocolError("there is no ciphertext to upload", hint="it leaves once")
        return upload

    def decrypt(self, second: bytes) -> bytes:
        """c1·s + flooding noise for packed polynomials c1, packed.

        Raises:
            CryptoError: ``second`` holds no polynomials.
        """
        size = ckks_ring.polynomial_bytes(self._ring)
        share: list[bytes] = []
        for start in range(0, len(second), ROWS * size):
            data = second[start : start + ROWS * size]
            rows = ckks_ring.unpack(data, self._ring, -(-len(data) // size))
            noise = ckks_ring.flooding(len(rows), self._ring, self._random)
            parts = [
                self._seal.partial(self._key, c1, flood)
                for c1, flood in zip(rows, noise, strict=True)
            ]
            share.append(ckks_ring.pack(np.stack(parts), self._ring))
        return b"".join(share)

    def close(self) -> None:
        """Give SEAL's anonymous memory back."""
        self._seal.close()
