"""Files as people have them: sheets of every dialect, exports of data frames, chats, own names.

What `data check` finds and what tuning reads are one verdict, for every file here.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from securefedcollm.errors import DataError
from securefedcollm.tuning.cleaning import check_file
from securefedcollm.tuning.data import read_questions, write_questions
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.splits import record_content

WARDS = {"kind": "classification", "labels": ["calm", "urgent"]}
STARS = {"kind": "classification", "labels": ["1", "2", "3"]}
ASKED = {"kind": "instruction"}
OWNED = {**WARDS, "owner": "patient"}
Content = str | bytes | list[Any] | Callable[[Path], object]


def made(path: Path, content: Content) -> Path:
    if callable(content):
        content(path)
    elif isinstance(content, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **options: Any) -> list[Question]:
    """The questions of a file that `data check` finds nothing against."""
    assert not check_file(path, **options).stops_a_run
    return read_questions(path, **options)


def refused(path: Path, **options: Any) -> DataError:
    """Why tuning refuses a file; `data check` refuses it for the same reason."""
    with pytest.raises(DataError) as caught:
        read_questions(path, **options)
    error = caught.value
    assert str(error).count(path.name) == 1  # the place, once
    assert str(error).isprintable()
    assert error.hint
    said = str(error)
    try:
        found = check_file(path, **options)
    except DataError as whole:
        said = str(whole)
    else:
        assert found.stops_a_run
        assert (error.where, error.problem) in found.unusable
        assert error.hint in found.fixes
    assert said == str(error)
    return error


def frame(**columns: Any) -> Callable[[Path], object]:
    return lambda path: pd.DataFrame(columns).to_parquet(path)


def classes(names: list[str], labels: list[int], keep: int | None = None, **own: str) -> Any:
    """Write a data set of ``datasets`` with a ClassLabel, some rows filtered out."""
    texts = [f"note {i}" for i in range(len(labels))]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"text": texts, "label": labels}, features=features)
    rows = rows if keep is None else rows.filter(lambda row: row["label"] == keep)

    def write(path: Path) -> None:
        with path.open("wb") as file:  # the library takes a name with :: for an address
            rows.rename_columns(own).to_parquet(file)

    return write


SOUND: dict[str, tuple[str, Content, dict[str, Any], list[int]]] = {
    "an index without a name": (".csv", ",text,label\n0,a,urgent\n1,b,calm\n", WARDS, [1, 0]),
    "several of them": (".csv", ",text,label,,\n0,a,urgent,,\n", WARDS, [1]),
    "a space in the header": (".csv", "text, label\na,urgent\n", WARDS, [1]),
    "semicolons and line breaks": (
        ".csv",
        '\ufefftext;label\r\n"a; ""b"",\r\nc";urgent\r\nd;calm\r\n',
        WARDS,
        [1, 0],
    ),
    "a sheet that tells": (".csv", "sep=;\r\ntext;label\r\na;urgent\r\n", WARDS, [1]),
    "tabs": (".csv", "text\tlabel\na, b\turgent\n", WARDS, [1]),
    "bars": (".csv", "text|label\na, b|urgent\n", WARDS, [1]),
    "lines of an old Mac": (".csv", "text,label\ra,urgent\rb,calm\r", WARDS, [1, 0]),
    "a row cut short": (".csv", "text;label;by;at\na;urgent\nb;calm;c;d\n", WARDS, [1, 0]),
    "a cell of a megabyte": (".csv", f"text,label\n{'long ' * 200_000},urgent\n", WARDS, [1]),
    "a number with a gap": (".csv", 'question,choices,answer\na,"[""x"", ""y""]",1.0\n', {}, [1]),
    "numbers that are names, CSV": (".csv", "text,label\na,1\nb,2\nc,3.0\n", STARS, [0, 1, 2]),
    "numbers that are names, JSON": (
        ".jsonl",
        [{"text": "a", "label": 1}, {"text": "b", "label": "2"}, {"text": "c", "label": 3.0}],
        STARS,
        [0, 1, 2],
    ),
    "numbers that are names, Parquet": (".parquet", frame(text=["a"], label=[2]), STARS, [1]),
    "a byte order mark": (".jsonl", b'\xef\xbb\xbf{"text": "a", "label": "urgent"}\n', WARDS, [1]),
    "columns that tell nothing": (
        ".jsonl",
        [
            {"text": "a", "label": "calm", "type": "user", "message": {"a": 1}},
            {"text": "b", "label": "urgent", "type": 7, "message": "x"},
        ],
        WARDS,
        [0, 1],
    ),
    "categories": (
        ".parquet",
        frame(text=["a", "b"], label=pd.Categorical(["urgent", "calm"])),
        WARDS,
        [1, 0],
    ),
    "a filtered frame": (
        ".parquet",
        lambda path: (
            pd.DataFrame({"text": ["a", "b"], "label": ["calm", "urgent"]})
            .query("text == 'b'")
            .to_parquet(path)
        ),
        WARDS,
        [1],
    ),
    "classes in the file's own order": (
        ".parquet",
        classes(["urgent", "calm"], [0, 1, 0]),
        WARDS,
        [1, 0, 1],
    ),
    "filtered classes": (
        ".parquet",
        classes(["urgent", "calm"], [0, 1, 0], keep=1),
        WARDS,
        [0],
    ),
    "a text for distillation": (".jsonl", [{"text": "a", "answer": None}], {"kind": "text"}, [0]),
}


@pytest.mark.parametrize("case", SOUND)
def test_a_file_is_read_as_it_is_meant(tmp_path: Path, case: str) -> None:
    suffix, content, options, answers = SOUND[case]
    path = made(tmp_path / f"a::b # c{suffix}", content)
    assert [q.answer for q in read(path, **options)] == answers


REFUSED: dict[str, tuple[str, Content, dict[str, Any], str, str]] = {
    "a comma without quotes": (
        ".csv",
        "text,label\nDear colleague, all is well,calm\n",
        WARDS,
        ":2",
        "3 cells under a header of 2",
    ),
    "a semicolon without quotes": (
        ".csv",
        "text;label\na;calm\nwell; nearly;calm\n",
        WARDS,
        ":3",
        "3 cells under a header of 2",
    ),
    "a column twice": (
        ".csv",
        "text,label, text\na,calm,b\n",
        WARDS,
        ":1",
        "'text' is there twice",
    ),
    "an old Windows": (
        ".csv",
        "text,label\nplain,calm\nMüller,calm\n".encode("cp1252"),
        WARDS,
        ":3",
        "field 'text' is not UTF-8",
    ),
    "its header": (
        ".csv",
        "Größe,text,label\n1,a,calm\n".encode("cp1252"),
        WARDS,
        ":1",
        "the header is not UTF-8",
    ),
    "UTF-16 without a mark": (
        ".csv",
        "text,label\na,calm\n".encode("utf-16-le"),
        WARDS,
        ":1",
        "the header is not UTF-8",
    ),
    "a zero in a name": (".csv", "text,label,a\0b\na,calm,1\n", WARDS, ":1", "is not UTF-8 text"),
    "UTF-16": (".csv", "text\tlabel\na\tcalm\n".encode("utf-16"), WARDS, "", "is UTF-16 text"),
    "another separator": (".csv", "text^label\na^calm\n", WARDS, ":1", "no column 'text'"),
    "a JSON array": (
        ".jsonl",
        json.dumps([{"text": "a", "label": "calm"}] * 2, indent=1).encode(),
        WARDS,
        ":1",
        "this is a JSON array",
    ),
    "a JSON text": (".jsonl", b'{\n"text": "a",\n"label": "calm"\n}\n', WARDS, ":1", "many lines"),
    "half an emoji": (
        ".jsonl",
        b'{"text": "a", "label": "calm"}\n{"text": "b", "label": "calm", "by": "\\ud83d"}\n',
        WARDS,
        ":2",
        "field 'by' holds half a character",
    ),
    "a number that is no name": (
        ".jsonl",
        [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
        STARS,
        ":2",
        "none of the study's task.labels",
    ),
    "twenty digits": (
        ".jsonl",
        [{"text": "a", "label": "calm", "patient": 90000000000000000001}],
        OWNED,
        ":1",
        "field 'patient' is a number beyond 2^63",
    ),
    "digits that became a float": (
        ".parquet",
        frame(text=["a"], label=["calm"], patient=[9007199254740993.0]),
        OWNED,
        ", row 1",
        "field 'patient' is a number too large to be exact",
    ),
    "no rows": (
        ".parquet",
        frame(text=pd.Series([], dtype="str"), label=pd.Series([], dtype="str")),
        WARDS,
        "",
        "holds no records",
    ),
    "no rows in CSV": (".csv", "text,label\n", WARDS, "", "holds no records"),
    "no such column": (".parquet", frame(note=["a"]), WARDS, "", "no column 'text'"),
    "classes of another study": (
        ".parquet",
        classes(["mild", "severe"], [0]),
        WARDS,
        ", row 1",
        "none of the study's task.labels",
    ),
    "a long chat": (
        ".jsonl",
        [{"messages": [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]}],
        ASKED,
        ":1",
        "field 'messages' is not one question",
    ),
    "a turn without words": (
        ".jsonl",
        [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}],
        ASKED,
        ":1",
        "field 'messages' has a turn whose content is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_could_be_read_wrongly_is_refused(tmp_path: Path, case: str) -> None:
    suffix, content, options, place, says = REFUSED[case]
    path = made(tmp_path / f"rows{suffix}", content)
    error = refused(path, **options)
    assert str(error).startswith(f"{path}{place}: ")
    assert says in str(error)


def test_dates_are_the_texts_that_they_are(tmp_path: Path) -> None:
    days = [{"instruction": f"day {i}?", "response": f"2024-03-0{i}"} for i in range(1, 9)]
    path = made(tmp_path / "days.jsonl", days)
    assert [q.choices for q in read(path, **ASKED)] == [(row["response"],) for row in days]


def test_a_column_that_comes_late_is_read(tmp_path: Path) -> None:
    """Readers that guess types from the first megabytes refuse this file, and not a shorter one."""
    rows = [{"text": "filler " * 3000 + str(i), "label": "calm"} for i in range(600)]
    path = made(tmp_path / "rows.jsonl", [*rows, {**rows[0], "text": "x", "subject": "late"}])
    assert path.stat().st_size > 12 << 20
    assert [q.group for q in read(path, **WARDS)][-2:] == ["", "late"]


def test_ids_of_twenty_digits_stay_apart(tmp_path: Path) -> None:
    ids = [f"9000000000000000000{i}" for i in range(5)]
    rows = [{"text": f"{i}", "label": "calm", "patient": patient} for i, patient in enumerate(ids)]
    sheet = "text,label,patient\n" + "".join(f"{i},calm,{p}\n" for i, p in enumerate(ids))
    whole = frame(text=["a"], label=["calm"], patient=pd.Series([2**64 - 1], dtype="uint64"))
    for suffix, content in ((".jsonl", rows), (".csv", sheet)):
        read_ids = [q.subject for q in read(made(tmp_path / f"rows{suffix}", content), **OWNED)]
        assert read_ids == ids
    assert read(made(tmp_path / "rows.parquet", whole), **OWNED)[0].subject == str(2**64 - 1)


def test_a_missing_class_is_a_missing_label(tmp_path: Path) -> None:
    path = made(tmp_path / "rows.parquet", classes(["urgent"], [-1, 0]))
    assert [q.answer for q in read_questions(path, labelled=False, **WARDS)] == [None, 1]
    assert check_file(path, **WARDS).unlabelled == [f"{path}, row 1"]


@pytest.mark.parametrize("names", ["urgent", [1, 2], {"a": "b"}])
def test_class_names_that_are_none_are_refused(tmp_path: Path, names: Any) -> None:
    """Adversary: metadata whose names are read by nobody, so that numbers would count instead."""
    features = {"label": {"_type": "ClassLabel", "names": names}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": ["a"], "label": [0]}).replace_schema_metadata(about)
    path = made(tmp_path / "rows.parquet", lambda p: pq.write_table(table, p))
    assert "cannot be read as parquet" in str(refused(path, **WARDS))


# ---- chats and Alpaca ----

TURNS = [{"role": "user", "content": "do"}, {"role": "assistant", "content": "done"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_an_exchange_of_a_chat_is_an_instruction(tmp_path: Path, suffix: str) -> None:
    rows = [{"messages": TURNS}, {"messages": [{"role": "system", "content": "be kind"}, *TURNS]}]
    path = made(tmp_path / f"rows{suffix}", lambda p: _write(p, rows))
    assert [(q.prompt, q.choices) for q in read(path, **ASKED)] == [
        ("do", ("done",)),
        ("be kind\n\ndo", ("done",)),
    ]
    bare = made(tmp_path / "bare.jsonl", [{"messages": TURNS[:1]}])
    assert read_questions(bare, labelled=False, **ASKED)[0].answer is None
    with pytest.raises(DataError, match="'response' is missing"):
        read_questions(bare, **ASKED)


def test_turns_may_say_more_than_words(tmp_path: Path) -> None:
    rows = [{"messages": [{**turn, "name": "x", "weight": 1} for turn in TURNS]}]
    assert read(made(tmp_path / "rows.jsonl", rows), **ASKED)[0].prompt == "do"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_an_input_follows_its_instruction(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"instruction": "shorten", "input": text, "response": "ok"} for text in ("a b", "", None)
    ]
    path = made(tmp_path / f"rows{suffix}", lambda p: _write(p, rows))
    found = read(path, **ASKED)
    assert [q.prompt for q in found] == ["shorten\n\na b", "shorten", "shorten"]
    # Two people's inputs under one instruction are two records.
    assert record_content(found[0]) != record_content(found[1])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case _:
            path.write_text(_sheet(rows, ","))


def _sheet(rows: list[dict[str, Any]], delimiter: str) -> str:
    out = io.StringIO()
    sheet = csv.writer(out, delimiter=delimiter)
    sheet.writerow(rows[0])
    for row in rows:
        cells = (json.dumps(v) if isinstance(v, list) else v for v in row.values())
        sheet.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


# ---- own names of columns, own templates ----

COLUMNS = {"text": "note", "label": "department"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns_have_the_file_s_own_names(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"note": "a", "department": "urgent", "label": "x", "text": "y"},
        {"note": "b", "department": "calm", "label": "x", "text": "y"},
    ]
    path = made(tmp_path / f"rows{suffix}", lambda p: _write(p, rows))
    found = read(path, **WARDS, columns=COLUMNS)
    assert [(q.prompt, q.answer) for q in found] == [("Text: a\nLabel:", 1), ("Text: b\nLabel:", 0)]
    rows[1] |= {"department": "other"}
    _write(path, rows)
    assert "field 'department' is none of" in str(refused(path, **WARDS, columns=COLUMNS))
    del rows[1]["note"]
    made(tmp_path / "missing.jsonl", rows)
    error = refused(tmp_path / "missing.jsonl", **WARDS, columns=COLUMNS)
    assert "field 'note' is missing" in str(error)
    assert '"note": text' in error.hint


def test_a_named_column_comes_before_one_that_would_stand_in(tmp_path: Path) -> None:
    path = made(tmp_path / "rows.jsonl", [{"note": "a", "prompt": "p", "label": "calm"}])
    assert read(path, **WARDS, columns={"text": "note"})[0].prompt == "Text: a\nLabel:"
    rows = [{"talk": TURNS, "messages": "x"}]
    chat = made(tmp_path / "chat.csv", _sheet(rows, ";"))
    assert read(chat, **ASKED, columns={"messages": "talk"})[0].choices == ("done",)


def test_a_cell_without_a_name_stands_in_for_nothing(tmp_path: Path) -> None:
    path = made(tmp_path / "rows.csv", ",x,text\n1,a,b\n")
    assert read(path, kind="text")[0].choices == ("b",)
    assert "no column 'text'" in str(refused(made(path, ",x\n1,a\n"), kind="text"))


def test_a_renamed_label_keeps_the_classes_of_the_file(tmp_path: Path) -> None:
    own = {"text": "note", "label": "ward"}
    path = made(tmp_path / "rows.parquet", classes(["urgent", "calm"], [0, 1], **own))
    found = read(path, **WARDS, columns=own)
    assert [q.answer for q in found] == [1, 0]


def test_a_template_frames_the_text_and_nothing_else(tmp_path: Path) -> None:
    path = made(tmp_path / "rows.jsonl", [{"text": "a {} {0} b", "label": "calm"}])
    (found,) = read(path, **WARDS, template="{x} Note: {}\nWard:")
    assert found.prompt == "{x} Note: a {} {0} b\nWard:"
    path = made(tmp_path / "asked.jsonl", [{"question": "a?", "choices": ["x", "y"], "answer": 0}])
    assert read(path, template="Q {} A")[0].prompt == "Q a? A"


def test_what_is_dealt_out_is_read_back_under_own_names(tmp_path: Path) -> None:
    """Labels are written by name: as an index, 1 would be the label "1"."""
    path, options = tmp_path / "dealt.jsonl", {**STARS, "columns": COLUMNS, "template": "N {} L"}
    questions = [Question(f"N {i} L", ("1", "2", "3"), i, "day", f"p{i}") for i in range(3)]
    write_questions(path, questions, "patient", "classification", COLUMNS)
    assert read(path, **options, owner="patient") == questions


def test_a_record_is_the_same_record_under_every_name_and_dialect(tmp_path: Path) -> None:
    """Adversary: whoever would spend a record's budget twice, by another spelling of its file."""
    row = {"text": "It hurts; a lot,\nsince Monday", "label": "urgent"}
    own = {"note": row["text"], "department": "urgent"}
    other = {**own, "text": "what a study with these columns does not read"}
    ways: list[tuple[str, Content, dict[str, Any]]] = [
        ("plain.jsonl", [row], {}),
        ("bom.jsonl", b"\xef\xbb\xbf" + json.dumps(row).encode(), {}),
        ("plain.csv", _sheet([row], ","), {}),
        ("german.csv", "\ufeff" + _sheet([row], ";").replace("\n", "\r\n"), {}),
        ("told.csv", "sep=|\n" + _sheet([row], "|"), {}),
        ("spaced.csv", _sheet([{" text ": row["text"], " label": "urgent"}], "\t"), {}),
        ("index.csv", _sheet([{"": "7", **row}], ","), {}),
        ("classes.jsonl", [{**row, "label": 1}], {}),
        ("frame.parquet", frame(**{key: [value] for key, value in row.items()}), {}),
        ("template.jsonl", [row], {"template": "N: {} W:"}),
        ("own.jsonl", [own], {"columns": COLUMNS}),
        ("own.csv", _sheet([own], ";"), {"columns": COLUMNS}),
        (
            "own.parquet",
            frame(**{key: [value] for key, value in own.items()}),
            {"columns": COLUMNS},
        ),
        ("other.jsonl", [other], {"columns": COLUMNS}),
        (
            "swapped.jsonl",
            [{"label": row["text"], "text": "calm"}],
            {
                "columns": {"text": "label", "label": "text"},
            },
        ),
    ]
    contents = {}
    for name, content, options in ways:
        (found,) = read(made(tmp_path / name, content), **WARDS, **options)
        contents[name] = record_content(found)
    assert len(set(contents.values())) == 1, contents
    chat = made(tmp_path / "chat.jsonl", [{"messages": TURNS}])
    plain = made(tmp_path / "asked.jsonl", [{"instruction": "do", "response": "done"}])
    assert record_content(read(chat, **ASKED)[0]) == record_content(read(plain, **ASKED)[0])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_row_is_the_same_row_whatever_is_read_of_it(tmp_path: Path, suffix: str) -> None:
    """Adversary: a study's author who names other columns, for a budget that is not yet spent."""
    row = {"note": "It hurts", "summary": "pain", "tags": ["a", "b"], "ward": "urgent", "age": 7}
    edited = row | {"note": "It hurts a lot"}
    path = made(tmp_path / f"rows{suffix}", lambda p: _write(p, [row, edited]))
    note, summary = (
        read(path, **WARDS, columns={"text": name, "label": "ward"}) for name in ("note", "summary")
    )
    assert [q.row for q in note] == [q.row for q in summary]
    assert len({q.row for q in note}) == 2
    # The words alone, the control, are those of other records.
    assert {record_content(q) for q in note}.isdisjoint(record_content(q) for q in summary)
    jsonl = made(tmp_path / "same.jsonl", [row])
    assert read(jsonl, **WARDS, columns={"text": "note", "label": "ward"})[0].row == note[0].row
    (older,) = read(made(jsonl, [row | {"age": 8}]), kind="text", columns={"text": "note"})
    assert older.row == note[0].row


