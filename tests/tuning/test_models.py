"""Loading models: what is accepted, what is refused, and what the digest sees."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.tuning.adapters import attach, save_adapter
from securefedcollm.tuning.identity import model_digest, model_parts, weights_digest
from securefedcollm.tuning.models import load_model, save_model
from tests.support.models import llama, word_level

REVISION = "0123456789abcdef0123456789abcdef01234567"


def tiny(seed: int = 0, tied: bool = True, layers: int = 2) -> LlamaForCausalLM:
    return llama(
        11,
        seed=seed,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )


def words() -> PreTrainedTokenizerFast:
    return word_level(["?", "end", *"abcdefghi"], "?", eos_token="end")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_model(tiny(), words(), tmp_path / "base")
    return tmp_path / "base"


def test_a_saved_model_comes_back_whole(directory: Path) -> None:
    loaded = load_model(f"path:{directory}")
    tokens = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, tiny()(tokens).logits)
    assert not loaded.model.training
    assert loaded.tokenizer("a c b")["input_ids"] == [2, 4, 3]
    assert loaded.digest == digest_of(tiny())
    assert load_model("path:base", base_dir=directory.parent).digest == loaded.digest
    assert not list(directory.parent.glob(".*"))


def digest_of(model: Any) -> str:
    return model_digest(model_parts(model, words()))


def test_the_digest_of_the_weights(directory: Path, tmp_path: Path) -> None:
    whole = load_model(f"path:{directory}")
    digest = whole.parts["weights"]
    assert digest == weights_digest(tiny())
    sharded = tmp_path / "sharded"
    tiny().save_pretrained(sharded, max_shard_size="1KB")
    words().save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert load_model(f"path:{sharded}").digest == whole.digest

    assert weights_digest(tiny(seed=1)) != digest
    assert weights_digest(tiny().bfloat16()) != digest
    nudged = tiny()
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert weights_digest(nudged) != digest
    # Same bytes in another shape are another model.
    turned = tiny()
    up = turned.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.detach().reshape(8, 16))
    assert weights_digest(turned) != digest


def test_a_pinned_digest_is_enforced(directory: Path) -> None:
    """Adversary: a server that hands some silos another model."""
    digest = load_model(f"path:{directory}").digest
    load_model(f"path:{directory}", sha256=digest)
    with pytest.raises(ConfigError, match=f"digest {digest[:16]}…, the study pins") as caught:
        load_model("path:base", sha256="0" * 64, base_dir=directory.parent)
    assert f"securefedcollm model digest path:{directory} --dtype float32" in caught.value.hint


def test_a_pin_of_the_weights_alone_is_refused_with_the_new_one(directory: Path) -> None:
    """Adversary: as above, where the study was signed before the digest covered the whole model."""
    loaded = load_model(f"path:{directory}")
    with pytest.raises(ConfigError, match="digest of the weights alone") as caught:
        load_model(f"path:{directory}", sha256=loaded.parts["weights"])
    assert f"sha256: {loaded.digest}" in caught.value.hint
    assert f"securefedcollm model digest path:{directory} --dtype float32" in caught.value.hint
    load_model(f"path:{directory}", sha256=loaded.digest)


def test_an_adapter_beside_a_model_is_not_put_into_it(directory: Path) -> None:
    """Adversary: whoever supplies the directory. Its scale, which is in no weight, or a base that
    lies elsewhere would come with it."""
    save_adapter(attach(tiny(), method="lora", rank=2, seed=1), directory.parent / "adapter")
    for file in (directory.parent / "adapter").glob("adapter_*"):
        file.rename(directory / file.name)
    with pytest.raises(ConfigError, match="comes with an adapter"):
        load_model(f"path:{directory}")


def test_bfloat16_is_loaded_as_such(directory: Path) -> None:
    loaded = load_model(f"path:{directory}", dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.digest == digest_of(tiny().bfloat16())


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unread(directory: Path, name: str) -> None:
    """Adversary: whoever supplies the directory; unpickling would run their code."""
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ConfigError, match=f"only {name}, which is not loaded"):
        load_model(f"path:{directory}")


def test_code_that_comes_with_a_model_is_not_run(directory: Path) -> None:
    """Adversary: as above, with a ``modeling_*.py`` next to the weights."""
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (directory / "config.json").write_text(json.dumps(config))
    marker = directory / "ran"
    (directory / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(f"path:{directory}")
    assert not marker.exists()


def test_missing_weights_are_not_made_up(directory: Path) -> None:
    """The library would fill them with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 weights, model\.layers\.1\.mlp"):
        load_model(f"path:{directory}")


