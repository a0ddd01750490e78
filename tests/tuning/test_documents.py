"""Documents as passages with ids that are citations."""

from __future__ import annotations

import pytest

from securefedcollm.errors import DataError
from securefedcollm.tuning.documents import read_documents
from securefedcollm.tuning.world import CONDITIONS, World


def test_paragraphs_are_named_by_their_first_line(tmp_path):
    (tmp_path / "plain.txt").write_text("\none\ntwo\n \n\nthree  \r\nfour")
    (tmp_path / "guide.md").write_text("# Hygiene\n\n## Hands\n\nWash them.\n\n# Last\n")
    found = read_documents([tmp_path / "plain.txt", tmp_path / "guide.md"])
    assert found == [
        ("plain.txt:2", "one\ntwo"),
        ("plain.txt:6", "three\nfour"),
        ("guide.md:1", "# Hygiene\n## Hands\nWash them."),
        ("guide.md:7", "# Last"),
    ]


def test_rows_are_named_by_their_line_and_no_directory(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": " two "}\n')
    (tmp_path / "table.csv").write_text('note,other\nthree,x\n"four\nfive",y\n')
    assert read_documents([tmp_path / "rows.jsonl"]) == [
        ("rows.jsonl:1", "one"),
        ("rows.jsonl:2", "two"),
    ]
    assert read_documents([tmp_path / "table.csv"], {"text": "note"}) == [
        ("table.csv:2", "three"),
        ("table.csv:3", "four\nfive"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("empty.txt", b"\n \n", "holds no text"),
        ("latin.md", b"\xff\xfe\xfd", "cannot be read as text"),
        ("page.pdf", b"%PDF", "unknown suffix '.pdf'"),
        ("bad.jsonl", b'{"text": "one"}\n{"text": 7}\n', r"bad\.jsonl:2: field 'text'"),
        ("other.csv", b"word\none\n", r"other\.csv"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what) as refused:
        read_documents([tmp_path / name])
    assert name in str(refused.value)


def test_two_files_of_one_name_are_refused(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "guide.md").write_text("text")
    with pytest.raises(DataError, match="nobody could tell"):
        read_documents([tmp_path / "a" / "guide.md", tmp_path / "b" / "guide.md"])


def test_every_house_rule_is_on_one_shelf_and_true():
    world = World(seed=5, silos=3)
    rules = [rule for silo in range(3) for rule in world.house_rules(silo)]
    assert len({name for name, _ in rules}) == len(rules) == 64
    asked = [q for q in world.tests() if q.group == "private"]
    for question in asked[:50]:
        words = question.prompt.split()
        (condition,) = set(words) & set(CONDITIONS)
        severity, topic = words[words.index(condition) - 1], " ".join(words[-2:])
        assert question.answer is not None
        answers = {
            text.split()[-2]
            for name, text in rules
            if condition in text.split()
            and topic in text
            and ("ward" not in name or severity in text.split())
        }
        assert answers == {question.choices[question.answer]}
