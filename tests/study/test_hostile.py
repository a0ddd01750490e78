"""Study files that are made to crash, hang, fill the memory or deceive: each ends in one line.

Adversary: a study's author.
"""

from __future__ import annotations

import resource
from pathlib import Path

import msgspec
import pytest
import yaml

from securefedcollm.errors import ConfigError
from securefedcollm.study import digest, load_study, study_from_tree

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TREE = msgspec.to_builtins(load_study(QUICKSTART))
KEY = "ab" * 32


def refused(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_study(path, overrides)
    assert str(caught.value).isprintable()
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("privacy.epsilon=.inf", "privacy.epsilon: inf is too large"),
        ("privacy.epsilon=.nan", "privacy.epsilon: nan is not a number"),
        ("local.learning_rate=-.inf", "local.learning_rate: -inf"),
        ("local.learning_rate=1e300", "local.learning_rate: 1e+300 is too large"),
        ("local.steps=9007199254740993", "local.steps: the number is beyond 2^53"),
        ("local.steps=9007199254740991", "local.steps: 9007199254740991 is too large"),
        ("local.steps=" + "9" * 5000, "local.steps: expected `int`, got `str`"),
        ("local.steps=0x" + "f" * 300, "local.steps: the number is beyond"),
        ("local.steps=!!int " + "9" * 5000, "--set local.steps: a value that long is a text"),
        ("local.steps=" + ":1" * 100_000, "local.steps: expected `int`, got `str`"),
        ("local.steps=!!int 1" + ":1" * 100_000, "--set local.steps: a value that long"),
        ("local.steps=" + "9" * 500_000 + "x", "local.steps: expected `int`, got `str`"),
        ("aggregation.value_bits=1000000000", "aggregation.value_bits: sums and squares"),
        ("silos.colluders=1000000000000", "silos.colluders: 1000000000000 is too large"),
        ("adapter.rank=1000000000000", "adapter.rank: 1000000000000 is too large"),
        ("task={[a, b]: 1}", "--set task: a key is a list or mapping (line 1)"),
        ("task={1: 2}", "task: the key 1 is a int"),
        ('study="\\ud800"', "study: the text has half a character"),
        (
            'models.slm.source="path:\\e[2J"',
            "models.slm.source: the text has the character U+001B",
        ),
        (
            'models.slm.source="path:\\u202e"',
            "models.slm.source: the text has the character U+202E",
        ),
        ('study="a\\n"', "study: expected `str` matching regex"),
        (f'models.slm.sha256="{KEY}\\n"', "models.slm.sha256: expected `str` matching regex"),
        ("study=2024-01-01", "study: a date is no value of a study"),
        ("study=2024-13-99", "--set study: a value cannot be read (ValueError"),
        ("study=!!binary aGk=", "study: a bytes is no value"),
        ("study=!!timestamp x", "--set study: a value cannot be read"),
        ("study=!!bool x", "--set study: a value cannot be read"),
        ("task=" + "[" * 40 + "]" * 40, "--set task: nested too deeply"),
        ("task=" + "[" * 20 + "]" * 20, "task"),
        ("task=" + "{a: " * 5000, "--set task: nested too deeply"),
        ("task=[" + "1, " * 100_000 + "]", "--set task: of too many values"),
        ("task=&a [*a]", "--set task: its aliases unfold to too much"),
    ],
    ids=lambda text: text[:24],
)
def test_a_hostile_value_ends_in_one_line(override, says):
    assert str(refused(QUICKSTART, override)).startswith(says)


def laughs(leaf: str, unfold: str) -> str:
    """Ten levels of aliases, ten of the one before in each: 10^10 values in 400 bytes."""
    lines = [f"a0: &a0 {leaf}"]
    lines += [f"a{i}: &a{i} {unfold % ', '.join([f'*a{i - 1}'] * 10)}" for i in range(1, 11)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (laughs("[x]", "[%s]"), "its aliases unfold to too much"),
        (laughs("{x: 1}", "{<<: [%s]}"), "its aliases unfold to too much"),
        ("[" * (1 << 20), "nested too deeply"),
        ("a: " + "[" * 1000, "nested too deeply"),
        ("- " * 1000, "nested too deeply"),
        ("".join(f"k{i}: {i}\n" for i in range(100_000)), "of too many values"),
        ("? [a, b]\n: 1\n", "a key is a list or mapping (line 1)"),
        ("x" * (5 << 20), "over 4 MiB"),
        ("study: \0", "not valid YAML"),
    ],
    ids=["laughs", "merged laughs", "brackets", "brackets in a key", "dashes", "keys", "list key",
         "huge", "NUL"],
)  # fmt: skip
def test_a_hostile_file_ends_in_one_line(tmp_path, content, says):
    path = tmp_path / "study.yaml"
    path.write_text(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert says in str(refused(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_file_without_end_is_not_read_to_it():
    assert "over 4 MiB" in str(refused(Path("/dev/zero")))


def test_aliases_and_merges_of_an_honest_size_stay(tmp_path):
    shared = "{steps: 10, batch_size: 16}"
    tree = {**TREE, "local": {"steps": 10, "batch_size": 16, "learning_rate": 0.01}}
    path = tmp_path / "study.yaml"
    rest = yaml.safe_dump({k: v for k, v in tree.items() if k != "local"})
    path.write_text(rest + f"local: {{<<: {shared}, learning_rate: &r 0.01}}\n")
    assert digest(load_study(path)) == digest(study_from_tree(tree))


@pytest.mark.parametrize(
    "tree", [[], "x", None, 3, {"study": float("inf")}, {"a": {"b": object()}}]
)
def test_what_is_no_mapping_or_no_plain_value_is_no_study(tree):
    """Adversary: the maker of a bundle, whose study is JSON."""
    with pytest.raises(ConfigError):
        study_from_tree(tree)


def roster_of(keys):
    roles = ["server", *["silo"] * (len(keys) - 1)]
    names = "abcdefghij"
    listed = zip(names, roles, keys, strict=False)
    return [{"name": n, "role": r, "key": k} for n, r, k in listed]


def test_one_key_under_two_spellings_is_not_two_participants():
    """Adversary: one party that outvotes the threshold. hex's reader skips a line break."""
    keys = [f"{i:064x}" for i in range(1, 6)]
    study_from_tree({**TREE, "roster": roster_of(keys)})
    for respelled in (keys[1], keys[1] + "\n", keys[1].upper().replace("1", "1"), f" {keys[1]}"):
        with pytest.raises(ConfigError, match="roster"):
            study_from_tree({**TREE, "roster": roster_of([*keys[:-1], respelled])})


def test_a_roster_of_thousands_is_refused_before_it_is_compared():
    many = [{"name": f"s{i}", "role": "silo", "key": f"{i:064x}"} for i in range(100_000)]
    with pytest.raises(ConfigError, match="100000 participants"):
        study_from_tree({**TREE, "roster": many})
