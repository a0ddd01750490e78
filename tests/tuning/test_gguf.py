"""Models from GGUF files: written here as llama.cpp's converter writes them, and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from securefedcollm.errors import ConfigError, DataError, StateError
from securefedcollm.tuning import gguf as ours
from securefedcollm.tuning.gguf import import_gguf
from securefedcollm.tuning.models import load_model

# Byte-level BPE: every byte is a token, and one pair is merged.
BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]
BPE = [*BYTES, "th", "<|end|>"]
# SentencePiece: special tokens, bytes, pieces with scores.
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256))]
PIECES += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581a", "th"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}


def llama() -> Any:
    config = LlamaConfig(vocab_size=len(BPE), tie_word_embeddings=True, **SIZES)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 50_000.0}
    return LlamaForCausalLM(config)


def qwen2() -> Any:
    config = Qwen2Config(vocab_size=len(BPE), tie_word_embeddings=False, **SIZES)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1_000_000.0}
    return Qwen2ForCausalLM(config)


def gemma3() -> Any:
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(PIECES), sliding_window=16, **SIZES))


MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "qwen2": qwen2, "gemma3": gemma3}


def made(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = MODELS[kind]().eval()
        for name, value in model.named_parameters():
            if "norm" in name:  # ones say nothing
                torch.nn.init.uniform_(value, 0.1, 0.6)
    return model


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves to neighbours, as llama.cpp has them for Llama (convert_hf_to_gguf.py)."""
    shape = (heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def write(
    path: Path,
    kind: str,
    model: Any,
    *,
    quantized: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    leave_out: str = "-",
) -> Path:
    """``model`` as a GGUF file."""
    config, writer = model.config, gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        spm(writer)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
        bpe(writer)
    change(writer)
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == kind)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, value in model.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        told = f"{names.get_name(stem)}.{suffix}"
        if leave_out in told:
            continue
        weights = value.detach().numpy()
        if kind == "llama" and ".attn_q." in told:
            weights = permuted(weights, config.num_attention_heads)
        if kind == "llama" and ".attn_k." in told:
            weights = permuted(weights, config.num_key_value_heads)
        if kind == "gemma3" and "norm" in told:
            weights = weights + 1
        type_ = quantized if weights.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(told, gguf.quantize(weights, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bpe(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(BPE)
    writer.add_token_types([1] * (len(BPE) - 1) + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(len(BPE) - 1)
    writer.add_bos_token_id(len(BPE) - 1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def spm(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-float(i) for i in range(len(PIECES))])
    writer.add_token_types([3, 3, 3, 2, *[6] * 256, *[1] * (len(PIECES) - 260)])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(5, 45).reshape(1, 40)
    with torch.inference_mode():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_in_a_file_is_the_model(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    file = write(tmp_path / "a model.gguf", kind, model)
    found = import_gguf(file, tmp_path / "out", dtype="float32")
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.quantization == "F32"
    loaded = load_model(f"path:{tmp_path / 'out'}")
    assert found.parameters == sum(value.numel() for value in model.parameters())
    assert torch.equal(logits(loaded.model), logits(model))
    assert torch.std(logits(model)) > 0.01  # it says something
    text = "the other bath, twice\n"
    assert (
        loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"], True).strip() == text.strip()
    )
    assert {f.stat().st_mode for f in (tmp_path / "out").iterdir()} == {
        (tmp_path / "out" / "config.json").stat().st_mode
    }


def test_quantised_weights_and_the_type_they_are_kept_in(tmp_path: Path) -> None:
    model = made("llama")
    file = write(tmp_path / "m.gguf", "llama", model, quantized=gguf.GGMLQuantizationType.Q8_0)
    assert import_gguf(file, tmp_path / "32", dtype="float32").quantization == "Q8_0"
    import_gguf(file, tmp_path / "16")
    exact = load_model(f"path:{tmp_path / '32'}").model
    rounded = load_model(f"path:{tmp_path / '16'}", dtype="bfloat16").model
    weight = "model.layers.1.mlp.up_proj.weight"
    true = model.get_parameter(weight)
    step = true.abs().amax() / 127
    assert 0 < (exact.get_parameter(weight) - true).abs().max() <= step / 2 * 1.01
    assert torch.equal(rounded.get_parameter(weight), exact.get_parameter(weight).bfloat16())


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("qwen2")
    file = write(tmp_path / "m.gguf", "qwen2", model)
    monkeypatch.setattr(ours, "SHARD", 20_000)
    import_gguf(file, tmp_path / "out", dtype="float32")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {shard.name for shard in shards}
    assert torch.equal(logits(load_model(f"path:{tmp_path / 'out'}").model), logits(model))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_positions_are_written_down(factor: float, tmp_path: Path) -> None:
    """transformers reads no ``rope_freqs.weight``; without it the logits are others, silently."""
    config = made("llama").config
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config.max_position_embeddings = 131_072
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = LlamaForCausalLM(config).eval()
    plain = 500_000.0 ** -(np.arange(4) / 4)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() == pytest.approx(factor)  # the library's formula, not ours

    def scaled(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", factors)

    file = write(tmp_path / "m.gguf", "llama", model, change=scaled)
    import_gguf(file, tmp_path / "out", dtype="float32")
    loaded = load_model(f"path:{tmp_path / 'out'}").model
    assert torch.equal(logits(loaded), logits(model))
    loaded.config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    without = LlamaForCausalLM(loaded.config).eval()  # the control: what would have been run
    without.load_state_dict(loaded.state_dict())
    assert not torch.equal(logits(without), logits(model))


def own_factors(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 4], np.float32))


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


def part(writer: gguf.GGUFWriter) -> None:
    writer.add_uint16("split.count", 3)


def deep(writer: gguf.GGUFWriter) -> None:
    writer.kv_data[0].pop("llama.block_count")
    writer.add_uint32("llama.block_count", 4_000_000_000)


def words(writer: gguf.GGUFWriter) -> None:
    writer.add_string("split.count", "three")


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"change": own_factors}, ConfigError, "scales its positions by numbers of its own"),
        ({"change": yarn}, ConfigError, r"scales its positions \(yarn\)"),
        ({"change": part}, DataError, "is one of 3 parts of a model"),
        ({"change": deep}, DataError, "declares 4000000000 layers but holds 20 tensors"),
        ({"change": words}, DataError, "is a damaged or unusual GGUF file"),
        (
            {"leave_out": "blk.1.ffn_up"},
            DataError,
            "lacks 1 of the model's tensors, such as model.lay",
        ),
    ],
)
def test_a_file_that_would_make_another_model_is_refused(
    given: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "m.gguf", "llama", made("llama"), **given)
    with pytest.raises(error, match=said):
        import_gguf(file, tmp_path / "out")
    assert [*tmp_path.iterdir()] == [file]  # nothing half done is left


