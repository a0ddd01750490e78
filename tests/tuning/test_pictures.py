"""Pictures are read in every form, within bounds; bad ones are named by their line."""

from __future__ import annotations

import datetime
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import DataError
from securefedcollm.tuning.attached import UnreadableError
from securefedcollm.tuning.data import read_questions, write_questions
from securefedcollm.tuning.pictures import _refuse as refuse
from securefedcollm.tuning.pictures import pack, pixel_digest, unfold
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.splits import record_content, record_id

LABELS = ["cat", "dog"]
LAYOUT: dict[str, Any] = {"kind": "image_classification", "labels": LABELS}


def drawn(seed: int, colours: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 5, colours), dtype=np.uint8)


def file_of(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(out, kind, **options)
    return out.getvalue()


def in_lines(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[Question]:
    return read_questions(path, **LAYOUT)


def test_every_form_of_a_file_gives_the_same_records(tmp_path: Path) -> None:
    pictures = [drawn(i) for i in range(3)]
    (tmp_path / "scans").mkdir()
    for i, pixels in enumerate(pictures):
        (tmp_path / "scans" / f"{i}.png").write_bytes(file_of(pixels))
    paths = [f"scans/{i}.png" for i in range(3)]
    labels = ["cat", "dog", "cat"]
    by_path = in_lines(
        tmp_path, *({"image": p, "label": n} for p, n in zip(paths, labels, strict=True))
    )
    found = {"paths": read(by_path)}
    table = tmp_path / "rows.csv"
    cells = [f"{p},{n}\n" for p, n in zip(paths, labels, strict=True)]
    table.write_text("".join(["image,label\n", *cells]))
    found["csv"] = read(table)
    arrays = [{"image": x.tolist(), "label": n} for x, n in zip(pictures, labels, strict=True)]
    found["arrays"] = read(in_lines(tmp_path, *arrays))
    content = [{"bytes": file_of(x), "path": None} for x in pictures]
    pq.write_table(pa.table({"image": content, "label": labels}), tmp_path / "rows.parquet")
    found["bytes"] = read(tmp_path / "rows.parquet")
    pointing = [{"bytes": None, "path": p} for p in paths]
    pq.write_table(pa.table({"image": pointing, "label": labels}), tmp_path / "rows.parquet")
    found["pointing"] = read(tmp_path / "rows.parquet")
    for form, questions in found.items():
        assert questions == found["paths"], form
        assert [q.content for q in questions] == [pixel_digest(x) for x in pictures], form
        for question, pixels in zip(questions, pictures, strict=True):
            assert np.array_equal(unfold(question.signal), pixels)
    assert [q.answer for q in found["paths"]] == [0, 1, 0]


def test_dealt_rows_are_read_back_as_they_were(tmp_path: Path) -> None:
    rows = [{"image": drawn(i, 1 + 2 * (i % 2)).tolist(), "label": "dog"} for i in range(3)]
    questions = read(in_lines(tmp_path, *rows))
    write_questions(tmp_path / "again.jsonl", questions, "patient", "image_classification")
    again = read(tmp_path / "again.jsonl")
    assert again == questions
    assert [record_content(q) for q in again] == [record_content(q) for q in questions]


def test_what_makes_a_picture_the_same_record(tmp_path: Path) -> None:
    """The budget is of what the picture shows: no name, lossless format or label renews it."""
    grey = drawn(1, 1)
    same = {
        "a.png": file_of(grey),
        "b.bmp": file_of(grey, "BMP"),
        "c.png": file_of(np.repeat(grey, 3, axis=2)),
        "d.webp": file_of(np.repeat(grey, 3, axis=2), "WEBP", lossless=True),
        "e.png": file_of(grey, pnginfo=None, compress_level=0),
    }
    other = {"f.png": file_of(grey[::-1]), "g.png": file_of(grey[:-1])}
    for name, content in (same | other).items():
        (tmp_path / name).write_bytes(content)
    rows = [{"image": name, "label": LABELS[i % 2]} for i, name in enumerate(same | other)]
    found = read(in_lines(tmp_path, *rows))
    assert len({record_content(q) for q in found[: len(same)]}) == 1
    assert len({record_content(q) for q in found}) == 3
    assert len({record_id(q) for q in found[:2]}) == 2  # of one file, labels count


def test_rows_with_the_same_label_are_different_records(tmp_path: Path) -> None:
    """The label may be all the text of a row: then its picture tells rows apart in a ledger."""
    arrays = read(
        in_lines(tmp_path, *({"image": drawn(i).tolist(), "label": "cat"} for i in (1, 2)))
    )
    content = [{"bytes": file_of(drawn(i)), "path": None} for i in (1, 2)]
    pq.write_table(pa.table({"image": content, "label": ["cat"] * 2}), tmp_path / "rows.parquet")
    for found in (arrays, read(tmp_path / "rows.parquet")):
        assert len({q.row for q in found}) == 2
        assert all(q.row for q in found)


REPORT = "The patient has a shadow on the left lung."


def as_text(path: Path) -> list[Question]:
    return read_questions(path, kind="classification", labels=LABELS)


@pytest.mark.parametrize("label", ["cat", 0])
def test_a_report_beside_a_picture_is_one_record_for_both_kinds_of_study(
    label: str | int, tmp_path: Path
) -> None:
    """Adversary: a study's author, to whom every kind would be a fresh budget."""
    content = {"bytes": file_of(drawn(1)), "path": "x.png"}
    pq.write_table(
        pa.table({"image": [content], "text": [REPORT], "label": [label]}), tmp_path / "r.parquet"
    )
    lines = in_lines(tmp_path, {"image": drawn(1).tolist(), "text": REPORT, "label": label})
    table = tmp_path / "rows.csv"
    table.write_text(f'image,text,label\n"{drawn(1).tolist()}",{REPORT},{label}\n')
    for path in (tmp_path / "r.parquet", lines, table):
        (picture,), (text,) = read(path), as_text(path)
        assert picture.row == text.row != b"", path.suffix
        assert record_content(picture) != record_content(text)  # so the row alone tells


@pytest.mark.parametrize("kind", ["bytes", "with a path", "without one", "arrays"])
def test_another_column_of_pictures_is_no_other_record(kind: str, tmp_path: Path) -> None:
    """Adversary: a study's author, to whom every column would be a fresh budget."""

    def column(seed: int) -> Any:
        match kind:
            case "bytes":
                return file_of(drawn(seed))
            case "arrays":
                return drawn(seed).tolist()
        return {
            "bytes": file_of(drawn(seed)),
            "path": f"{seed}.png" if kind == "with a path" else None,
        }

    path = tmp_path / "rows.parquet"

    def rows_with(*seeds: int) -> tuple[Question, Question]:
        held = {name: [column(seed)] for name, seed in zip("ab", seeds, strict=True)}
        pq.write_table(pa.table({**held, "label": ["cat"]}), path)
        a, b = (read_questions(path, **LAYOUT, columns={"image": name}) for name in "ab")
        return a[0], b[0]

    one, other = rows_with(1, 2)
    assert one.row == other.row != b""
    assert one.content != other.content
    assert rows_with(1, 3)[0].row != one.row  # the control: that row holds another file


def test_which_column_is_the_label_decides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    held = {"a": [file_of(drawn(1))], "b": [file_of(drawn(2))], "c": ["cat"], "d": [0]}
    pq.write_table(pa.table(held), path)
    (one,), (other,) = (
        read_questions(path, **LAYOUT, columns={"image": image, "label": label})
        for image, label in ("ac", "bd")
    )
    assert one.row == other.row != b""


def test_arrays_in_cells_are_those_of_json(tmp_path: Path) -> None:
    pictures = [drawn(i).tolist() for i in (1, 2)]
    table = tmp_path / "rows.csv"
    table.write_text("image,label\n" + "".join(f'"{x}",cat\n' for x in pictures))
    cells = read(table)
    lines = read(in_lines(tmp_path, *({"image": x, "label": "cat"} for x in pictures)))
    assert [q.row for q in cells] == [q.row for q in lines]
    assert len({q.row for q in cells}) == 2


def test_odd_columns_beside_a_picture_are_read_over(tmp_path: Path) -> None:
    """A nested column may hold what JSON cannot spell."""
    when = datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC)
    held = {
        "image": [file_of(drawn(1))],
        "times": [[[when], [when]]],
        "files": [[[b"a"], [b"b"]]],
        "pairs": [[[1.5, None], [None, 2.0]]],
        "label": ["cat"],
    }
    pq.write_table(pa.table(held), tmp_path / "rows.parquet")
    (question,) = read(tmp_path / "rows.parquet")
    assert question.row


def test_a_camera_that_was_held_sideways(tmp_path: Path) -> None:
    pixels, turned = drawn(3), Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    (tmp_path / "a.png").write_bytes(file_of(pixels, exif=turned))
    (question,) = read(in_lines(tmp_path, {"image": "a.png", "label": "cat"}))
    assert np.array_equal(unfold(question.signal), np.rot90(pixels, -1))


def png(width: int, height: int, depth: int, colours: int, lines: bytes) -> bytes:
    """A PNG with a header of one's own; ``colours``: 0 grey, 2 red, green and blue, 4 grey and
    transparent."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines))


def claiming(width: int, height: int) -> bytes:
    """A PNG of some bytes whose header claims that many pixels."""
    return png(width, height, 8, 0, b"\0" * 99)


def frames() -> bytes:
    out = io.BytesIO()
    images = [Image.fromarray(drawn(i)) for i in (1, 2)]
    images[0].save(out, "TIFF", save_all=True, append_images=images[1:])
    return out.getvalue()


def chain(count: int) -> bytes:
    """A TIFF of one pixel whose directories lead on and on."""
    entries = [(256, 3, 1), (257, 3, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1)]
    entries += [(273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, 1)]
    each = struct.pack("<H", len(entries))
    each += b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in entries)
    out = bytearray(b"II*\0" + struct.pack("<I", 8))
    for left in range(count, 0, -1):
        out += each + struct.pack("<I", len(out) + len(each) + 4 if left > 1 else 0)
    return bytes(out)


def test_colours_of_five_bits_are_read() -> None:
    """A BMP of 16 bits a pixel: less than 8 a colour."""
    head = struct.pack("<IIIHHIIIIII", 40, 2, 1, 1, 16, 0, 4, 0, 0, 0, 0)
    content = b"BM" + struct.pack("<IHHI", 58, 0, 0, 54) + head + struct.pack("<HH", 0x7C00, 0x001F)
    assert unfold(content).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_nothing_counts_the_frames_of_a_file() -> None:
    """Adversary: a chain of directories, which takes the square of its length to count."""
    seen: list[int] = []

    class Chain(Image.Image):
        size = (4, 4)

        @property
        def n_frames(self) -> int:
            raise AssertionError("somebody counts them")

        def seek(self, frame: int) -> None:
            seen.append(frame)

    with pytest.raises(UnreadableError, match="several frames"):
        refuse(Chain())
    assert seen == [1]
    with pytest.raises(UnreadableError, match="several frames"):
        unfold(chain(20_000))
    assert unfold(chain(1)).shape == (1, 1, 1)  # the control


def deep() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(out, "PNG")
    return out.getvalue()


FAULTY: dict[str, tuple[Any, str]] = {
    "not there": ("secret.png", "names a file that is not there"),
    "above": ("../secret.png", "leads out of the folder"),
    "absolute": ("/etc/passwd", "leads out of the folder"),
    "by a link": ("link.png", "leads out of the folder"),
    "a folder": (".", "not there"),
    "a circle": ("circle.png", "names a file that"),
    "below a circle": ("circle.png/x.png", "names a file that"),
    "text": (b"no picture", "cannot be decoded"),
    "of ours": (pack(drawn(1)), "is no image file"),
    "empty": (b"", "is no image file"),
    "cut off": (file_of(drawn(1), "JPEG")[:-40], "cannot be decoded"),
    "large": (claiming(9_000, 9_000), "has 81,000,000 pixels"),
    "a bomb": (claiming(60_000, 60_000), "cannot be decoded (DecompressionBomb"),
    "a strip": (file_of(np.zeros((1, 51, 3), dtype=np.uint8)), "over 50 times as long"),
    "a strip of numbers": ([[0]] * 51, "over 50 times as long"),
    "frames": (frames(), "has several frames"),
    "deep": (deep(), "has more than 8 bits"),
    "deep colours": (png(2, 1, 16, 2, b"\0" + bytes(range(12))), "has more than 8 bits"),
    "deep and transparent": (png(2, 1, 16, 4, b"\0" + bytes(range(8))), "has more than 8 bits"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
    "ragged": ([[1, 2], [3]], "no rectangle"),
    "texts": ([["x", 1]], "no rectangle of whole numbers"),
    "flat": ([1, 2], "no rectangle of whole numbers"),
    "four lists within each other": ([[[[1]]]], "no rectangle of whole numbers"),
    "beyond all integers": ([[2**70, 1]], "no rectangle of whole numbers"),
    "too bright": ([[1, 256]], "outside of 0 to 255"),
    "four colours": ([[[1, 2, 3, 4]]], "has 4 colours"),
    "a number": (7, "is a int, and no picture"),
    "missing": (None, "is missing"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_bad_picture_is_named_by_its_line_and_nothing_of_it_is_told(
    case: str, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(file_of(drawn(1)))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "good.png").write_bytes(file_of(drawn(2)))
    value, problem = FAULTY[case]
    if isinstance(value, bytes):
        (folder / "bad.png").write_bytes(value)
        value = "bad.png"
    good = {"image": "good.png", "label": "cat"}
    path = in_lines(folder, good, {"image": value, "label": "dog"})
    with pytest.raises(DataError, match="field 'image'") as refused:
        read(path)
    assert refused.value.where == f"{path}:2"
    assert problem in refused.value.problem
    assert "secret" not in str(refused.value)
    assert "passwd" not in str(refused.value)
    assert len(read(in_lines(folder, good))) == 1  # the control


def checked(path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    words = ["data", "check", str(path), "--task", "image_classification", "--json", *more]
    for label in LABELS:
        words += ["--label", label]
    result = CliRunner().invoke(app, words)
    return result.exit_code, json.loads(result.stdout)


def test_data_check_finds_what_a_poor_archive_holds(tmp_path: Path) -> None:
    flat = np.full((4, 4, 3), 200, dtype=np.uint8)
    files: dict[str, Callable[[], bytes]] = {
        "a.png": lambda: file_of(drawn(1)),
        "copy.bmp": lambda: file_of(drawn(1), "BMP"),
        "other.png": lambda: file_of(drawn(1)),
        "blank.png": lambda: file_of(flat),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content())
    rows = [
        {"image": "a.png", "label": "cat"},
        {"image": "copy.bmp", "label": "cat"},
        {"image": "other.png", "label": "dog"},
        {"image": "blank.png", "label": "dog"},
        {"image": "gone.png", "label": "dog"},
    ]
    code, found = checked(in_lines(tmp_path, *rows))
    at = [f"{tmp_path / 'rows.jsonl'}:{line}" for line in range(1, 6)]
    assert code == 1
    assert found["duplicates"] == [at[:2]]
    assert found["conflicts"] == [at[:3]]
    assert found["constant"] == [at[3]]
    assert found["unusable"] == [[at[4], "field 'image' names a file that is not there"]]
    code, found = checked(in_lines(tmp_path, rows[0]))  # the control
    assert code == 0
    assert not any(found[kind] for kind in ("duplicates", "conflicts", "constant", "unusable"))
