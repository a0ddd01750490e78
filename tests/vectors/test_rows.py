"""Rows of pictures are known as the code before recordings knew them: no upgrade renews a budget.

The digests are of that code (:data:`KNOWN`). Each row is read by both of its columns of pictures.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from securefedcollm.tuning.data import read_questions

LONG = 2048


def drawn(seed: int) -> np.ndarray:
    return np.arange(seed, seed + 30, dtype=np.uint8).reshape(6, 5)


def bitmap(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(drawn(seed)).save(out, "BMP")
    return out.getvalue()


def files(**more: Any) -> dict[str, Any]:
    return {"image": bitmap(1), "image2": bitmap(2), **more}


def arrays(**more: Any) -> dict[str, Any]:
    return {"image": drawn(1).tolist(), "image2": drawn(2).tolist(), **more}


def paths(first: str, second: str, **more: Any) -> dict[str, Any]:
    return {"image": first, "image2": second, **more}


FLOATS = [i / 8 for i in range(LONG)]
WHOLE = [i % 19 - 9 for i in range(LONG)]
ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    "files": lambda: files(label="a"),
    "name of a recording": lambda: files(label="a", sound="rec0.wav"),
    "recording with its name": lambda: files(
        label="a", sound={"bytes": b"RIFF", "path": "rec0.flac"}
    ),
    "embedding": lambda: files(label="a", emb=FLOATS),
    "curve": lambda: files(label="a", ecg=WHOLE),
    "number as label": lambda: files(label=0, ecg=WHOLE),
    "arrays and a curve": lambda: arrays(label="a", ecg=WHOLE),
    "curve in a mapping": lambda: files(label="a", ecg={"lead": WHOLE}),
    "paths and a curve": lambda: paths("1.png", "2.png", label="a", ecg=WHOLE),
    "paths, a curve, 0": lambda: paths("1.png", "2.png", label=0, ecg=WHOLE),
    "a rare name, a curve, 0": lambda: paths("1.jfif", "1.jfif", label=0, ecg=WHOLE),
}
KNOWN: dict[str, str] = {
    "files": "9082542fffc5cf4ca4c8a887fa23c03175688dd280d5bcb87037df9282a3ceb3",
    "name of a recording": "6a109360583742cc10373b22a9e6fda470a4004974bc5ea827f22928349433a2",
    "recording with its name": "f145267a02cfd49af4cb398ddb2ec4e68a80d447917905069d2baeadb87b0809",
    "embedding": "9082542fffc5cf4ca4c8a887fa23c03175688dd280d5bcb87037df9282a3ceb3",
    "curve": "9082542fffc5cf4ca4c8a887fa23c03175688dd280d5bcb87037df9282a3ceb3",
    "number as label": "dd882cf90b2b6d02c2345acfc36c7264f359266e57ed32eb63a9fa5f8dc6427c",
    "arrays and a curve": "9459c40b230b1f55fa6eeaf91d5b0f25ac81520acddabc240be9512b13dcbb9d",
    "curve in a mapping": "9082542fffc5cf4ca4c8a887fa23c03175688dd280d5bcb87037df9282a3ceb3",
    "paths and a curve": "a5ea1567d7f7249409a6512cde4b38d004644a90015b1a03f84a8c5f9111a397",
    "paths, a curve, 0": "790e49488a7958f78d1b4634080a1eead42521d6c73adc07172ae6015b937bf7",
    "a rare name, a curve, 0": "6f5b7134d98585a8d54cf71a61625815019891298d898f8c62ca9e083341186f",
}


@pytest.mark.parametrize("column", ["image", "image2"])
@pytest.mark.parametrize("case", ROWS)
def test_rows_of_pictures_are_known_as_before(case: str, column: str, tmp_path: Path) -> None:
    for i, name in enumerate(("1.png", "2.png", "1.jfif")):
        (tmp_path / name).write_bytes(bitmap(i + 1))
    pq.write_table(pa.Table.from_pylist([ROWS[case]()]), tmp_path / "rows.parquet")
    columns = {} if column == "image" else {"image": column}
    (question,) = read_questions(
        tmp_path / "rows.parquet",
        kind="image_classification",
        labels=["a", "b"],
        columns=columns,
    )
    assert question.row.hex() == KNOWN[case]
