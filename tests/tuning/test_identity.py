"""The digest of a model sees all that determines its function, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from securefedcollm.errors import ConfigError
from securefedcollm.federation.tuned import Tuned
from securefedcollm.study import load_study
from securefedcollm.study.config import Model
from securefedcollm.tuning.identity import model_digest, model_parts
from securefedcollm.tuning.models import LoadedModel, load_model, save_model
from tests.support.inputs import make_inputs

Edit = Callable[[Path], None]
PARTS = ("weights", "configuration", "tokenizer", "chat_template")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_inputs(tmp_path)
    return tmp_path / "slm"


def load(directory: Path) -> LoadedModel:
    return load_model(f"path:{directory}")


def in_json(name: str, **changes: Any) -> Edit:
    """Change keys of a JSON file; a value of None removes the key."""

    def edit(directory: Path) -> None:
        tree = json.loads((directory / name).read_text()) | changes
        kept = {key: tree[key] for key in tree if key not in changes or changes[key] is not None}
        (directory / name).write_text(json.dumps(kept))

    return edit


def template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }} thing1")


def added_token(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["colour of"])  # takes the place of two
    tokenizer.save_pretrained(directory)


HARMFUL = {
    "activation": ("configuration", in_json("config.json", hidden_act="relu")),
    "rotary base": (
        "configuration",
        in_json("config.json", rope_parameters={"rope_theta": 100.0, "rope_type": "default"}),
    ),
    "normalisation": ("configuration", in_json("config.json", rms_norm_eps=0.1)),
    "end token": ("configuration", in_json("config.json", eos_token_id=5)),
    "added token": ("tokenizer", added_token),
    "normaliser": ("tokenizer", in_json("tokenizer.json", normalizer={"type": "Lowercase"})),
    "special token": ("tokenizer", in_json("tokenizer_config.json", eos_token="red")),
    "splitting": ("tokenizer", in_json("tokenizer_config.json", split_special_tokens=True)),
    "template": ("chat_template", template),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_the_same_weights_in_another_function_are_another_model(name: str, directory: Path) -> None:
    """Adversary: whoever hands one silo other files. The weights alone do not show it."""
    part, edit = HARMFUL[name]
    before = load(directory)
    edit(directory)
    after = load(directory)
    assert after.digest != before.digest
    assert [p for p in PARTS if after.parts[p] != before.parts[p]] == [part]
    assert after.parts["weights"] == before.parts["weights"]  # what a digest was before
    with pytest.raises(ConfigError, match="the study pins"):
        load_model(f"path:{directory}", sha256=before.digest)


def test_the_cases_are_other_functions(directory: Path) -> None:
    """The control of the above: the logits, the tokens or the prompt change."""
    asked = "Question: colour of thing1 Answer:"
    before = load(directory)
    ids = before.tokenizer(asked)["input_ids"]
    for name in ("activation", "rotary base", "normalisation"):
        fresh = directory.parent / name
        save_model(before.model, before.tokenizer, fresh)
        HARMFUL[name][1](fresh)
        with torch.no_grad():
            one, two = (m.model(torch.tensor([ids])).logits for m in (before, load(fresh)))
        assert not torch.equal(one, two), name
    for name in ("added token", "normaliser"):
        fresh = directory.parent / name
        save_model(before.model, before.tokenizer, fresh)
        HARMFUL[name][1](fresh)
        assert load(fresh).tokenizer(asked)["input_ids"] != ids, name


HARMLESS: dict[str, Edit] = {
    "versions": in_json("config.json", transformers_version="4.57.1"),
    "path": in_json("config.json", _name_or_path="somebody/else"),
    "dtype's old name": in_json("config.json", dtype=None, torch_dtype="float32"),
    "no dtype": in_json("config.json", dtype=None),
    "no architectures": in_json("config.json", architectures=None),
    "code that is never run": in_json("config.json", auto_map={"AutoModel": "a.B"}),
    "a default left out": in_json("config.json", attention_dropout=None),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_two_spellings_of_one_model_have_one_digest(name: str, directory: Path) -> None:
    before = load(directory).digest
    HARMLESS[name](directory)
    assert load(directory).digest == before


def test_use_and_copies_do_not_change_the_digest(directory: Path, tmp_path: Path) -> None:
    loaded = load(directory)
    loaded.tokenizer(["red", "red blue"], padding=True, truncation=True, max_length=1)
    assert model_parts(loaded.model, loaded.tokenizer) == loaded.parts
    save_model(loaded.model, loaded.tokenizer, tmp_path / "copy" / "deep")
    assert load(tmp_path / "copy" / "deep").parts == loaded.parts
    assert model_digest(loaded.parts) == loaded.digest


def test_the_digest_is_what_a_round_header_names(directory: Path, tmp_path: Path) -> None:
    study = load_study(tmp_path / "tiny.yaml")
    spec = Model(source="path:slm")
    before = Tuned.load(study, spec, data=tmp_path).base_digest
    assert before.hex() == load(directory).digest
    template(directory)
    assert Tuned.load(study, spec, data=tmp_path).base_digest != before


def test_a_part_of_a_configuration_is_read_like_the_whole() -> None:
    """Vision-language models keep the language model's configuration inside their own."""
    from transformers import Gemma3Config

    def parts(**text: Any) -> str:
        config = LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=2)
        config.num_hidden_layers, config.intermediate_size = 1, 8
        model = LlamaForCausalLM(config)
        model.config = Gemma3Config(text_config={"model_type": "gemma3_text"} | text)
        return model_parts(model, ByT5Tokenizer())["configuration"]

    assert parts(dtype="bfloat16", _name_or_path="x") == parts()
    assert parts(rms_norm_eps=0.5) != parts()


def test_a_tokenizer_without_a_backend_has_a_digest_too(directory: Path, tmp_path: Path) -> None:
    model = load(directory).model

    def part(tokenizer: Any) -> str:
        return model_parts(model, tokenizer)["tokenizer"]

    plain = part(ByT5Tokenizer())
    ByT5Tokenizer().save_pretrained(tmp_path / "saved")
    assert part(AutoTokenizer.from_pretrained(tmp_path / "saved")) == plain
    longer = ByT5Tokenizer()
    longer.add_tokens(["red"])
    assert len({plain, part(longer), part(ByT5Tokenizer(extra_ids=7))}) == 3
