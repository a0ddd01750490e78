"""RFC 9162 (Certificate Transparency 2.0) Merkle trees: roots, inclusion and consistency proofs.

SHA-256; leaves are hashed under 0x00, nodes under 0x01. The tree hash itself is
:func:`securefedcollm.primitives.merkle_root`; this module has the proofs over it, and a tree that
grows.

Adversary: the keeper of a log. With an inclusion proof it cannot deny that an entry is under a head
that it signed; with a consistency proof it cannot replace or drop what was under an earlier head.
"""

from __future__ import annotations

from collections.abc import Sequence

from securefedcollm.errors import EvidenceError
from securefedcollm.primitives import equal, merkle_root, sha256


class Frontier:
    """The right edge of a growing tree: its root after n leaves, in O(log n) space."""

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[bytes] = []
        """Roots of the perfect subtrees, largest first: one for each set bit of ``size``."""

    def append(self, leaf: bytes) -> None:
        node = sha256(b"\0", leaf)
        size = self.size
        while size & 1:
            node = sha256(b"\1", self._peaks.pop(), node)
            size >>= 1
        self._peaks.append(node)
        self.size += 1

    @property
    def root(self) -> bytes:
        """32 bytes; of the empty tree, SHA-256 of nothing."""
        if not self._peaks:
            return sha256()
        node = self._peaks[-1]
        for peak in reversed(self._peaks[:-1]):
            node = sha256(b"\1", peak, node)
        return node


def inclusion_proofs(leaves: Sequence[bytes], indices: Sequence[int]) -> list[list[bytes]]:
    """PATH(index, leaves) for each index: sibling hashes from the leaf upwards (RFC 9162 §2.1.3.1).

    Raises:
        EvidenceError: there is no such leaf.
    """
    for index in indices:
        if not 0 <= index < len(leaves):
            raise EvidenceError(f"a log of {len(leaves)} entries has no entry {index}")
    proofs: list[list[bytes]] = [[] for _ in indices]
    level = [sha256(b"\0", leaf) for leaf in leaves] if indices else []
    depth = 0
    while len(level) > 1:
        for proof, index in zip(proofs, indices, strict=True):
            sibling = (index >> depth) ^ 1
            if sibling < len(level):  # else the last node goes up as it is
                proof.append(level[sibling])
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [sha256(b"\1", *pair) for pair in pairs] + level[len(level) & ~1 :]
        depth += 1
    return proofs


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """:func:`inclusion_proofs` of one leaf."""
    return inclusion_proofs(leaves, [index])[0]


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> None:
    """Check that ``leaf`` is entry ``index`` of the tree of ``size`` leaves (RFC 9162 §2.1.3.2).

    Raises:
        EvidenceError: it is not, or the proof is not one.
    """
    fn, sn = index, size - 1
    node = sha256(b"\0", leaf)
    sound = 0 <= index < size
    for sibling in proof:
        sound = sound and sn > 0
        if fn & 1 or fn == sn:
            node = sha256(b"\1", sibling, node)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            node = sha256(b"\1", node, sibling)
        fn, sn = fn >> 1, sn >> 1
    if not sound or sn != 0 or not equal(node, root):
        raise EvidenceError(
            f"entry {index} is not in the log of {size} entries that was signed",
            hint="keep both: the signed head contradicts the entry",
        )


def consistency_proof(leaves: Sequence[bytes], old: int) -> list[bytes]:
    """PROOF(old, leaves): that the tree extends its first ``old`` leaves (RFC 9162 §2.1.4.1).

    Empty if ``old`` is 0 or the whole tree.

    Raises:
        EvidenceError: the log was never that long.
    """
    if not 0 <= old <= len(leaves):
        raise EvidenceError(f"a log of {len(leaves)} entries does not extend one of {old}")
    return [] if old in {0, len(leaves)} else _subproof(leaves, old, whole=True)


def _subproof(leaves: Sequence[bytes], old: int, *, whole: bool) -> list[bytes]:
    if old == len(leaves):
        return [] if whole else [merkle_root(leaves)]
    k = _split(len(leaves))
    if old <= k:
        return [*_subproof(leaves[:k], old, whole=whole), merkle_root(leaves[k:])]
    return [*_subproof(leaves[k:], old - k, whole=False), merkle_root(leaves[:k])]


def verify_consistency(
    old: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]
) -> None:
    """Check that the tree (size, root) extends the tree (old, old_root) (RFC 9162 §2.1.4.2).

    Raises:
        EvidenceError: it does not: something that was under the old head is gone or changed.
    """
    if not _consistent(old, old_root, size, root, list(proof)):
        raise EvidenceError(
            f"the log of {size} entries does not extend the log of {old} that was signed before",
            hint="history was rewritten: keep both signed heads",
        )


def _consistent(old: int, old_root: bytes, size: int, root: bytes, path: list[bytes]) -> bool:
    if old == 0 or old == size:
        return not path and (old == 0 or equal(old_root, root)) and old <= size
    if not 0 < old < size or not path:
        return False
    if old & (old - 1) == 0:
        path = [old_root, *path]
    fn, sn = old - 1, size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    first = second = path[0]
    for node in path[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            first, second = sha256(b"\1", node, first), sha256(b"\1", node, second)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            second = sha256(b"\1", second, node)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and equal(first, old_root) and equal(second, root)


def _split(count: int) -> int:
    """The largest power of two below ``count``."""
    return 1 << ((count - 1).bit_length() - 1)
