"""Several studies in one file: what each changes, and what such a file may not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.study import dump_study, load_study
from securefedcollm.study.life import load_life

FIRST = dump_study(load_study("quickstart"))


def life(tmp_path: Path, *later: str) -> Path:
    path = tmp_path / "life.yaml"
    path.write_text("---\n".join([FIRST, *(f"{text}\n" for text in later)]))
    return path


def test_every_document_says_what_changes(tmp_path):
    path = life(tmp_path, "local: {steps: 7}", "study: last\nlocal: {learning_rate: 0.5}")
    trees = load_life(path, ["rounds=1"])
    assert [tree["study"] for tree in trees] == ["quickstart", "quickstart-2", "last"]
    assert [tree["local"]["steps"] for tree in trees] == [20, 7, 7]
    assert [tree["local"]["learning_rate"] for tree in trees] == [0.01, 0.01, 0.5]
    assert {tree["rounds"] for tree in trees} == {1}


def test_an_ordinary_study_is_a_life_of_one(tmp_path):
    (tree,) = load_life(life(tmp_path))
    assert tree == load_study("quickstart").tree


@pytest.mark.parametrize(
    ("later", "said"),
    [
        ("local: {stepz: 7}", "study 2: local.stepz: unknown key"),
        ("continue: {earlier: []}", "continue.earlier: what its studies start from"),
        ("study: quickstart", "two of its studies have one name"),
        ("distillation: {retain: 0.1}\nmodels: {llm: none}", "study 2"),
        ("just a text", "is no list of studies"),
        ("a: [", "holds several|cannot be read|line"),
    ],
)
def test_a_faulty_document_is_named(tmp_path, later, said):
    with pytest.raises(ConfigError, match=said) as caught:
        load_life(life(tmp_path, later))
    assert caught.value.hint


def test_the_first_study_has_nothing_to_keep_to(tmp_path):
    path = tmp_path / "life.yaml"
    path.write_text(FIRST.replace("loss: entropy", "retain: 0.5\n  loss: entropy") + "---\nseed: 1")
    with pytest.raises(ConfigError, match=r"study 1: distillation.retain: there is no earlier"):
        load_life(path)


def test_where_one_study_is_wanted_several_are_refused(tmp_path):
    """Adversary: whoever has somebody check and sign the first of several studies."""
    with pytest.raises(ConfigError, match="holds several studies"):
        load_study(life(tmp_path, "rounds: 9"))


@pytest.mark.parametrize("place", ["/somewhere", "../other", "a/../../b"])
def test_participants_look_below_their_own_directory_alone(place):
    """Adversary: the study's author. Alone, a simulation may look where it likes."""
    link = {"run": place, "study": "ab" * 32, "entries": 3, "root": "ab" * 32, "scale": 2.0}
    tree = load_study("quickstart").tree | {"continue": {"earlier": [link | {"slm": "ab" * 32}]}}
    load_study(tree)
    names = {"server": "server", **{f"silo-{i}": "silo" for i in range(1, 5)}}
    roster = [
        {"name": name, "role": role, "key": f"{number:064x}"}
        for number, (name, role) in enumerate(names.items())
    ]
    with pytest.raises(ConfigError, match=r"continue.earlier\[0\].run: leads out of"):
        load_study(tree | {"roster": roster})
