"""NumPy archives: their rows are those of JSON Lines, and bad archives are refused unread."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from securefedcollm.errors import DataError
from securefedcollm.tuning.data import read_questions
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.splits import record_content, record_id

LABELS = ["cat", "dog"]
NAMES = np.array(["cat", "dog", "cat"])


def drawn(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def archive(folder: Path, **columns: np.ndarray) -> Path:
    path = folder / "rows.npz"
    np.savez_compressed(path, **columns)
    return path


def read(path: Path, kind: str = "image_classification") -> list[Question]:
    return read_questions(path, kind=kind, labels=LABELS)  # type: ignore[arg-type]


def as_lines(folder: Path, **columns: np.ndarray) -> Path:
    rows: list[dict[str, Any]] = [
        {name: column[i].tolist() for name, column in columns.items()} for i in range(3)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 6, 5, 1), (3, 6, 5, 3)])
def test_pictures_are_the_same_records_as_in_lines(tmp_path: Path, shape: tuple[int, ...]) -> None:
    columns = {"image": drawn(*shape), "label": NAMES, "ward": np.array(["a", "b", "a"])}
    found, wanted = read(archive(tmp_path, **columns)), read(as_lines(tmp_path, **columns))
    assert found == wanted
    for identify in (record_content, record_id):
        assert [*map(identify, found)] == [*map(identify, wanted)]
    assert [q.row for q in found] == [q.row for q in wanted]
    assert [q.answer for q in found] == [0, 1, 0]


def test_recordings_and_texts_too(tmp_path: Path) -> None:
    heard = np.random.default_rng(2).integers(-999, 999, (3, 1700), dtype=np.int16)
    spoken = {"audio": np.asfortranarray(heard), "label": NAMES}
    assert read(archive(tmp_path, **spoken), "audio_classification") == read(
        as_lines(tmp_path, **spoken), "audio_classification"
    )
    said = {"text": np.array(["one", "two", "ü 3"]), "label": NAMES}
    assert read(archive(tmp_path, **said), "classification") == read(
        as_lines(tmp_path, **said), "classification"
    )


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    path = archive(tmp_path, image=drawn(3, 4, 4), label=np.array(["cat", "cow", "dog"]))
    with pytest.raises(DataError, match="row 2"):
        read(path)


def raw(folder: Path, *members: tuple[str, bytes]) -> Path:
    path = folder / "rows.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def member(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    npy.write_array(out, array)
    return out.getvalue()


def claiming(shape: tuple[int, ...]) -> bytes:
    """A header of an array of that shape, and few of its bytes."""
    out = io.BytesIO()
    npy.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue() + bytes(100)


BAD: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "a pickle": ([("image.npy", member(np.array([1, "x"], dtype=object)))], "neither"),
    "fractions": ([("image.npy", member(np.ones((3, 4, 4))))], "neither"),
    "no rows": ([("image.npy", member(np.array(1)))], "neither"),
    "texts in rows": ([("image.npy", member(np.array([["a"]])))], "neither"),
    "other lengths": (
        [("image.npy", member(drawn(3, 4, 4))), ("label.npy", member(NAMES[:2]))],
        "numbers of rows",
    ),
    "a false size": ([("image.npy", claiming((3, 1 << 20, 1 << 20)))], "another size"),
    "a bomb": ([("image.npy", bytes(200 << 20))], "unfolds"),
    "no array": ([("image.npy", b"hello")], "cannot be read"),
    "two of a name": ([("a.npy", member(NAMES)), ("a", member(NAMES))], "twice"),
    "nothing": ([], "numbers of rows"),
    "no image": ([("label.npy", member(NAMES))], "no column 'image'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_archive_of_rows_is_refused(tmp_path: Path, case: str) -> None:
    members, why = BAD[case]
    path = raw(tmp_path, *members)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=why):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", [1, 40, 200, -30])
def test_a_file_that_was_cut_is_refused(tmp_path: Path, end: int) -> None:
    path = archive(tmp_path, image=drawn(3, 9, 9), label=NAMES)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(DataError, match=r"cannot be read"):
        read(path)
