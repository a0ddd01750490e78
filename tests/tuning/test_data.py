"""Reading question files: what is accepted, and what each broken file is told."""

from __future__ import annotations

import csv
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securefedcollm.errors import DataError
from securefedcollm.tuning.data import read_questions

ROWS: list[dict[str, Any]] = [
    {
        "question": "Which gas do plants take in?",
        "choices": ["carbon dioxide", "neon"],
        "answer": 0,
    },
    {"question": "NA", "choices": ["null", "1", "naïve"], "answer": 2, "subject": "p, 7"},
    {"question": "Two\nlines?", "choices": ["yes", 'a "quoted" one'], "answer": 1, "subject": "x"},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """``rows`` in the format of the suffix, by another road than the reader's."""
    if path.suffix == ".jsonl":
        return jsonl(path, rows)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = sorted({name for row in rows for name in row})
        columns = {name: [row.get(name) for row in rows] for name in names}
        pq.write_table(pa.table(columns), path)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(["subject", "question", "answer", "choices"])
        for row in rows:
            answer = row["answer"]
            cells = [row.get("subject", ""), row["question"], "" if answer is None else answer]
            sheet.writerow([*cells, json.dumps(row["choices"])])
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_questions(tmp_path: Path, suffix: str) -> None:
    questions = read_questions(write(tmp_path / f"odd [1] * name{suffix}", ROWS))
    assert [q.prompt for q in questions] == [f"Question: {r['question']}\nAnswer:" for r in ROWS]
    assert [q.choices for q in questions] == [tuple(r["choices"]) for r in ROWS]
    assert [q.answer for q in questions] == [0, 2, 1]
    assert [q.group for q in questions] == ["", "p, 7", "x"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_public_file_may_leave_answers_out(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"public{suffix}", [*ROWS, {**ROWS[0], "answer": None}])
    assert [q.answer for q in read_questions(path, labelled=False)] == [0, 2, 1, None]
    with pytest.raises(DataError, match="'answer' is missing"):
        read_questions(path)


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"question": "a", "choices": ["x", ', "broken JSON"),
        ("not json", "broken JSON"),
        ('"just a text"', "'question' is missing"),
        ('{"choices": ["x", "y"], "answer": 0}', "'question' is missing"),
        ('{"question": "  ", "choices": ["x", "y"], "answer": 0}', "'question' is empty"),
        ('{"question": ["a"], "choices": ["x", "y"], "answer": 0}', "'question' is a list"),
        ('{"question": "a", "answer": 0}', "'choices' is missing"),
        ('{"question": "a", "choices": "x", "answer": 0}', "'choices'"),
        ('{"question": "a", "choices": ["x"], "answer": 0}', "'choices' has 1 entries"),
        ('{"question": "a", "choices": ["x", ""], "answer": 0}', "'choices' entry 1 is empty"),
        ('{"question": "a", "choices": ["x", null], "answer": 0}', "'choices' entry 1"),
        ('{"question": "a", "choices": ["x", "y"]}', "'answer' is missing"),
        ('{"question": "a", "choices": ["x", "y"], "answer": null}', "'answer' is missing"),
        ('{"question": "a", "choices": ["x", "y"], "answer": NaN}', "'answer' is missing"),
        ('{"question": "a", "choices": ["x", "y"], "answer": "B"}', "'answer' is a str"),
        ('{"question": "a", "choices": ["x", "y"], "answer": 0.5}', "'answer' is a float"),
        (
            '{"question": "a", "choices": ["x", "y"], "answer": 2}',
            "'answer' is none of the 2 choices",
        ),
        (
            '{"question": "a", "choices": ["x", "y"], "answer": -1}',
            "'answer' is none of the 2 choices",
        ),
    ],
)
def test_a_bad_jsonl_row_is_named_by_line_and_field(tmp_path: Path, bad: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{GOOD}\n{bad}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert f"{path}:4: " in str(caught.value)
    assert says in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('a,"[""x"", ""y""]",two', "'answer' is a str"),
        ('a,"[""x"", ""y""]",', "'answer' is missing"),
        ("a,x|y,0", "'choices' is not a JSON list"),
        ('a,"[""x"", ""y""]",0,more', "4 cells under a header of 3"),
        ('a,"[""x"", ""y""]"', "'answer' is missing"),
    ],
)
def test_a_bad_csv_row_is_named_by_line_and_field(tmp_path: Path, bad: str, says: str) -> None:
    path = tmp_path / "rows.csv"
    good = '"two\nlines","[""x"", ""y""]",1'
    path.write_text(f"question,choices,answer\n{good}\n{bad}\n{good}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert f"{path}:4: " in str(caught.value)
    assert says in str(caught.value)


def test_a_bad_parquet_row_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [ROWS[0], {**ROWS[0], "answer": 9}])
    with pytest.raises(DataError, match=r"rows\.parquet, row 2: field 'answer' is none of the 2"):
        read_questions(path)


