"""Microsoft SEAL behind TenSEAL's ``sealapi``: the only module that imports tenseal.

SEAL does every product and transform. Polynomials go in and out as arrays, through anonymous memory
and SEAL's own file format, which this module alone writes and reads; no byte of a peer ever reaches
SEAL's loader (:mod:`~.ckks.polynomials` reads those).

A ciphertext of several polynomials, times the "plaintext" that SEAL keeps a secret key in, is each
polynomial times that one: that makes key parts, ciphertexts and partial decryptions alike.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow
import tenseal.sealapi as seal
from tenseal.sealapi import Ciphertext, SecretKey

from securefedcollm.aggregation.ckks.parameters import DEGREE, CkksRing
from securefedcollm.aggregation.ckks.polynomials import ROWS, Residues
from securefedcollm.errors import CryptoError

Factor = SecretKey
"""A polynomial that others are multiplied with, in SEAL's keeping. Most are secret."""

_HEADER: Final = struct.Struct("<HBBBBHQ")  # magic, header size, version ×2, compression, 0, size
_CIPHER: Final = struct.Struct("<BQQQdQ")  # NTT form, polynomials, N, primes, scale, correction
_PLAIN: Final = struct.Struct("<Qd")  # N, scale
_MAGIC: Final = 0xA15E
_ZSTD: Final = 2


