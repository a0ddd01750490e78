"""Passages, blocks, digits, and the index's file, also where it is damaged or hostile."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from securefedcollm.errors import ConfigError, DataError, StateError
from securefedcollm.primitives import sha256
from securefedcollm.retrieval import Index, Passage, Reduction, split
from securefedcollm.retrieval import index as index_module
from securefedcollm.retrieval.passages import from_block, from_digits, to_block, to_digits
from securefedcollm.retrieval.reduction import normalised
from tests.support.shelves import SMALL, index_of, passage, unit

HEAD = 8 + 12 + 32
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    (tmp_path / "shelf.index").write_bytes(index_of(SMALL, 5).encode())
    return tmp_path / "shelf.index"


def test_an_index_comes_back_as_it_was(tmp_path):
    index = index_of(SMALL, 30)
    file = tmp_path / "shelf.index"
    file.write_bytes(index.encode())
    again = Index.load(str(file))
    assert (again.entries == index.entries).all()
    assert again.passages == tuple(passage(number) for number in range(30))
    assert again.fingerprint == index.fingerprint == file.read_bytes()[-32:]
    assert index_of(SMALL, 29).fingerprint != index.fingerprint


def test_every_flipped_byte_and_every_cut_is_noticed(saved):
    content = saved.read_bytes()
    for at in range(len(content)):
        saved.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(DataError):
            Index.load(saved)
    for at in (*range(0, len(content), 37), len(content) - 1):
        saved.write_bytes(content[:at])
        with pytest.raises(DataError):
            Index.load(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(DataError, match="cut or too long"):
        Index.load(saved)
    saved.write_bytes(content)
    Index.load(saved)


def resealed(saved: Path, at: int, new: bytes) -> None:
    """The file with other bytes, and with the digest of whoever changed them."""
    content = bytearray(saved.read_bytes()[:-32])
    content[at : at + len(new)] = new
    saved.write_bytes(bytes(content) + sha256(content))


def test_a_hostile_file_with_a_right_digest_is_refused(saved):
    original, blocks = saved.read_bytes(), HEAD + 5 * 8 * 2
    other = original[blocks + SMALL.block_bytes : blocks + 2 * SMALL.block_bytes]
    for at, new, message in (
        (HEAD, struct.pack("<8h", *[32767] * 8), "unit norm"),
        (HEAD, bytes(16), "unit norm"),
        (blocks, other, "passage 2 has an id that is there twice"),
        (blocks, bytes(SMALL.block_bytes), "passage 1 is damaged"),
        (blocks, b"\xff\xff", "passage 1 is damaged"),
        (blocks + 4, b"\xff", "passage 1 is damaged"),
        (blocks + SMALL.block_bytes - 1, b"!", "passage 1 is damaged"),
        (8, struct.pack("<I", 2**32 - 1), "out of range"),
        (12, struct.pack("<I", 0), "out of range"),
        (16, struct.pack("<I", 2**20), "out of range"),
        (0, b"PK\x03\x04", "not an index"),
    ):
        saved.write_bytes(original)
        resealed(saved, at, new)
        with pytest.raises(DataError, match=message):
            Index.load(saved)
    saved.write_bytes(original)
    resealed(saved, blocks + 4, b"q")  # another id: well-formed
    assert Index.load(saved).passages[0].id == "q0"


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(StateError):
        Index.load(tmp_path / "none")


def test_an_index_is_built_of_what_fits():
    two = [passage(0), passage(1)]
    for passages, vectors, message in (
        (two, unit(3, 8), "3 embeddings for 2 passages"),
        (two, np.zeros((2, 8)), "zero"),
        (two, np.full((2, 8), np.nan), "finite"),
        (two, np.ones(8), "matrix"),
        ([passage(0), passage(0)], unit(2, 8), "twice"),
        ([passage(0), Passage("", "x")], unit(2, 8), "1 to 128 bytes"),
        ([passage(0), Passage("i", "x" * 96)], unit(2, 8), "takes 101 bytes"),
        ([passage(0), Passage("i", "\ud800")], unit(2, 8), "Unicode"),
    ):
        with pytest.raises(ConfigError, match=message):
            Index.build(passages, vectors, block_bytes=96)


def test_vectors_of_any_size_are_normalised():
    found = normalised(np.array([[1e300, 1e300], [1e-300, 0.0]]))
    assert np.allclose(found, [[0.5**0.5, 0.5**0.5], [1, 0]])


def test_a_reduction_is_fixed_by_its_digest():
    rng = np.random.default_rng(0)
    mean, matrix = rng.normal(size=12), rng.normal(size=(12, 8))
    reduction = Reduction(mean, matrix)
    vectors = rng.normal(size=(5, 12)) * 10
    reduced = (normalised(vectors) - mean) @ matrix
    assert np.allclose(reduction.apply(vectors), normalised(reduced))
    assert Reduction(mean, matrix).digest == reduction.digest
    assert Reduction(mean, matrix + 1e-9).digest != reduction.digest
    with pytest.raises(DataError, match="8 numbers, not 12"):
        reduction.apply(np.ones((1, 8)))
    with pytest.raises(DataError):
        Reduction(mean[:8], matrix)
    with pytest.raises(DataError):
        Reduction(mean, matrix * np.inf)


@given(WORDS, st.sampled_from([48, 96, 768]))
@settings(max_examples=60, deadline=None)
def test_a_split_passage_fits_and_loses_only_white_space(text, block_bytes):
    parts = split(Passage("an-id", text), block_bytes)
    assert "".join("".join(part.text for part in parts).split()) == "".join(text.split())
    assert [part.id for part in parts] == [
        "an-id" if number == 1 else f"an-id#{number}" for number in range(1, len(parts) + 1)
    ]
    for part in parts:
        assert from_block(to_block(part, block_bytes)) == part


def test_parts_end_between_words_where_they_can():
    text = "one two three " * 10
    parts = split(Passage("i", text), 48)
    assert len(parts) > 3
    assert " ".join(part.text for part in parts) == text.strip()
    assert split(Passage("i", "ä" * 50), 48)[0].text == "ä" * 21  # 43 bytes are left
    assert split(Passage("i", "short"), 48) == [Passage("i", "short")]
    with pytest.raises(DataError, match="fills a block"):
        split(Passage("i" * 44, "text"), 48)
    with pytest.raises(DataError, match="Unicode"):
        split(Passage("i", "\ud800" * 60), 48)


@given(st.binary(min_size=96, max_size=96))
@settings(max_examples=60, deadline=None)
def test_blocks_are_their_digits(content):
    blocks = np.frombuffer(content * 2, dtype=np.uint8).reshape(2, 96)
    digits = to_digits(blocks)
    assert digits.shape == (2, SMALL.digits)
    assert -2048 <= digits.min() <= digits.max() < 2048
    assert (from_digits(digits.astype(np.int64)) == blocks).all()
    assert (from_digits(digits.astype(np.int64) + 4096) == blocks).all()


@given(st.binary(min_size=48, max_size=48))
@settings(max_examples=100, deadline=None)
def test_any_block_is_a_passage_or_refused(content):
    try:
        found = from_block(content)
    except ValueError:
        return
    if found is not None:
        assert to_block(found, 48) == content


def hole(file: Path, head: bytes, size: int) -> Path:
    """A file with these first bytes, and the rest not even on disk."""
    with file.open("wb") as out:
        out.write(head)
        out.truncate(size)
    return file


def greatest(tmp_path: Path) -> Path:
    """A file of some 21 GB that takes 4 kB."""
    numbers = 2**20, 4096, 12_288
    head = b"SFCINDX1" + struct.pack("<III", *numbers) + bytes(32)
    return hole(tmp_path / "hole", head, HEAD + 2**20 * (2 * 4096 + 12_288) + 32)


def test_a_hole_of_the_greatest_size_takes_no_memory(tmp_path):
    """A few bytes on disk state 21 GB."""
    file = greatest(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="hole: an embedding is not of unit norm"):
            Index.load(file)
        assert tracemalloc.get_traced_memory()[1] < 2**24
        with pytest.raises(ConfigError, match=r"hole: an index of 1048576 passages.*study's terms"):
            Index.load(file, SMALL)
    finally:
        tracemalloc.stop()


def test_an_index_is_compared_with_the_terms_before_it_is_read(saved):
    index = Index.load(saved, SMALL)
    assert len(Index.load(saved, replace(SMALL, documents=5))) == len(index) == 5
    for change, message in (
        ({"documents": 4}, "5 passages.*does not fit the study's terms"),
        ({"dimension": 9}, "dimension 8 .*does not fit the study's terms"),
        ({"block_bytes": 99}, "blocks of 96 bytes does not fit the study's terms"),
        ({"space": bytes([1] * 32)}, "another encoder or reduction"),
    ):
        with pytest.raises(ConfigError, match=f"shelf.index: .*{message}"):
            Index.load(saved, replace(SMALL, **change))
    os.truncate(saved, HEAD)  # nothing after the first bytes is needed for that
    with pytest.raises(ConfigError, match="does not fit the study's terms"):
        Index.load(saved, replace(SMALL, dimension=9))


def test_an_index_of_many_pieces_is_read_and_checked_whole(monkeypatch, tmp_path):
    file = tmp_path / "shelf.index"
    index = index_of(SMALL, 30)
    file.write_bytes(index.encode())
    monkeypatch.setattr(index_module, "PIECE_BYTES", 200)  # of 12 embeddings, of 2 blocks
    again = Index.load(file)
    assert (again.entries == index.entries).all()
    assert (again.blocks == index.blocks).all()
    content = file.read_bytes()
    second = HEAD + 29 * 16
    for at, new, message in (
        (second, bytes(16), "unit norm"),
        (HEAD + 30 * 16 + 29 * 96, content[HEAD + 30 * 16 :][:96], "passage 30 has an id"),
    ):
        file.write_bytes(content)
        resealed(file, at, new)
        with pytest.raises(DataError, match=message):
            Index.load(file)
    index.entries[29] = 0
    with pytest.raises(DataError, match="unit norm"):
        index.check("here")