@pytest.mark.parametrize("by", [",", ";"])
def test_a_study_cannot_choose_what_separates_the_cells(tmp_path: Path, by: str) -> None:
    """Adversary: a study's author, for whom a line that is one cell is another record."""
    rows = [{"text": "fever; and, cough", "label": "calm"}]
    path = made(tmp_path / "rows.csv", _sheet(rows, by))
    assert read(path, **WARDS)[0].row == read(path, kind="text")[0].row
    for name in (f"text{by}label", f'text{by}"label"'):
        assert "no column" in str(refused(path, kind="text", columns={"text": name}))
    both = made(tmp_path / "both.csv", "text;more,label\na;b,calm\n")
    for columns in ({}, {"text": "text;more"}, {"text": "text;more,label"}):
        assert "can be separated by" in str(refused(both, kind="text", columns=columns))
    both.write_text("sep=,\n" + both.read_text())
    assert read(both, kind="text", columns={"text": "text;more"})[0].choices == ("a;b",)


_STRUCT = [{"a": "x", "n": 1}, {"a": "y", "n": 2}]
OTHERS = {
    "struct": pa.array(_STRUCT),
    "map": pa.array([[("k", "x")], [("k", "y")]], pa.map_(pa.string(), pa.string())),
    "turns": pa.array([[one] for one in _STRUCT]),
    "fixed": pa.array([["x"], ["y"]], pa.list_(pa.string(), 1)),
    "dictionary": pa.array(["x", "y"]).dictionary_encode(),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"x"', '"y"'])),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_no_type_of_a_column_hides_its_text(tmp_path: Path, kind: str) -> None:
    """Adversary: a study that names such a column, for a row that is known by more of its text."""
    table = pa.table({"note": ["a", "b"], "more": ["c", "d"], "extra": OTHERS[kind]})
    path = made(tmp_path / "rows.parquet", lambda p: pq.write_table(table, p))
    ways = [{"text": "note"}, {"text": "more"}]
    if kind in ("dictionary", "json"):  # a subject is a text
        ways.append({"text": "more", "subject": "extra"})
    found = [[q.row for q in read(path, kind="text", columns=way)] for way in ways]
    assert all(rows == found[0] for rows in found)
    columns = {"instruction": "note", "response": "more", "messages": "extra"}
    other = read_questions(path, kind="instruction", columns=columns) if kind == "turns" else []
    assert [q.row for q in other] in ([], found[0])
    bare = made(tmp_path / "bare.parquet", lambda p: pq.write_table(table.drop(["extra"]), p))
    assert [q.row for q in read(bare, kind="text", columns=ways[0])] != found[0]  # so it counts


def test_the_name_of_a_class_counts_whether_or_not_a_study_reads_it(tmp_path: Path) -> None:
    """Adversary: a study of another kind, which does not read the label."""
    label, text = {"label": [0, 1]}, {"note": ["a", "b"], "more": ["c", "d"]}
    kinds = {
        "note": Value("string"),
        "more": Value("string"),
        "label": ClassLabel(names=["calm", "urgent"]),
    }
    data = Dataset.from_dict({**text, **label}, features=Features(kinds))
    path = made(tmp_path / "rows.parquet", lambda p: data.to_parquet(p))
    (own, other) = (
        read(path, **WARDS, columns={"text": "note"}),
        read(path, kind="text", columns={"text": "more"}),
    )
    assert [q.row for q in own] == [q.row for q in other]
    lines = [{"note": "a", "more": "c", "label": "calm"}]
    plain = made(tmp_path / "rows.jsonl", lines)
    assert read(plain, **WARDS, columns={"text": "note"})[0].row == own[0].row


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_row_is_the_same_row_however_a_program_writes_what_is_no_text(
    tmp_path: Path, suffix: str
) -> None:
    row = {
        "note": "It hurts",
        "smoker": True,
        "rate": 1e-07,
        "none": None,
        "on": "2024-05-01 10:30:00",
        "said": {"a": "x", "b": ["y", "z"]},
    }
    path = tmp_path / f"rows{suffix}"
    frame_ = pd.DataFrame([row])
    if suffix == ".jsonl":
        made(path, [row])
    elif suffix == ".csv":
        frame_.to_csv(path, index=False)  # writes a mapping as Python prints it
    else:
        frame_["on"] = pd.to_datetime(frame_["on"])
        frame_.to_parquet(path)
    plain = made(tmp_path / "plain.jsonl", [{"note": "It hurts", "x": "x", "y": "y", "z": "z"}])
    own = {"columns": {"text": "note"}, "kind": "text"}
    assert read(path, **own)[0].row == read(plain, **own)[0].row


def test_rows_without_text_are_not_one_record(tmp_path: Path) -> None:
    found = read(made(tmp_path / "rows.jsonl", [{"text": "1"}, {"text": "2"}]), kind="text")
    assert [q.row for q in found] == [b"", b""]
    assert len({record_content(q) for q in found}) == 2


@pytest.mark.soak
def test_text_that_unfolds_to_too_much_is_refused_in_columns_that_no_task_reads(
    tmp_path: Path,
) -> None:
    """Adversary: whoever hides text there, so that a row were known by less of it; or makes a
    file of some kilobytes take hours."""
    long = pa.array(["x" * 1_000_000] * 2_000).dictionary_encode()
    small = pa.array([f"a{i}" for i in range(2_000)])
    table = pa.table({"text": small, "label": ["calm"] * 2_000, "more": long})
    path = made(tmp_path / "rows.parquet", lambda p: pq.write_table(table, p))
    assert "unfolds to more than" in str(refused(path, **WARDS))
    bare = made(tmp_path / "bare.parquet", lambda p: pq.write_table(table.drop(["more"]), p))
    assert len(read(bare, **WARDS)) == 2_000  # the control


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_cell_that_spells_a_huge_list_is_refused_by_line(tmp_path: Path, suffix: str) -> None:
    """Adversary: a file of kilobytes, whose list takes gigabytes once it is taken apart."""
    for count, fine in ((100_000, True), (400_000, False)):
        cell = "[" + "[]," * count + "[]]"
        path = made(
            tmp_path / f"rows{suffix}", lambda p, c=cell: _write(p, [{"text": "a", "x": c}])
        )
        if fine:
            assert read(path, kind="text")[0].choices == ("a",)
        else:
            assert "'x' holds a list of over 1 MiB" in str(refused(path, kind="text"))
