"""The secrets of a silo, or of an authority, in one attempt of CKKS aggregation, and their uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.messages import CipherUpload
from securefedcollm.aggregation.ckks.parameters import DEGREE, CkksRing, Shape
from securefedcollm.aggregation.ckks.polynomials import ROWS, Residues
from securefedcollm.aggregation.ckks.seal import Factor, Seal
from securefedcollm.errors import LocalProtocolError
from securefedcollm.primitives import RandomSource


class CkksSecrets:
    """The vector, and its ciphertext until that has left.

    Args:
        shape: how many keys there are, and which chunk is under which.
        vector: int64 [d], within the ring's bound.
        common: the polynomial a that all keys have in common, [1, N], transformed.
        random: of the encryption randomness u and errors.

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
        polynomials.check_vector(vector, ring)
        self._vector = vector.copy()
        self._seal = Seal(ring)
        self._upload: CipherUpload | None = None

    def __repr__(self) -> str:
        return "CkksSecrets(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("CkksSecrets are neither copied nor pickled")

    def encrypt(self, joint: Residues) -> CipherUpload:
        """The vector under the committees' joint keys; it is needed no longer.

        For each group and committee a fresh ternary u: Σ b·u + e0 + Δ·v for its chunks, and for
        each committee a·u + e1.

        Args:
            joint: this silo's own keys b, [committees, keys, N], transformed.
        """
        keys, chunks, committees = self._shape.keys, self._shape.chunks, self._shape.committees
        u = self._seal.factors(self._seal.transformed(self._ternary(self._shape.seconds)))
        first: list[bytes] = []
        second: list[bytes] = []
        for start in range(0, chunks, keys):
            count = min(keys, chunks - start)
            if start == 0 or count < keys:
                loaded = [
                    self._seal.load(np.concatenate([joint[k, :count], self._commons(k)]))
                    for k in range(committees)
                ]
            noise = polynomials.errors(count + committees, self._ring, self._random)
            values = self._vector[start * DEGREE : (start + count) * DEGREE]
            encoded = polynomials.encode(values, self._ring)
            noise[:count] = polynomials.add(noise[:count], encoded, self._ring)
            of_group = u[start // keys * committees :][:committees]
            made = self._seal.products(list(zip(of_group, loaded, strict=True)), noise)
            first.append(polynomials.pack(made[:count], self._ring))
            second.append(polynomials.pack(made[count:], self._ring))
        self._vector = np.zeros(0, dtype=np.int64)
        self._upload = CipherUpload(b"".join(first), b"".join(second))
        return self._upload

    def _ternary(self, rows: int) -> Residues:
        return polynomials.ternary(rows, self._ring, self._random)

    def _commons(self, committee: int) -> Residues:
        """a for one committee's second polynomial, and nothing for the others'."""
        rows = np.zeros((self._shape.committees, DEGREE), dtype=np.uint64)
        rows[committee] = self._common[0]
        return rows

    def take_upload(self) -> CipherUpload:
        """The ciphertext, once."""
        upload, self._upload = self._upload, None
        if upload is None:
            raise LocalProtocolError("there is no ciphertext to upload", hint="it leaves once")
        return upload

    def close(self) -> None:
        """Give SEAL's anonymous memory back."""
        self._seal.close()


class KeyShares:
    """A key holder's secrets of one attempt: some of its own for every silo's keys.

    The holder is the authority, or every silo. A colluder can read the secrets that its upload is
    multiplied with out of the opened sum. They belong to no other silo.

    Args:
        silos: number of silos on the roster.
        random: of secrets, errors and flooding noise.
    """

    def __init__(
        self, ring: CkksRing, shape: Shape, common: Residues, silos: int, random: RandomSource
    ) -> None:
        self._ring = ring
        self._shape = shape
        self._common = common
        self._random = random
        self._seal = Seal(ring)
        self._silos = silos
        self._secrets: list[list[Factor]] = []

    def __repr__(self) -> str:
        return "KeyShares(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("KeyShares are neither copied nor pickled")

    def key_parts(self) -> tuple[bytes, ...]:
        """b = e − a·s for every key, with fresh secrets s, packed, for each silo."""
        zero = np.zeros_like(self._common)
        (minus,) = self._seal.factors(polynomials.subtract(zero, self._common, self._ring))
        parts = []
        self._secrets = []
        for _ in range(self._silos):
            drawn = polynomials.ternary(self._shape.keys, self._ring, self._random)
            secrets = self._seal.transformed(drawn)
            self._secrets.append(self._seal.factors(secrets))
            noise = polynomials.errors(self._shape.keys, self._ring, self._random)
            made = self._seal.products([(minus, self._seal.load(secrets))], noise)
            parts.append(polynomials.pack(made, self._ring))
        return tuple(parts)

    def decrypt(self, seconds: Mapping[int, Residues]) -> bytes:
        """Σ c1·s, each c1 by its owner's secrets, + flooding noise, packed, for every chunk.

        Args:
            seconds: silo's index → its second polynomials [groups, N], transformed.
        """
        keys, chunks, groups = self._shape.keys, self._shape.chunks, self._shape.groups
        total = np.empty((groups, keys, DEGREE), dtype=np.uint64)
        for start in range(0, groups, ROWS):
            block = total[start : start + ROWS]
            loaded = {
                index: self._seal.load(second[start : start + ROWS])
                for index, second in seconds.items()
            }
            for key in range(keys):
                noise = polynomials.flooding(len(block), self._ring, self._random)
                terms = [(self._secrets[index - 1][key], c1) for index, c1 in loaded.items()]
                block[:, key] = self._seal.products(terms, noise)
        return polynomials.pack(total.reshape(-1, DEGREE)[:chunks], self._ring)

    def close(self) -> None:
        """Give SEAL's anonymous memory back."""
        self._seal.close()