def test_files_that_are_no_question_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "text.parquet").write_text("this is not Parquet")
    (tmp_path / "head.csv").write_text("question,answer\na,0\n")
    (tmp_path / "only-head.csv").write_text("question,choices,answer\n")
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + b'\n{"question": "na\xefve"}\n')
    (tmp_path / "rows.txt").write_text(GOOD)
    for name, says in {
        "empty.jsonl": "is empty",
        "blank.jsonl": "",
        "folder.jsonl": "cannot be opened",
        "text.parquet": "cannot be read as parquet",
        "head.csv": "no column 'choices'",
        "only-head.csv": "holds no records",
        "latin.jsonl": "latin.jsonl:2: field 'question' is not UTF-8",
        "rows.txt": "unknown suffix '.txt'",
        "absent.jsonl": "no such file",
    }.items():
        with pytest.raises(DataError) as caught:
            read_questions(tmp_path / name)
        assert name in str(caught.value)
        assert says in str(caught.value)
        assert caught.value.hint


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_whose_record_it_is_comes_from_the_column_that_the_study_names(
    tmp_path: Path, suffix: str
) -> None:
    rows = [{**ROWS[0], "patient": owner, "subject": "x"} for owner in ("7", " 7 ", "eight")]
    read = read_questions(write(tmp_path / f"rows{suffix}", rows), owner="patient")
    assert [(q.subject, q.group) for q in read] == [("7", "x"), ("7", "x"), ("eight", "x")]
    numbers = [{**row, "patient": number} for row, number in zip(rows, (7, 7, 8), strict=True)]
    read = read_questions(write(tmp_path / f"numbers{suffix}", numbers), owner="patient")
    assert [q.subject for q in read] == ["7", "7", "8"]
    read = read_questions(write(tmp_path / f"rows{suffix}", rows), owner="subject")
    assert [(q.subject, q.group) for q in read] == [("x", "")] * 3  # whose it is, and no topic


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_record_without_its_subject_is_refused_by_line(tmp_path: Path, suffix: str) -> None:
    """Adversary: none, but a record that is nobody's would be protected as nobody's."""
    path = write(tmp_path / f"rows{suffix}", [{**ROWS[0], "subject": "a"}, ROWS[0]])
    place = "rows.parquet, row 2" if suffix == ".parquet" else f"rows{suffix}:[23]"
    with pytest.raises(DataError, match=f"{place}: field 'subject' is missing") as caught:
        read_questions(path, owner="subject")
    assert "privacy.subject" in caught.value.hint
    with pytest.raises(DataError, match="field 'doctor' is missing"):
        read_questions(path, owner="doctor")


def test_no_value_of_a_record_reaches_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "Jane Doe has anaemia"
    for bad in (
        {"question": secret, "choices": [secret, ""], "answer": 0},
        {"question": secret, "choices": [secret, "y"], "answer": secret},
        {"question": {"text": secret}, "choices": [secret, "y"], "answer": 0},
    ):
        path = jsonl(tmp_path / "rows.jsonl", [ROWS[0], bad])
        with caplog.at_level(logging.DEBUG), pytest.raises(DataError) as caught:
            read_questions(path)
        assert secret not in str(caught.value) + caught.value.hint
    assert secret not in caplog.text
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_reading_calls_nobody_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adversary: whoever reads the hub's access log, or the silo's home directory later."""

    def refuse(*_: object) -> None:
        raise AssertionError("a question file is read without the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    home = tmp_path / "home"
    home.mkdir()
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    monkeypatch.setattr("tempfile.tempdir", str(home))
    for suffix in (".jsonl", ".csv", ".parquet"):
        assert len(read_questions(write(tmp_path / f"rows{suffix}", ROWS))) == len(ROWS)
    assert list(home.iterdir()) == []


TEXT = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)


@settings(max_examples=25)
@given(
    rows=st.lists(
        st.tuples(TEXT, st.lists(TEXT, min_size=2, max_size=5), st.integers(0, 1)),
        min_size=1,
        max_size=6,
    ),
    suffix=st.sampled_from([".jsonl", ".csv", ".parquet"]),
)
def test_any_text_survives_every_format(
    rows: list[tuple[str, list[str], int]],
    suffix: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("any") / f"rows{suffix}"
    write(path, [{"question": q, "choices": c, "answer": a} for q, c, a in rows])
    read = read_questions(path)
    assert [(q.prompt[10:-8], list(q.choices), q.answer) for q in read] == rows