class _Outbox:
    """An anonymous file for what SEAL saves, since sealapi saves and loads by path only."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("securefedcollm-ckks", os.MFD_CLOEXEC)
        self.path = f"/proc/self/fd/{self._fd}"

    def get(self) -> bytes:
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class _Inbox:
    """An anonymous file with a ciphertext of ``rows`` polynomials, to be loaded; for ``rows`` = 0
    with one factor. In SEAL's format.

    ``words`` are the residues, [rows, N], in place.
    """

    def __init__(self, rows: int, parms: bytes, version: tuple[int, int]) -> None:
        def head(size: int) -> bytes:
            return _HEADER.pack(_MAGIC, _HEADER.size, *version, 0, 0, _HEADER.size + size)

        shape = _CIPHER.pack(True, rows, DEGREE, 1, 1.0, 1) if rows else _PLAIN.pack(DEGREE, 1.0)
        rows = rows or 1
        count = rows * DEGREE
        array = head(8 + 8 * count) + count.to_bytes(8, "little")
        inner = parms + shape + array
        content = head(len(inner) + 8 * count) + inner
        self._fd = os.memfd_create("securefedcollm-ckks", os.MFD_CLOEXEC)
        self.path = f"/proc/self/fd/{self._fd}"
        os.ftruncate(self._fd, len(content) + 8 * count)
        self._memory = mmap.mmap(self._fd, len(content) + 8 * count)
        self._memory[: len(content)] = content
        self._form = _HEADER.size + len(parms)
        self.words: Residues = np.frombuffer(
            self._memory, dtype="<u8", offset=len(content)
        ).reshape(rows, DEGREE)

    def set_form(self, transformed: bool) -> None:
        self._memory[self._form] = transformed

    def close(self) -> None:
        """Vectors and noise went through here."""
        self.words[:] = 0
        os.close(self._fd)


class Seal:
    """SEAL for one ring. Use as a context manager: it owns two anonymous files."""

    def __init__(self, ring: CkksRing) -> None:
        self.ring = ring
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(DEGREE)
        modulus = seal.Modulus(ring.prime)
        parameters.set_coeff_modulus([modulus])
        # TC128: SEAL itself refuses a modulus too wide for 128-bit security at this degree.
        self._context = seal.SEALContext(parameters, False, seal.SEC_LEVEL_TYPE.TC128)
        if not self._context.parameters_set():
            raise CryptoError(f"SEAL refuses the ring: {self._context.parameters_error_name()}")
        self._evaluator = seal.Evaluator(self._context)
        self._out = _Outbox()
        Ciphertext(self._context).save(self._out.path)
        self._parms = struct.pack("<4Q", *self._context.first_parms_id())
        self._version = _HEADER.unpack_from(self._out.get())[2:4]
        self._inboxes: dict[int, _Inbox] = {}  # by rows, 0: of a factor

    def __enter__(self) -> Seal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the anonymous memory back; also done when an abandoned attempt is forgotten."""
        for inbox in self._inboxes.values():
            inbox.close()
        self._inboxes.clear()
        self._out.close()

    def __del__(self) -> None:
        if hasattr(self, "_inboxes"):
            self.close()

    def factors(self, transformed: Residues) -> list[SecretKey]:
        """Polynomials [k, N] to multiply others with."""
        inbox = self._inbox(0)
        made = []
        for row in transformed:
            inbox.words[0] = row
            factor = SecretKey()
            factor.load(self._context, inbox.path)
            made.append(factor)
        inbox.words[:] = 0
        return made

    def load(self, transformed: Residues) -> list[Ciphertext]:
        """Polynomials [k, N], for :meth:`products`."""
        return [self._load(block, transformed=True) for block in _blocks(transformed)]

    def products(
        self, terms: Sequence[tuple[SecretKey, Sequence[Ciphertext]]], noise: Residues
    ) -> Residues:
        """Σ polynomial·factor + noise, row by row; [k, N] transformed.

        All of the scheme is made of this. terms: a factor, and k loaded polynomials that it
        multiplies; noise: coefficients [k, N].
        """
        return self._combine(terms, noise, inverse=False)

    def combinations(
        self, terms: Sequence[tuple[SecretKey, Sequence[Ciphertext]]], noise: Residues
    ) -> Residues:
        """The same with ``noise`` transformed and the result in coefficients."""
        return self._combine(terms, noise, inverse=True)

    def _combine(
        self,
        terms: Sequence[tuple[SecretKey, Sequence[Ciphertext]]],
        noise: Residues,
        inverse: bool,
    ) -> Residues:
        plains = [(factor.data(), loaded) for factor, loaded in terms]
        product, out = Ciphertext(self._context), np.empty_like(noise)
        for at, (block, target) in enumerate(zip(_blocks(noise), _blocks(out), strict=True)):
            cipher = self._load(block, transformed=inverse)
            if not inverse:
                self._evaluator.transform_to_ntt_inplace(cipher)
            for plain, loaded in plains:
                self._evaluator.multiply_plain(loaded[at], plain, product)
                self._evaluator.add_inplace(cipher, product)
            if inverse:
                self._evaluator.transform_from_ntt_inplace(cipher)
            target[:] = self._save(cipher, len(block))
        return out

    def transformed(self, coefficients: Residues) -> Residues:
        """The transform of polynomials [k, N]."""
        return self.products([], coefficients)

    def coefficients(self, transformed: Residues) -> Residues:
        """The inverse transform of polynomials [k, N]."""
        out = np.empty_like(transformed)
        for block, target in zip(_blocks(transformed), _blocks(out), strict=True):
            cipher = self._load(block, transformed=True)
            self._evaluator.transform_from_ntt_inplace(cipher)
            target[:] = self._save(cipher, len(block))
        return out

    def _load(self, block: Residues, transformed: bool) -> Ciphertext:
        inbox = self._inbox(len(block) + 1)
        inbox.set_form(transformed)
        inbox.words[:-1] = block
        inbox.words[-1] = 1  # SEAL refuses "transparent" ciphertexts, zero from the second on
        cipher = Ciphertext(self._context)
        cipher.load(self._context, inbox.path)
        return cipher

    def _inbox(self, rows: int) -> _Inbox:
        if rows not in self._inboxes:
            self._inboxes[rows] = _Inbox(rows, self._parms, self._version)
        return self._inboxes[rows]

    def _save(self, cipher: Ciphertext, rows: int) -> Residues:
        """Its first ``rows`` polynomials."""
        cipher.save(self._out.path)
        return self._content((rows + 1) * DEGREE).reshape(rows + 1, DEGREE)[:rows]

    def _content(self, count: int) -> Residues:
        """The last ``count`` words of what SEAL has just saved."""
        saved = self._out.get()
        magic, _, _, _, compression, _, size = _HEADER.unpack_from(saved)
        body: bytes = saved[_HEADER.size : size]
        # A single-segment zstd frame states its content's size after the descriptor (RFC 8878).
        flag, sized = body[4] >> 6, body[4] & 0x20
        width = (1, 2, 4, 8)[flag]
        length = int.from_bytes(body[5 : 5 + width], "little") + (256 if flag == 1 else 0)
        if magic != _MAGIC or compression != _ZSTD or not sized or length < 8 * count:
            raise CryptoError(
                "SEAL saved in another format than this module reads",
                hint="install the tenseal of constraints.txt",
            )
        inner: bytes = pyarrow.decompress(body, length, codec="zstd", asbytes=True)
        content = np.frombuffer(inner, dtype="<u8", offset=length - 8 * count)
        if int.from_bytes(inner[-8 * count - 8 : -8 * count], "little") != count:
            raise CryptoError("SEAL saved another number of words than expected")
        return content.astype(np.uint64)


def _blocks(polynomials: Residues) -> list[Residues]:
    return [polynomials[at : at + ROWS] for at in range(0, len(polynomials), ROWS)]