def test_another_file_is_refused(tmp_path: Path) -> None:
    """Adversary: whoever hands over another file under the agreed name."""
    file = write(tmp_path / "m.gguf", "llama", made("llama"))
    good = hashlib.sha256(file.read_bytes()).hexdigest()
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match=f"not {good}"):
        import_gguf(file, tmp_path / "out", sha256=good)
    import_gguf(file, tmp_path / "out")  # the control: the file is well formed
    with pytest.raises(StateError, match="is not empty"):
        import_gguf(file, tmp_path / "out")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    """Adversary: whoever wrote the file: cut anywhere, and single bytes of its head changed."""
    whole = write(tmp_path / "m.gguf", "llama", made("llama")).read_bytes()
    file = tmp_path / "bad.gguf"
    cut = [whole[:n] for n in (0, 3, 4, 20, 300, 5_000, len(whole) // 2, len(whole) - 1)]
    changed = [whole[:at] + bytes([255]) + whole[at + 1 :] for at in range(4, 60, 3)]
    refused = 0
    for number, raw in enumerate([*cut, *changed]):
        file.write_bytes(raw)
        try:
            import_gguf(file, tmp_path / f"out{number}")
        except (ConfigError, DataError):  # anything else fails the test
            refused += 1
    assert refused >= len(cut)
    pointer = tmp_path / "lfs.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="a Git LFS pointer"):
        import_gguf(pointer, tmp_path / "x")
    with pytest.raises(DataError, match="cannot be read"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "x")


def test_an_architecture_that_nobody_knows_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "clip")
    writer.add_tensor("v.patch_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"architecture that transformers cannot read: .*clip"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
