"""Data files that are made to crash, fill the memory, be read as two things, or be quoted.

Adversary: whoever made the file, and whoever reads the log of an error about it.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from securefedcollm.errors import DataError
from securefedcollm.tuning import rows
from securefedcollm.tuning.data import inspect_rows, read_questions
from securefedcollm.tuning.parquet_footer import read_footer
from securefedcollm.tuning.splits import dataset_fingerprint

GOOD = {"question": "a", "choices": ["x", "y"], "answer": 0}
LINE = json.dumps(GOOD)
SECRET = "482-44-1093"


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_questions(path, **options)
    assert str(caught.value).isprintable()
    assert caught.value.hint
    assert caught.value.__cause__ is None  # whose message could quote a value
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"question": ' + "[" * 10**6, "nested more than 64 deep"),
        ('{"a": ' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
        ('{"question": "a", "choices": ["x", "y"], "answer": 0, "answer": 1}', "is given twice"),
        (LINE.replace("0", "9" * 5000), "Exceeds the limit"),
        (LINE.replace("0", "1e999"), "'answer' is a float"),
        (LINE.replace('"a"', '"\\ud800"'), "half a character"),
        (LINE.replace('"x"', '"\\uDC00"'), "half a character"),
        ("[" * 10**6, "nested more than"),
        ('"' + '\\"' * 10**6, "broken JSON"),
        ("\x00", "broken JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_a_hostile_json_row_is_named_by_line(tmp_path: Path, row: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINE}\n{row}\n{LINE}\n", encoding="utf-8")
    text = refused(path)
    assert text.startswith(f"{path}:2: ")
    assert says in text
    places = list(inspect_rows(path, kind="multiple_choice"))  # `data check` goes on
    assert [isinstance(row, DataError) for _, row in places] == [False, True, False]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (f'a,"{"[" * 100_000}",0', "'choices' is not a JSON list"),
        ('a,"[""\\ud800"", ""y""]",0', "'choices' is not a JSON list"),
        (f'a,"[""x"", ""y""]",{"9" * 5000}', "'answer' is none of the 2 choices"),
        ('a\udcff,"[""x"", ""y""]",0', "is not UTF-8"),
        ('a,"[""x"", ""y""]",0,1,2', "5 cells under a header of 3"),
    ],
    ids=lambda text: text[:20],
)
def test_a_hostile_csv_row_is_named_by_line(tmp_path: Path, row: str, says: str) -> None:
    good = 'a,"[""x"", ""y""]",1'
    path = tmp_path / "rows.csv"
    text = f"question,choices,answer\n{good}\n{row}\n{good}\n"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    text = refused(path)
    assert text.startswith(f"{path}:3: ")
    assert says in text


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """Today the last one counts, whatever the first one says."""
    path = tmp_path / "rows.csv"
    path.write_text('question,choices,answer,answer\na,"[""x"", ""y""]",0,1\n')
    assert "rows.csv:1: the column 'answer' is there twice" in refused(path)
    path = tmp_path / "rows.parquet"
    column = pa.array([0])
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array([["x", "y"]]), column, column],
        names=["question", "choices", "answer", "answer"],
    )
    pq.write_table(table, path)
    assert "the column 'answer' is there twice" in refused(path)


def test_lines_and_cells_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_LINE", 1 << 16)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINE}\n{' ' * (1 << 17)}\n")
    assert "rows.jsonl:2: the line is over" in refused(path)
    path = tmp_path / "rows.csv"
    head = "question,choices,answer\n"
    path.write_text(head + "a" * (1 << 17))
    assert "rows.csv:2: the line is over" in refused(path)
    path.write_text(head + '"' + "a\n" * (1 << 16))  # a quote that never ends
    assert "is not CSV (field larger than field limit" in refused(path)
    long = "a" * ((1 << 16) - 100)
    path.write_text(f'{head}{long},"[""x"", ""y""]",0\n')
    assert read_questions(path)[0].prompt == f"Question: {long}\nAnswer:"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    "bad",
    [
        {"answer": 4824410},
        {"answer": -4824410},
        {"choices": ["482-44-1093", ""]},
        {"question": ""},
        {"patient": ""},
    ],
    ids=str,
)
def test_no_value_of_a_row_is_quoted(tmp_path: Path, suffix: str, bad: dict[str, Any]) -> None:
    row = {**GOOD, "question": SECRET, "choices": [SECRET, "y"], "patient": SECRET} | bad
    path = tmp_path / f"rows{suffix}"
    match suffix:
        case ".jsonl":
            path.write_text(json.dumps(row))
        case ".csv":
            cells = [
                json.dumps(v).replace('"', '""') if k == "choices" else v for k, v in row.items()
            ]
            path.write_text(",".join(row) + "\n" + ",".join(f'"{cell}"' for cell in cells))
        case _:
            pq.write_table(pa.Table.from_pylist([row]), path)
    text = refused(path, owner="patient")
    assert "4824410" not in text
    assert SECRET not in text


# ---- Parquet that unfolds ----


def zipped(path: Path) -> None:
    """Compression: half a gigabyte of one letter, a megabyte a row."""
    letters = pa.RecordBatch.from_pylist([{**GOOD, "question": "x" * (1 << 20)}] * 64)
    with pq.ParquetWriter(path, letters.schema, compression="zstd", use_dictionary=False) as file:
        for _ in range(8):
            file.write_batch(letters)


def pointed(path: Path) -> None:
    """A dictionary: one text of 8 MB, to which a hundred thousand rows refer."""
    first = pa.array([0] * 10**5, pa.int32())
    text = pa.DictionaryArray.from_arrays(first, ["x" * (8 << 20)])
    choices = pa.DictionaryArray.from_arrays(first, ['["x", "y"]'])
    table = pa.table({"question": text, "choices": choices, "answer": first})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30)


def long_list(path: Path) -> None:
    """One row of fifty million choices, all alike."""
    values = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), 5 * 10**7), ["a"])
    lists = pa.ListArray.from_arrays([0, 5 * 10**7], values)
    table = pa.table({"question": ["q"], "choices": lists, "answer": [0]})
    pq.write_table(table, path, compression="zstd")


BOMBS = (zipped, pointed, long_list)
_READ = """
import resource, sys, time
from pathlib import Path
from securefedcollm.errors import DataError
from securefedcollm.tuning.data import read_questions
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        print("read", len(read_questions(path)))
    except DataError as error:
        print(error.message)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.soak
