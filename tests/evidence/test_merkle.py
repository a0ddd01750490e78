"""RFC 9162 trees: the RFC's own example, an independent implementation, and forged proofs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymerkle import InmemoryTree
from pymerkle import verify_consistency as their_consistency
from pymerkle import verify_inclusion as their_inclusion
from pymerkle.proof import MerkleProof

from securefedcollm.errors import EvidenceError
from securefedcollm.evidence.merkle import (
    Frontier,
    consistency_proof,
    inclusion_proof,
    verify_consistency,
    verify_inclusion,
)
from securefedcollm.primitives import merkle_root, sha256

LEAVES = [f"entry {i}".encode() for i in range(70)]


def test_the_proofs_of_rfc_9162_section_2_1_5():
    """The tree of seven leaves that the RFC draws, node by node."""
    d = LEAVES[:7]
    a, b, c, d3, e, f, j = (sha256(b"\0", leaf) for leaf in d)
    g, h, i = (sha256(b"\1", *pair) for pair in ((a, b), (c, d3), (e, f)))
    k, m = sha256(b"\1", g, h), sha256(b"\1", i, j)
    root = sha256(b"\1", k, m)
    assert merkle_root(d) == root
    assert inclusion_proof(d, 0) == [b, h, m]
    assert inclusion_proof(d, 3) == [c, g, m]
    assert inclusion_proof(d, 4) == [f, j, k]
    assert inclusion_proof(d, 6) == [i, k]
    assert consistency_proof(d, 3) == [c, d3, g, m]
    assert consistency_proof(d, 4) == [m]
    assert consistency_proof(d, 6) == [i, j, k]


def test_every_small_tree_proves_every_leaf_and_every_past_and_nothing_else():
    for size in range(1, 18):
        leaves, root = LEAVES[:size], merkle_root(LEAVES[:size])
        for index in range(size):
            proof = inclusion_proof(leaves, index)
            verify_inclusion(leaves[index], index, size, proof, root)
            for wrong in ((index + 1) % size if size > 1 else 1, index + size, -1):
                with pytest.raises(EvidenceError, match="is not in the log"):
                    verify_inclusion(leaves[index], wrong, size, proof, root)
            with pytest.raises(EvidenceError):
                verify_inclusion(b"another entry", index, size, proof, root)
            with pytest.raises(EvidenceError):
                verify_inclusion(leaves[index], index, size, [*proof, root], root)
        for old in range(size + 1):
            before = merkle_root(leaves[:old])
            proof = consistency_proof(leaves, old)
            verify_consistency(old, before, size, root, proof)
            if old:
                rewritten = merkle_root([b"rewritten", *leaves[1:old]])
                with pytest.raises(EvidenceError, match="does not extend"):
                    verify_consistency(old, rewritten, size, root, proof)
            with pytest.raises(EvidenceError):
                verify_consistency(old, before, size, root, [*proof, root])
            for cut in range(len(proof)):
                with pytest.raises(EvidenceError):
                    verify_consistency(old, before, size, root, proof[:cut] + proof[cut + 1 :])
            if old:
                with pytest.raises(EvidenceError):
                    verify_consistency(size + 1, before, size, root, proof)


@given(st.integers(1, 70), st.data())
def test_pymerkle_agrees(size, data):
    """An independent implementation makes the same roots at every size and the same inclusion
    proofs; our consistency proofs hold between its roots."""
    tree = InmemoryTree(algorithm="sha256")
    frontier = Frontier()
    for leaf in LEAVES[:size]:
        tree.append_entry(leaf)
        frontier.append(leaf)
    root = merkle_root(LEAVES[:size])
    assert tree.get_root() == root == frontier.root
    index = data.draw(st.integers(0, size - 1))
    old = data.draw(st.integers(1, size))
    theirs = tree.prove_inclusion(index + 1, size)
    their_inclusion(tree.get_leaf(index + 1), root, theirs)
    assert _siblings(theirs) == set(inclusion_proof(LEAVES[:size], index))
    theirs = tree.prove_consistency(old, size)
    their_consistency(tree.get_root(old), root, theirs)
    ours = consistency_proof(LEAVES[:size], old)
    verify_consistency(old, tree.get_root(old), size, tree.get_root(size), ours)


def _siblings(proof: MerkleProof) -> set[bytes]:
    return {bytes(node) for node in proof.path[1:]}


def test_what_is_not_there_is_not_proved():
    with pytest.raises(EvidenceError, match="has no entry 3"):
        inclusion_proof(LEAVES[:3], 3)
    with pytest.raises(EvidenceError, match="does not extend one of 4"):
        consistency_proof(LEAVES[:3], 4)
    assert Frontier().root == merkle_root([])
