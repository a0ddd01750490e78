"""``study new`` writes studies that ``study check`` accepts; ``study keys`` says what keys mean."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import msgspec
import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm.study import load_study, study_from_tree
from securefedcollm.study.config import Study
from securefedcollm.study.keys import study_keys

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789" * 4
KINDS = ("multiple_choice", "classification", "instruction", "text")


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, SecureFedCoLLMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("task", "llm", "scheme", "unit"),
    list(
        itertools.product(
            KINDS,
            (None, f"hub:org/big@{COMMIT}"),
            ("masking", "ckks", "ckks-authority"),
            ("record", "record joint", "subject", "subject joint", "silo"),
        )
    ),
)
def test_every_combination_loads_and_says_what_was_asked(tmp_path, task, llm, scheme, unit):
    out, (kind, *joint) = tmp_path / "My Study.yaml", unit.split()
    words = ["--model", "path:small", "--task", task, "--unit", kind, "--scheme", scheme]
    words += ["--llm", llm] if llm else []
    words += ["--label", "yes", "--label", "no"] if task == "classification" else []
    words += ["--subject", "patient"] if kind == "subject" else []
    words += ["--joint"] if joint else []
    tree = json.loads(call("study", "new", out, *words, "--json"))
    study = load_study(out)
    assert study == msgspec.convert(tree, Study)
    assert (study.study, study.task.kind, study.scheme) == ("my-study", task, scheme)
    assert study.models.slm.source == "path:small"
    assert (study.models.llm and study.models.llm.revision) == (COMMIT if llm else None)
    assert study.privacy is not None
    assert (study.privacy.unit, study.joint) == (kind, bool(joint))


@pytest.mark.parametrize("more", [[], ["--joint"], ["--unit", "silo"], ["--scheme", "ckks"]])
def test_study_check_plans_its_noise(tmp_path, more):
    out = tmp_path / "quick.yaml"
    call("study", "new", out, "--model", "builtin:hospital-slm", *more)
    facts = json.loads(call("study", "check", out, "--json"))
    assert facts["noise_multiplier"] > 0.1


@pytest.mark.parametrize("more", [[], ["--joint"], ["--unit", "silo"]])
def test_more_than_128_silos_mask_on_a_graph(tmp_path, more):
    for silos in (128, 129):
        words = ["--model", "builtin:hospital-slm", "--silos", silos, *more]
        call("study", "new", tmp_path / f"{silos}.yaml", *words)
        study = load_study(tmp_path / f"{silos}.yaml")
        assert (study.aggregation.graph is not None) == (silos > 128)
    with pytest.raises(ConfigError, match="graph"):
        call("study", "new", tmp_path / "ckks.yaml", *words, "--scheme", "ckks")


def test_the_phase_at_the_server_is_sized_to_the_models(tmp_path):
    """The defaults are for models of a few hundred thousand weights."""
    pairs = {"own": ("path:s", "path:l"), "built-in": ("builtin:hospital-slm",) * 2}
    made = {
        name: json.loads(
            call("study", "new", tmp_path / f"{name}.yaml", "--model", slm, "--llm", llm, "--json")
        )
        for name, (slm, llm) in pairs.items()
    }
    own, tiny = (load_study(tmp_path / f"{name}.yaml").distillation for name in pairs)
    assert own.batch_unlabelled < tiny.batch_unlabelled
    assert own.learning_rate_llm < tiny.learning_rate_llm
    assert set(made["built-in"]["distillation"]) == {"loss", "over", "steps"}


def test_a_key_that_is_commented_out_shows_its_default(tmp_path):
    """Without their comment signs it is still the same study."""
    out, changed = tmp_path / "a.yaml", 0
    tree = json.loads(
        call("study", "new", out, "--model", "path:small", "--llm", "path:large", "--json")
    )
    study, text = load_study(out), out.read_text()
    for key in study_keys():
        *sections, name = key.path.split(".")
        node = tree
        for section in sections:
            node = node.get(section, {})
        if key.default is None or key.section is not None or not (node or not sections):
            continue
        line = re.compile(rf"^({'  ' * len(sections)})# ({name}: \S.*)$", re.M)
        if name in node or len(line.findall(text)) != 1:
            continue  # active, or one of two keys of this name
        text, changed = line.sub(r"\1\2", text), changed + 1
    assert changed > 15
    out.write_text(text)
    assert load_study(out) == study


def test_every_meaning_is_in_the_file(tmp_path):
    out = tmp_path / "a.yaml"
    call("study", "new", out, "--model", "path:small")
    text = out.read_text()
    plain = " ".join(line.strip().removeprefix("#").strip() for line in text.splitlines())
    for key in study_keys():
        if "[]" not in key.path:
            assert " ".join(key.meaning.split()) in plain, key.path
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "org/name"], "--model: 'org/name' is no directory"),
        (["--model", "hub:org/name"], "--model: a hub model without a commit"),
        (["--model", "path:a", "--llm", "hub:b"], "--llm: a hub model without a commit"),
        (["--model", "path:a", "--task", "classification"], "task.labels: the labels are missing"),
        (["--model", "path:a", "--label", "yes"], "task.labels: multiple_choice has no labels"),
        (["--model", "path:a", "--unit", "subject"], "--subject: no column"),
        (["--model", "path:a", "--subject", "patient"], "--subject: --unit record needs none"),
        (["--model", "path:a", "--unit", "silo", "--joint"], "--joint: a silo is protected once"),
        (["--model", "path:a", "--delta", "0.5"], "privacy.delta: "),
    ],
)
def test_what_cannot_be_is_named_and_nothing_is_written(tmp_path, words, says):
    with pytest.raises(ConfigError) as caught:
        call("study", "new", tmp_path / "a.yaml", *words)
    assert str(caught.value).startswith(says)
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    out = tmp_path / "a.yaml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        call("study", "new", out, "--model", "path:a")
    assert out.read_text() == "mine"
    with pytest.raises(ConfigError, match="cannot be written"):
        call("study", "new", tmp_path / "no" / "a.yaml", "--model", "path:a")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_study_of_virtual_tokens(tmp_path, method):
    words = ["--model", "builtin:hospital-slm", "--method", method, "--joint", "--json"]
    tree = json.loads(call("study", "new", tmp_path / "a.yaml", *words))
    assert tree["adapter"] == {"method": method, "virtual_tokens": 16}
    assert load_study(tmp_path / "a.yaml").tree == study_from_tree(tree).tree


def test_a_study_of_all_weights(tmp_path):
    words = ["--model", "builtin:hospital-slm", "--method", "full", "--json"]
    tree = json.loads(call("study", "new", tmp_path / "a.yaml", *words))
    assert tree["adapter"] == {"method": "full"}
    assert load_study(tmp_path / "a.yaml").tree == study_from_tree(tree).tree
    with pytest.raises(ConfigError, match="all weights of the large model would be tuned"):
        call("study", "new", tmp_path / "b.yaml", *words, "--llm", "builtin:hospital-llm")


def test_a_directory_is_a_model(tmp_path):
    (tmp_path / "small").mkdir()
    words = ["--model", tmp_path / "small", "--json"]
    tree = json.loads(call("study", "new", tmp_path / "a.yaml", *words))
    assert tree["models"]["slm"] == {"source": f"path:{tmp_path / 'small'}"}


def test_the_page_of_all_keys_is_up_to_date():
    page = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert page == call("study", "keys", "--markdown"), (
        "write it anew: securefedcollm study keys --markdown > docs/keys.md"
    )


def test_every_key_of_the_schema_has_a_meaning():
    keys = {key.path: key for key in study_keys()}

    def walk(section, prefix):
        for item in msgspec.structs.fields(section):
            key = keys[prefix + item.encode_name]
            assert key.meaning.endswith("."), key.path
            assert key.required == item.required
            if key.section is not None:
                walk(key.section, key.path + ("[]." if key.kind.startswith("list") else "."))

    walk(Study, "")
    assert keys["local.batch_size"].required
    assert keys["local.steps"].needed == "there are no `epochs`"
    assert keys["adapter.dropout"].allowed == "at least 0, below 1"
    assert keys["silos.count"].allowed == "at least 3, at most 10,000"
    assert keys["task.data.public"].allowed.endswith("at most 1,000,000,000")  # study/bounds.py
    schema = json.loads(call("study", "schema", "--json"))["$defs"]
    assert schema["Local"]["properties"]["steps"]["description"] == keys["local.steps"].meaning


def test_keys_of_one_section():
    text = call("study", "keys", "privacy.adaptive")
    assert [line.split(":")[0] for line in text.splitlines() if line[0] != " "] == [
        "privacy.adaptive",
        *(f"privacy.adaptive.{name}" for name in ("quantile", "learning_rate", "count_noise")),
    ]
    (found,) = json.loads(call("study", "keys", "local.sampling_rate", "--json"))
    assert (found["needed"], found["default"]) == ("joint DP-SGD", None)
    with pytest.raises(ConfigError, match="a study has no key 'lokal'"):
        call("study", "keys", "lokal")