def test_a_parquet_bomb_is_not_unfolded(tmp_path: Path) -> None:
    paths = []
    for make in BOMBS:
        paths.append(tmp_path / f"{make.__name__}.parquet")
        make(paths[-1])
        assert paths[-1].stat().st_size < 300_000
    done = subprocess.run(
        [sys.executable, "-c", _READ, *map(str, paths)], capture_output=True, text=True, check=True
    )
    said = done.stdout.splitlines()
    for message, grown in zip(said[::2], said[1::2], strict=True):
        assert "unfolds to more than 100 times its size" in message
        assert int(grown) < 400_000  # kB


def test_the_footer_is_read_as_arrow_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = [{**GOOD, "question": f"{i}", "note": {"a": [i, None]}, "x": 1.5} for i in range(999)]
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=100, compression="zstd")
    about = pq.ParquetFile(path).metadata
    told = [
        (c.path_in_schema.split(".")[0], c.total_uncompressed_size, c.num_values)
        for group in map(about.row_group, range(about.num_row_groups))
        for c in map(group.column, range(about.num_columns))
    ]
    with path.open("rb") as file:
        footer = read_footer(file)
    assert footer.rows == 999
    assert [tuple(chunk) for chunk in footer.chunks] == told


@settings(max_examples=200)
@given(
    footer=st.binary(max_size=64) | st.sampled_from([b"\x19\xfc" + b"\xff" * 9, b"\x1c" * 10**4])
)
def test_a_malformed_footer_is_a_value_error(footer: bytes) -> None:
    tail = len(footer).to_bytes(4, "little") + b"PAR1"
    with contextlib.suppress(ValueError):
        assert read_footer(io.BytesIO(b"PAR1" + footer + tail)).chunks == []


@pytest.mark.soak
def test_an_honest_parquet_file_is_read_whatever_its_shape(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = [{**GOOD, "question": f"{i}", "note": {"a": [i]}, "subject": None} for i in range(5000)]
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=700, compression="zstd")
    read = read_questions(path)
    assert [q.prompt for q in read] == [f"Question: {i}\nAnswer:" for i in range(5000)]
    alike = pa.Table.from_pylist([GOOD] * 200_000)  # one text, many rows: 2 kB
    pq.write_table(alike, path)
    assert len(read_questions(path)) == 200_000


# ---- the guard, and then Arrow and `datasets` ----


