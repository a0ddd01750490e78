"""Earlier adapters in a base model, and new ones apart from them.

Adversary: whoever supplies the file of an earlier adapter.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import attach, load_adapter, save_adapter
from securefedcollm.tuning.folding import WEIGHTS, fold, keep_apart, project_off, read_released
from tests.support.models import llama

SCALE = 16.0 / 4


def model_of(kind):
    if kind == "llama":
        return llama(40, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        return GPT2LMHeadModel(config).eval()  # its layers are stored transposed


def released_of(tmp_path, kind="llama", name="one", seed=3, method="lora"):
    """An adapter of a finished run: A and B both full of values."""
    adapted = attach(model_of(kind), method=method, rank=4, alpha=16.0, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for full, parameter in adapted.named_parameters():
        if ".lora_B." in full:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    save_adapter(adapted, tmp_path / name)
    return tmp_path / name / WEIGHTS


def read(path, **changes):
    wanted = changes.pop("wanted", None) or hashlib.sha256(path.read_bytes()).hexdigest()
    settings = {"scale": SCALE, "max_abs": 100.0, "where": "continue"} | changes
    return read_released([path], wanted, **settings)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_folded_model_is_the_model_with_its_adapter(tmp_path, kind):
    path = released_of(tmp_path, kind)
    tokens = torch.arange(12)[None] % 40
    with torch.no_grad():
        wanted = load_adapter(model_of(kind), path.parent)(tokens).logits
        plain = model_of(kind)
        before = plain(tokens).logits
        fold(plain, [read(path)], "slm")
        found = plain(tokens).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 0.01  # the adapter does something


def test_the_fold_is_exact_in_double_and_the_same_bits_every_time(tmp_path):
    path = released_of(tmp_path)
    models = [model_of("llama") for _ in range(3)]
    plain = {name: p.detach().double() for name, p in models[0].named_parameters()}
    released = read(path)
    for model in models[1:]:
        fold(model, [released], "slm")
    for (name, one), two in zip(models[1].named_parameters(), models[2].parameters(), strict=True):
        assert torch.equal(one, two)
        pair = released.pairs.get(name.removesuffix(".weight"))
        wanted = plain[name]
        if pair is not None:
            wanted = wanted + torch.from_numpy(SCALE * (pair[1] @ pair[0]))
        torch.testing.assert_close(one.double(), wanted, atol=1e-8, rtol=1e-7)


def test_two_folds_add_up(tmp_path):
    first, second = released_of(tmp_path), released_of(tmp_path, name="two", seed=4)
    once, twice = model_of("llama"), model_of("llama")
    fold(once, [read(first), read(second)], "slm")
    fold(twice, [read(first)], "slm")
    fold(twice, [read(second)], "slm")
    assert all(map(torch.equal, once.parameters(), twice.parameters()))


def refused(function, *arguments, **settings):
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **settings)
    assert caught.value.hint
    return caught.value.message


def test_another_file_in_its_place_is_refused(tmp_path):
    path = released_of(tmp_path)
    honest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read(path, wanted=honest).sha256 == honest  # the control
    tensors = load_file(path)
    name = next(n for n in tensors if ".lora_B." in n)
    tensors[name][0, 0] += 1e-3
    save_file(tensors, path)
    assert "is not the adapter that the study names" in refused(read, path, wanted=honest)
    path.unlink()
    assert "is not there" in refused(read, path, wanted=honest)


def test_a_signed_file_that_is_no_sound_adapter_is_refused(tmp_path):
    path = released_of(tmp_path)
    tensors = load_file(path)
    a = next(n for n in tensors if ".lora_A." in n)
    b = a.replace("lora_A", "lora_B")
    for change, said in (
        ({a: np.full_like(tensors[a], np.nan)}, "above adapter.max_abs"),
        ({b: np.full_like(tensors[b], 101.0)}, "above adapter.max_abs"),
        ({a: tensors[a].astype(np.float16)}, "no pair of float32 matrices"),
        ({a: tensors[a][:2]}, "no pair of float32 matrices"),
        ({"base_model.model.x.bias": tensors[a][0]}, "holds no low-rank adapter"),
    ):
        path.write_bytes(save({**tensors, **change}))
        assert said in refused(read, path)
    path.write_bytes(save({"prompt_embeddings": tensors[a]}))
    assert "holds no low-rank adapter" in refused(read, path)
    path.write_bytes(b"\x80\x04no safetensors")
    assert "is no safetensors file" in refused(read, path)


def test_an_adapter_of_another_model_or_of_a_shared_weight_is_refused(tmp_path):
    released = read(released_of(tmp_path))
    assert "made for another model" in refused(fold, llama(40, hidden_size=8), [released], "slm")
    tied = llama(40, seed=1, tie_word_embeddings=True)
    shape = tuple(tied.lm_head.weight.shape)
    head = {"lm_head": (np.zeros((1, shape[1])), np.zeros((shape[0], 1)))}
    told = type(released)(released.sha256, 1.0, head)
    assert "shares its weight" in refused(fold, tied, [told], "slm")
    fold(llama(40, seed=1, tie_word_embeddings=False), [told], "slm")  # the control


def a_matrices(adapted):
    return {
        name.replace(".default.", "."): p.detach().double().numpy().copy()
        for name, p in adapted.named_parameters()
        if ".lora_A." in name
    }


def test_a_new_adapter_keeps_out_of_what_the_earlier_ones_read(tmp_path):
    paths = [released_of(tmp_path), released_of(tmp_path, name="two", seed=4)]
    earlier = [read(path) for path in paths]
    adapted = attach(model_of("llama"), rank=4, seed=9)
    drawn = a_matrices(adapted)
    keep_apart(adapted, earlier, "slm")
    for name, apart in a_matrices(adapted).items():
        module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
        taken = np.concatenate([one.pairs[module][0] for one in earlier])
        sizes = np.linalg.norm(apart, axis=1)[:, None] * np.linalg.norm(taken, axis=1)
        assert np.abs(apart @ taken.T / sizes).max() < 1e-6
        assert np.abs(drawn[name] @ taken.T / sizes).max() > 0.05  # without the projection
        np.testing.assert_allclose(
            np.linalg.norm(apart, axis=1), np.linalg.norm(drawn[name], axis=1), rtol=1e-6
        )
        # the projection of a reference, in double
        q, _ = np.linalg.qr(taken.T)
        wanted = drawn[name] - drawn[name] @ q @ q.T
        wanted *= (np.linalg.norm(drawn[name], axis=1) / np.linalg.norm(wanted, axis=1))[:, None]
        np.testing.assert_allclose(apart, wanted, atol=1e-6)


def test_where_no_room_is_left_it_says_so(tmp_path):
    earlier = [read(released_of(tmp_path))]
    adapted = attach(model_of("llama"), rank=4, seed=3)  # the earlier one's own A
    assert "leave no room" in refused(keep_apart, adapted, earlier, "slm")
    rows = np.random.Generator(np.random.PCG64(1)).normal(size=(2, 6))
    assert project_off(rows, np.eye(6)) is None
    assert project_off(rows, np.eye(6)[:5]) is not None
