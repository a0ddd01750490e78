"""Microsoft SEAL behind TenSEAL's ``sealapi``: the only module that imports tenseal.

SEAL samples secrets (seeded by the system) and does every product and transform. Polynomials go in
and out as arrays, through anonymous memory and SEAL's own file format, which this module alone
writes and reads; no byte of a peer ever reaches SEAL's loader (:mod:`~.ckks_ring` reads those).

A ciphertext (x, y) that was never encrypted decrypts to x + y·s: that makes key parts, ciphertexts
and partial decryptions alike. SEAL refuses a ciphertext whose second polynomial is zero as
"transparent"; such a place is filled, or does not occur but with negligible probability.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Final

import numpy as np
import pyarrow
import tenseal.sealapi as seal
from tenseal.sealapi import SecretKey as SecretKey

from securefedcollm.aggregation.ckks_ring import Residues
from securefedcollm.errors import CryptoError
from securefedcollm.study.ring import DEGREE, CkksRing

_HEADER: Final = struct.Struct("<HBBBBHQ")  # magic, header size, version ×2, compression, 0, size
_CIPHER: Final = struct.Struct("<BQQQdQ")  # NTT form, polynomials, N, primes, scale, correction
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
        os.close(self._fd)


class _Inbox:
    """An anonymous file with one ciphertext of two polynomials in SEAL's format, for SEAL to load.

    ``words`` are its residues, [2, N], in place.
    """

    def __init__(self, parms: bytes, version: tuple[int, int]) -> None:
        def head(size: int) -> bytes:
            return _HEADER.pack(_MAGIC, _HEADER.size, *version, 0, 0, _HEADER.size + size)

        count = 2 * DEGREE
        array = head(8 + 8 * count) + count.to_bytes(8, "little")
        inner = parms + _CIPHER.pack(True, 2, DEGREE, 1, 1.0, 1) + array
        content = head(len(inner) + 8 * count) + inner
        self._fd = os.memfd_create("securefedcollm-ckks", os.MFD_CLOEXEC)
        self.path = f"/proc/self/fd/{self._fd}"
        os.ftruncate(self._fd, len(content) + 8 * count)
        self._memory = mmap.mmap(self._fd, len(content) + 8 * count)
        self._memory[: len(content)] = content
        self._form = _HEADER.size + len(parms)
        self.words: Residues = np.frombuffer(
            self._memory, dtype="<u8", offset=len(content)
        ).reshape(2, DEGREE)

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
        seal.Ciphertext(self._context).save(self._out.path)
        parms = struct.pack("<4Q", *self._context.first_parms_id())
        self._in = _Inbox(parms, _HEADER.unpack_from(self._out.get())[2:4])
        self._filling = np.full(DEGREE, 1, dtype=np.uint64)

    def __enter__(self) -> Seal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the anonymous memory back."""
        self._in.close()
        self._out.close()

    def secret(self) -> SecretKey:
        """A fresh ternary secret key."""
        return seal.KeyGenerator(self._context).secret_key()

    def product(self, secret: SecretKey, polynomial: Residues, noise: Residues) -> Residues:
        """polynomial·secret + noise, both given as coefficients [N]; the result is transformed.

        The one thing that all of the scheme is made of: SEAL's decryption of (noise, polynomial).
        """
        cipher = self._load(noise, polynomial, transformed=False)
        self._evaluator.transform_to_ntt_inplace(cipher)
        plain = seal.Plaintext()
        seal.Decryptor(self._context, secret).decrypt(cipher, plain)
        plain.save(self._out.path)
        return self._content(DEGREE)

    def coefficients(self, transformed: Residues) -> Residues:
        """The inverse transform of polynomials [k, N]."""
        out = np.empty_like(transformed)
        for row in range(0, len(transformed), 2):
            pair = transformed[row : row + 2]
            second = pair[1] if len(pair) == 2 and pair[1].any() else self._filling
            cipher = self._load(pair[0], second)
            self._evaluator.transform_from_ntt_inplace(cipher)
            cipher.save(self._out.path)
            found = self._content(2 * DEGREE).reshape(2, DEGREE)
            out[row] = found[0]
            if len(pair) == 2:
                out[row + 1] = found[1] if pair[1].any() else 0
        return out

    def _load(self, first: Residues, second: Residues, transformed: bool = True) -> seal.Ciphertext:
        self._in.set_form(transformed)
        self._in.words[0], self._in.words[1] = first, second
        cipher = seal.Ciphertext(self._context)
        cipher.load(self._context, self._in.path)
        return cipher

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