def shard_missing(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    tiny().save_pretrained(directory, max_shard_size="1KB")
    min(directory.glob("model-00002-of-*.safetensors")).unlink()


def cut_off(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pointer(directory: Path) -> None:
    (directory / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    )


def no_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def changed(**keys: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def no_numbers(directory: Path) -> None:
    broken = tiny()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    broken.save_pretrained(directory)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shard_missing, r"model-00002-of-000\d\d\.safetensors is missing, one of \d+ shards"),
        (cut_off, r"model\.safetensors has [\d,]+ bytes of [\d,]+: it is cut off"),
        (pointer, r"model\.safetensors is a Git LFS pointer"),
        (no_tokenizer, r"its tokenizer is missing \(no tokenizer\.json\)"),
        (changed(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            "quantised by bitsandbytes, which is not there"),
        (changed(model_type="\x1b[2Jnew"), r"does not know its architecture '\\\\x1b\[2Jnew'"),
        (changed(model_type="t5"), "t5 is no causal language model"),
        (no_numbers, r"its weight model\.layers\.1\.mlp\.up_proj\.weight holds values that"),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json is no JSON"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_loaded_says_why(
    directory: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(directory)
    with pytest.raises(ConfigError, match=says) as caught:
        load_model(f"path:{directory}")
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_directory_that_may_not_be_entered_is_one_line(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any user but root meets it; the tests may run as root, so the refusal is played."""

    def denied(path: Path, **unused: Any) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\)"):
        load_model(f"path:{directory}")


def test_sources_that_lead_nowhere(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"not safetensors")
    for source, says in {
        "nothing": "is no model source",
        "builtin:other": "no such built-in model",
        "builtin:smollm2-135m": "has not been prepared",
        f"path:{tmp_path}/absent": "no transformers directory",
        f"path:{tmp_path}/adapter": "is an adapter",
        f"path:{tmp_path}/bare": "holds no weights",
        f"path:{directory}": "cannot be loaded",
        "hub:org/name": "needs its full commit hash",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_model(source, cache_dir=tmp_path / "cache")
        assert says in str(caught.value)
        assert caught.value.hint
        assert "\n" not in str(caught.value)


def test_a_branch_name_is_no_revision() -> None:
    """Adversary: whoever may push to the repository after the participants agreed."""
    with pytest.raises(ConfigError, match="full commit hash"):
        load_model("hub:org/name", revision="main")


def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="not in the cache and cannot be downloaded") as caught:
        load_model("hub:org/name", revision=REVISION)
    assert f"hf download org/name --revision {REVISION}" in caught.value.hint


def test_a_cached_hub_model_loads_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: Path
) -> None:
    import huggingface_hub.constants

    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / REVISION
    snapshot.parent.mkdir(parents=True)
    directory.rename(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load_model("hub:org/name", revision=REVISION)
    assert loaded.digest == digest_of(tiny())
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        load_model("hub:org/name", revision=REVISION[::-1])


def test_saving_never_overwrites(directory: Path, tmp_path: Path) -> None:
    before = sorted(directory.iterdir())
    with pytest.raises(StateError, match="not empty"):
        save_model(tiny(seed=1), words(), directory)
    assert sorted(directory.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="cannot be written"):
        save_model(tiny(), words(), tmp_path / "file" / "model")