def test_a_column_is_what_its_rows_say_and_no_date(tmp_path: Path) -> None:
    """Rows of several types in one file, dates as texts, words in columns of other tasks."""
    rows_ = [
        GOOD,
        {**GOOD, "question": "2009-04-01", "subject": "2009-01-01"},
        {**GOOD, "answer": "1", "subject": 7, "note": {"a": [1]}},
        {**GOOD, "answer": 1.0, "subject": "7b", "note": "x"},
        {**GOOD, "answer": None, "subject": None, "text": "more words"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    read = read_questions(path, labelled=False)
    assert [q.answer for q in read] == [0, 0, 1, 1, None]
    assert [q.group for q in read] == ["", "2009-01-01", "7", "7b", ""]
    assert read[1].prompt == "Question: 2009-04-01\nAnswer:"


def test_a_record_is_the_same_record_in_every_format(tmp_path: Path) -> None:
    """Adversary: whoever would spend a budget twice, by a copy of the file in another format."""
    row = {**GOOD, "text": "words of another task", "instruction": "do", "subject": "s"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (first,) = read_questions(path)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    head, cells = ",".join(row), ["a", '["x", "y"]', "0", row["text"], "do", "s"]
    line = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
    (tmp_path / "rows.csv").write_text(f"{head}\n{line}")
    for suffix in (".parquet", ".csv"):
        assert read_questions(tmp_path / f"rows{suffix}") == [first]
    path.write_text(LINE)
    assert read_questions(path)[0].content != first.content


def test_no_spelling_of_a_topic_makes_another_data_set(tmp_path: Path) -> None:
    """``7`` beside ``7.5`` was read as ``7.0`` once: the fingerprint of a ledger is blind to it."""
    prints = set()
    for i, topics in enumerate(([7, 7.5], [7.0, 7.5], ["7.0", "x"])):
        path = tmp_path / f"{i}.jsonl"
        rows_ = [{**GOOD, "question": f"{k}", "subject": t} for k, t in enumerate(topics)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_))
        prints.add(dataset_fingerprint(read_questions(path)))
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("9" * 25, "field 'subject' is a number beyond 2^63"),
        ("1e999", "two readers read differently"),
    ],
)
def test_what_two_readers_do_not_read_alike_is_refused(tmp_path: Path, bad: str, says: str) -> None:
    """Two patients whose numbers differ beyond 2^63 were one patient to Arrow."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{LINE}\n{LINE[:-1]}, "subject": {bad}}}\n{LINE}\n')
    text = refused(path)
    assert text.startswith(f"{path}:2: ")
    assert says in text
    found = list(inspect_rows(path, kind="multiple_choice"))
    assert [isinstance(row, DataError) for _, row in found] == [False, True, False]


def test_a_table_for_every_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    names = ["prompt", "text", "instruction", "response", "subject", "patient"]
    kinds = ["a", 1, 1.5, None]
    shapes = [{n: kinds[i >> 2 * k & 3] for k, n in enumerate(names)} for i in range(1024)]
    path.write_text("".join(json.dumps({**GOOD, **shape}) + "\n" for shape in shapes))
    assert "more than 256 shapes" in refused(path)


def test_metadata_of_a_parquet_file_opens_no_file(tmp_path: Path) -> None:
    """Adversary: metadata that declares the choices to be images, which lie where the file says."""
    path = tmp_path / "rows.parquet"
    features = {"question": {"_type": "Image"}, "answer": {"dtype": "int64", "_type": "Value"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    image = [{"bytes": None, "path": "/etc/hostname"}]
    table = pa.table({"question": image, "choices": [["x", "y"]], "answer": [0]})
    pq.write_table(table.replace_schema_metadata(about), path)
    assert "'question' is a dict, not a text" in refused(path)


def test_a_file_that_is_an_archive_too_is_not_unpacked(tmp_path: Path) -> None:
    """Adversary: a sheet whose first cell begins like an archive, for readers that look for one."""
    path = tmp_path / "rows.csv"
    path.write_text('BZh91AY&SY,question,choices,answer\nz,a,"[""x"", ""y""]",0\n')
    assert read_questions(path)[0].prompt == "Question: a\nAnswer:"


def test_every_row_passes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` gives is what is trained on: a row that it changes is noticed."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINE}\n")
    read = Dataset.to_list
    monkeypatch.setattr(
        Dataset, "to_list", lambda self: [{**row, "answer": 1} for row in read(self)]
    )
    assert "two readers read differently" in refused(path)
