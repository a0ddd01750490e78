"""What a silo, or an authority, keeps to itself during one attempt of CKKS aggregation, and the
uses it has."""

from __future__ import annotations

from collections.abc import Mapping
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
        vector: int64 [d], within the ring's bound.
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


class AuthoritySecrets:
    """An authority's secrets of one attempt: some of its own for every silo.

    Args:
        silos: number of silos on the roster.
        random: of errors and flooding noise. SEAL draws secrets from the system by itself.
    """

    def __init__(
        self, ring: CkksRing, shape: Shape, common: Residues, silos: int, random: RandomSource
    ) -> None:
        self._ring = ring
        self._shape = shape
        self._common = common
        self._random = random
        self._seal = Seal(ring)
        self._secrets = [[self._seal.secret() for _ in range(shape.keys)] for _ in range(silos)]

    def __repr__(self) -> str:
        return "AuthoritySecrets(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("AuthoritySecrets are neither copied nor pickled")

    def key_parts(self) -> tuple[bytes, ...]:
        """b = e − a·s for every key, packed, for each silo."""
        zero = np.zeros_like(self._common)
        minus = self._seal.load(ckks_ring.subtract(zero, self._common, self._ring))
        parts = []
        for secrets in self._secrets:
            noise = ckks_ring.errors(len(secrets), self._ring, self._random)
            made = [
                self._seal.products(secret, minus, error[np.newaxis])
                for secret, error in zip(secrets, noise, strict=True)
            ]
            parts.append(ckks_ring.pack(np.concatenate(made), self._ring))
        return tuple(parts)

    def decrypt(self, seconds: Mapping[int, Residues]) -> bytes:
        """Σ c1·s, each c1 by its owner's secrets, + flooding noise, packed, for every chunk.

        Args:
            seconds: silo's index → its second polynomials [groups, N], transformed.
        """
        keys, chunks, groups = self._shape.keys, self._shape.chunks, self._shape.groups
        total = np.zeros((groups, keys, DEGREE), dtype=np.uint64)
        for start in range(0, groups, ROWS):
            block = total[start : start + ROWS]
            noise = [ckks_ring.flooding(len(block), self._ring, self._random) for _ in range(keys)]
            for index, second in seconds.items():
                loaded = self._seal.load(second[start : start + ROWS])
                for key, secret in enumerate(self._secrets[index - 1]):
                    made = self._seal.products(secret, loaded, noise[key])
                    block[:, key] = ckks_ring.add(block[:, key], made, self._ring)
                    noise[key][:] = 0  # once in the sum
        return ckks_ring.pack(total.reshape(-1, DEGREE)[:chunks], self._ring)

    def close(self) -> None:
        """Give SEAL's anonymous memory back."""
        self._seal.close()
