"""``securefedcollm model …`` on tiny models: what the commands write, print and refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from securefedcollm_cli.model import app
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError, DataError
from securefedcollm.tuning.adapters import attach, save_adapter
from securefedcollm.tuning.models import load_model, save_model
from tests.support.models import llama

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def run(*words: str | Path, ok: bool = True) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if ok and result.exception:
        raise result.exception
    return result


def letters() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    vocabulary = {token: i for i, token in enumerate(["?", "end", " ", *LETTERS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = Split(Regex("."), "isolated")
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", eos_token="end")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = llama(
        29,
        intermediate_size=24,
        num_hidden_layers=3,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
    )
    save_model(model, letters(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 80)
    return file


def test_prune_then_heal_then_digest(base: Path, text: Path, tmp_path: Path) -> None:
    small, healed = tmp_path / "small", tmp_path / "healed"
    done = run("prune", base, "--layers", "2", "--out", small, "--text", text, "--json")
    assert len(json.loads(done.stdout)["small"]["layers"]) == 2
    assert load_model(f"path:{small}").model.config.num_hidden_layers == 2

    command = ["heal", small, "--teacher", base, "--out", healed, "--text", text, "--json"]
    facts = json.loads(run(*command, "--steps", "25", "--learning-rate", "5e-3").stdout)["healed"]
    assert facts["perplexity_healed"] != facts["perplexity_pruned"]
    assert load_model(f"path:{healed}").digest != load_model(f"path:{small}").digest

    printed = run("digest", healed).stdout.strip()
    loaded = load_model(f"path:{healed}")
    assert printed == loaded.digest
    told = json.loads(run("digest", healed, "--json").stdout)
    assert (told["sha256"], told["parts"]) == (printed, loaded.parts)


def test_generate_continues_with_and_without_an_adapter(base: Path, tmp_path: Path) -> None:
    plain = json.loads(run("generate", "--model", base, "abc", "--json").stdout)
    assert plain["prompt"] == "abc"
    assert set(plain["text"]) <= set(LETTERS + " ?")
    assert run("generate", "--model", base, "--prompt", "abc").stdout.rstrip("\n") == plain["text"]

    model = attach(load_model(f"path:{base}").model, method="lora", rank=4, seed=1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=torch.Generator().manual_seed(5))
    save_adapter(model, tmp_path / "adapter")
    tuned = run("generate", "--model", base, "--adapter", tmp_path / "adapter", "abc").stdout
    assert tuned.strip() != plain["text"]


def test_generate_uses_the_model_and_adapter_of_a_run(base: Path, tmp_path: Path) -> None:
    home = tmp_path / "run"
    (home / "adapters").mkdir(parents=True)
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    study = config.read_text()
    study = study.replace("builtin:hospital-llm", "path:base")
    (home / "study.yaml").write_text(study)
    for role, seed in (("llm", 5), ("slm", 6)):
        model = attach(load_model(f"path:{base}").model, method="lora", rank=4, seed=1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(generator=torch.Generator().manual_seed(seed))
        save_adapter(model, home / "adapters" / role)
    told = run("generate", "--run", home, "--data", tmp_path, "--prompt", "abc").stdout
    adapter = home / "adapters" / "llm"
    direct = run("generate", "--model", base, "--adapter", adapter, "abc").stdout
    assert told == direct


def test_commands_refuse_what_they_cannot_use(base: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    cases: list[tuple[list[str | Path], type[Exception], str]] = [
        (["generate", "--model", base], ConfigError, "no prompt"),
        (["generate", "abc"], ConfigError, "exactly one"),
        (["generate", "--model", base, "--run", base, "a"], ConfigError, "exactly one"),
        (["generate", "--run", tmp_path / "none", "a"], ConfigError, "no such file"),
        (
            ["generate", "--model", base, "--adapter", tmp_path / "pickled", "a"],
            ConfigError,
            "no adapter_model.safetensors",
        ),
        (
            ["prune", base, "--layers", "3", "--out", tmp_path / "x", "--text", text],
            ConfigError,
            "cannot be kept",
        ),
        (
            ["prune", base, "--layers", "2", "--out", tmp_path / "x", "--text", base],
            DataError,
            "cannot be read as text",
        ),
        (
            ["prepare", "smollm2", "--wheel", text, "--out", tmp_path / "y"],
            DataError,
            "not the",
        ),
        (["digest", "builtin:nothing"], ConfigError, "no such built-in"),
    ]
    for words, kind, says in cases:
        result = run(*words, ok=False)
        assert isinstance(result.exception, kind), result.exception
        assert says in str(result.exception)
        assert result.exception.hint
    assert not (tmp_path / "x").exists()


def saved(model: Any, directory: Path, extra: int = 0) -> Path:
    """A model beside a tokenizer with the tokens of ``letters``, and some more."""
    tokenizer = letters()
    tokenizer.add_tokens([f"[{i}]" for i in range(extra)])
    save_model(model.eval(), tokenizer, directory)
    return directory


def test_evaluate_refuses_what_it_would_measure_wrongly(tmp_path: Path) -> None:
    """A model that sees the answer, tokens without an embedding, places without a position."""
    sizes: dict[str, Any] = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1}
    bert = BertLMHeadModel(BertConfig(**sizes, num_attention_heads=2, intermediate_size=16))
    gpt2 = GPT2Config(vocab_size=29, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    cases = [
        (saved(bert, tmp_path / "bert"), "a", "model: BertLMHeadModel sees the tokens that follow"),
        (
            saved(GPT2LMHeadModel(gpt2), tmp_path / "larger", 2),
            "[1]",
            "the tokenizer has 31 tokens, the model has embeddings for 29",
        ),
        (
            saved(GPT2LMHeadModel(gpt2), tmp_path / "short"),
            "abcdefghijklmnop",
            "--max-tokens: 36 tokens, the model that is evaluated has positions for 16",
        ),
    ]
    file = tmp_path / "test.jsonl"
    for model, asked, says in cases:
        row = {"question": asked, "choices": ["bc", "c"], "answer": 0}
        file.write_text(json.dumps(row) + "\n")
        result = run("evaluate", "--model", model, "--test", file, ok=False)
        assert isinstance(result.exception, ConfigError), result.exception
        assert says in str(result.exception)
        assert result.exception.hint


def test_evaluate_measures_questions_by_subject(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    rows = [
        {"question": "ab", "choices": ["c", "de", "f"], "answer": i % 3, "subject": "xy"[i % 2]}
        for i in range(6)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "--model", base, "--test", file]
    for score in ("plain", "length", "pmi", "pmi-length"):
        told = json.loads(run(*command, "--score", score, "--json").stdout)
        assert list(told) == ["all", "x", "y"]
        assert told["all"]["accuracy"] == pytest.approx(1 / 3)  # the same question, three answers
        assert told["all"]["count"] == told["x"]["count"] + told["y"]["count"] == 6
        assert "perplexity" not in told["all"]
        assert told["all"]["gold_log_prob"] < -1.09  # the mean over all answers, at most -log 3
    flat = ["--score-temperature", 1e6, "--json"]
    told = json.loads(run(*command, *flat).stdout)  # so every choice is as likely
    assert told["all"]["gold_log_prob"] == pytest.approx(-math.log(3), abs=1e-3)
    result = run(*command, "--score-temperature", "0", ok=False)
    assert "0.0 is no temperature" in str(result.exception)
    shown = run(*command).stdout
    assert "gold log prob" in shown
    assert "0.3333" in shown
    file.write_text(json.dumps({"question": "ab", "choices": ["c", "d"]}) + "\n")
    with pytest.raises(DataError, match=r"test.jsonl:1: field 'answer' is missing"):
        run(*command)


def test_import_of_a_gguf_file(tmp_path: Path) -> None:
    """What is in such files is tests/tuning/test_gguf.py's matter; here, what a user sees."""
    import gguf

    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("output_norm.weight", torch.zeros(8).numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file):
        step()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DataError, match=r"m\.gguf: "):
        run("import", file, "--out", tmp_path / "out")
    with pytest.raises(DataError, match="has the SHA-256"):
        run("import", file, "--out", tmp_path / "out", "--sha256", "00" * 32)
    assert not (tmp_path / "out").exists()
