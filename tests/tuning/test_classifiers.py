"""Classifiers of pictures: real families by path, their heads, and records that stay apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetForImageClassification,
)

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import attach, full_layout, layout_of, select
from securefedcollm.tuning.attached import UnreadableError
from securefedcollm.tuning.classifiers import orthogonal, own_labels, set_head
from securefedcollm.tuning.image_processor import processor_of, read_settings
from securefedcollm.tuning.independence import made_up_adapter
from securefedcollm.tuning.local import check_records
from securefedcollm.tuning.models import load_model
from securefedcollm.tuning.per_record import question_losses
from securefedcollm.tuning.pictures import MOST_RATIO, from_array, pack
from securefedcollm.tuning.questions import PLAIN, EncodedQuestions, choice_scores, encode
from securefedcollm.tuning.recipe import evaluation_mode
from securefedcollm.tuning.signals import Signal
from tests.support.pictures import FAMILIES, HEADLESS, SIDE, noise, processor, saved
from tests.support.signals import LABELS, LOSS, gradients_and_control


@pytest.fixture(scope="module", params=list(FAMILIES))
def directory(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("family"), FAMILIES[request.param])


def loaded(directory: Path) -> Any:
    return load_model(f"path:{directory}", part="image")


def attached(directory: Path, seed: int = 7) -> tuple[Any, Any]:
    found = loaded(directory)
    set_head(found.model, LABELS, seed)
    return attach(found.model, rank=2, seed=seed), found.tokenizer


def encoded(count: int, tokenizer: Any, seed: int = 0) -> EncodedQuestions:
    return encode(noise(count, seed), tokenizer, 1, "image_classification")


def test_a_family_scores_its_classes_as_transformers_does(directory: Path) -> None:
    found = loaded(directory)
    data = encoded(3, found.tokenizer)
    with torch.no_grad():
        ours = choice_scores(found.model, data)
        assert data.signal is not None
        theirs = found.model(pixel_values=data.signal.inputs(torch.float32)).logits.log_softmax(-1)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert theirs.std() > 0.01  # it does look at the pictures
    assert loaded(directory).digest == found.digest


def test_every_record_has_its_own_gradient_and_no_company_moves_it(directory: Path) -> None:
    """To the bit. Control: the same records behind a batch normalisation."""
    model, tokenizer = attached(directory)
    check_records(model, LOSS)
    data, layout = encoded(6, tokenizer), layout_of(model, "ffa-lora")
    assert all(".lora_B." in name and "classifier" not in name for name in layout.names)
    parameters = select(model, layout)
    with made_up_adapter(model, 0.3), evaluation_mode(model):
        (alone, apart), (together, coupled) = (
            gradients_and_control(model, data.select(torch.arange(count)), Normalised)
            for count in (2, 6)
        )
        losses = question_losses(model, data.select(torch.tensor([1])), "answer", PLAIN)
        wanted = torch.autograd.grad(losses.sum(), parameters)
    assert np.array_equal(alone, together[:2])
    flat = torch.cat([gradient.flatten() for gradient in wanted]).numpy()
    assert np.allclose(alone[1], flat, atol=1e-4 * np.abs(flat).max())
    assert np.abs(alone).max() > 1e-4
    assert not np.allclose(apart, coupled[:2], rtol=1e-2)


def test_an_adapter_on_the_last_layer_alone(directory: Path) -> None:
    found = loaded(directory)
    set_head(found.model, LABELS, 1)
    model = attach(found.model, rank=2, top_layers=1)
    names = full_layout(model).names
    assert names
    assert all(".layers.1." in name or ".layer.1." in name for name in names)
    data = encoded(2, found.tokenizer)
    with made_up_adapter(model, 0.3), torch.no_grad():
        moved = choice_scores(model, data)
    with torch.no_grad():
        assert not torch.allclose(moved, choice_scores(model, data), atol=1e-3)


def test_a_model_in_bfloat16(directory: Path) -> None:
    found = load_model(f"path:{directory}", part="image", dtype="bfloat16")
    set_head(found.model, LABELS, 1)
    check_records(attach(found.model, rank=2), LOSS)
    exact = loaded(directory)
    data = encoded(4, exact.tokenizer)
    with torch.no_grad():
        apart = choice_scores(found.model, data) - choice_scores(exact.model, data)
    assert apart.abs().max() < 0.2


class Normalised(EncodedQuestions):
    """Scaled by the mean and spread of a batch, as by a batch normalisation before the model."""

    def select(self, index: torch.Tensor) -> EncodedQuestions:
        batch = super().select(index)
        assert batch.signal is not None
        scaled = nn.functional.batch_norm(
            batch.signal.inputs(torch.float32), None, None, training=True
        )
        ones = torch.ones_like(batch.signal.scale)
        return replace(batch, signal=Signal(scaled, ones, torch.zeros_like(ones)))


@pytest.mark.parametrize("family", HEADLESS)
def test_a_model_without_a_head_gets_one_from_the_seed(family: str, tmp_path: Path) -> None:
    """The library would fill in random numbers, and the digest would never be the same."""
    directory = saved(tmp_path / "bare", HEADLESS[family])
    found = loaded(directory)
    assert loaded(directory).digest == found.digest
    assert own_labels(found.model) == []
    assert not set_head(found.model, LABELS, 3)
    head = found.model.classifier
    assert torch.allclose(head.weight @ head.weight.T, torch.eye(3), atol=1e-6)
    assert not head.bias.any()
    again = loaded(directory).model
    set_head(again, LABELS, 3)
    data = encoded(2, found.tokenizer)
    with torch.no_grad():
        assert torch.equal(choice_scores(found.model, data), choice_scores(again, data))


def test_the_models_own_head_stays_where_it_knows_the_labels(tmp_path: Path) -> None:
    found = loaded(saved(tmp_path / "vit", FAMILIES["ViT"]))
    before = found.model.classifier.weight.clone()
    assert set_head(found.model, ("newt", "cat"), 1)
    assert torch.equal(found.model.classifier.weight, before[[2, 0]])
    assert found.model.config.id2label == {0: "newt", 1: "cat"}
    other = loaded(tmp_path / "vit").model
    assert not set_head(other, ("newt", "yak"), 1)
    assert torch.equal(other.classifier.weight, orthogonal(2, 16, 1))


def test_a_head_is_the_same_wherever_it_is_made() -> None:
    head = orthogonal(4, 6, 9)
    assert torch.equal(head, orthogonal(4, 6, 9))
    assert not torch.equal(head, orthogonal(4, 6, 10))
    assert head[0, :3].tolist() == pytest.approx(PINNED, abs=1e-6)
    many = orthogonal(9, 4, 2)
    assert torch.allclose(many.T @ many, 9 / 4 * torch.eye(4), atol=1e-5)


PINNED = [-0.22599545, 0.30104488, 0.26172286]
"""Participants on other machines, and of other versions, have to make the same, but for last
bits: these are LAPACK's, and an adapter's own head lies beside it."""


def test_batch_normalisation_is_refused_by_name(tmp_path: Path) -> None:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3, layer_type="basic"
    )
    config.image_size = SIDE
    directory = saved(tmp_path / "resnet", lambda: ResNetForImageClassification(config))
    with pytest.raises(ConfigError, match=r"its layer resnet\.\S+ is a batch normalisation"):
        loaded(directory)


def test_a_directory_without_a_processor_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path / "vit", FAMILIES["ViT"])
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"its preprocessor_config.json cannot be read"):
        loaded(directory)


def test_another_processor_is_another_model(tmp_path: Path) -> None:
    """A silo that scales pictures otherwise would train on other inputs, silently."""
    directory = saved(tmp_path / "vit", FAMILIES["ViT"])
    digest = loaded(directory).digest
    processor(mean=(0.5, 0.4, 0.31)).save_pretrained(directory)
    assert loaded(directory).digest != digest
    with pytest.raises(ConfigError, match="the study pins"):
        load_model(f"path:{directory}", part="image", sha256=digest)


@pytest.mark.parametrize(
    ("source", "part", "what"),
    [("digits-small", "causal", "classifies pictures"), ("hospital-slm", "image", "reads text")],
)
def test_a_built_in_model_of_the_other_kind_is_refused(source: str, part: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_model(f"builtin:{source}", part=part)


OLDER: dict[str, dict[str, Any]] = {
    "ViT": {"feature_extractor_type": "ViTFeatureExtractor", "size": SIDE},
    "DeiT": {
        "feature_extractor_type": "DeiTFeatureExtractor",
        "size": 10,
        "do_center_crop": True,
        "crop_size": SIDE,
        "resample": 3,
    },
    "CLIP": {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": SIDE,
        "do_center_crop": True,
        "crop_size": SIDE,
        "resample": 3,
    },
}
"""Files as they were written when processors were called feature extractors."""
PLAIN_FILE: dict[str, Any] = {
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.2],
}


@pytest.mark.parametrize("family", OLDER)
def test_older_files_mean_what_they_mean_in_transformers(family: str, tmp_path: Path) -> None:
    """One number is both sides of a ViT's input, and the shorter side of a CLIP's."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PLAIN_FILE | OLDER[family]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family.lower()}))
    sight = CLIPVisionConfig(image_size=SIDE)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = np.random.default_rng(2).integers(0, 256, (20, 36, 3), dtype=np.uint8)
    found = processor_of(str(tmp_path), sight, "path:x")([pack(pixels)]).inputs(torch.float32)
    wanted = theirs(pixels, return_tensors="pt")["pixel_values"]
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {"size": {"height": float("inf"), "width": SIDE}},
        {"image_mean": [10**400, 0, 0]},
        {"resample": float("inf")},
        {"rescale_factor": 10**400},
    ],
)
def test_a_number_beyond_all_bounds_is_no_traceback(more: dict[str, Any], tmp_path: Path) -> None:
    file, sight = tmp_path / "preprocessor_config.json", CLIPVisionConfig(image_size=SIDE)
    usual = PLAIN_FILE | {"size": {"height": SIDE, "width": SIDE}}
    file.write_text(json.dumps(usual))
    assert processor_of(str(tmp_path), sight, "path:x").height == SIDE  # the control
    file.write_text(json.dumps(usual | more))
    with pytest.raises(ConfigError, match="asks for what is not known"):
        processor_of(str(tmp_path), sight, "path:x")


@pytest.mark.parametrize(
    "more",
    [
        {"do_normalize": "no"},
        {"do_resize": "no"},
        {"do_center_crop": []},
        {"do_rescale": "false"},
        {"do_flip_channel_order": True},
        {"do_pad": True},
        {"rescale_offset": True},
        {"crop_pct": 0.9},
        {"rescale_factor": float("nan")},
        {"rescale_factor": float("inf")},
        {"image_mean": [float("inf"), 0, 0]},
        {"image_std": [1e-300, 1, 1]},
        {"image_std": [float("nan"), 1, 1]},
        {"resample": 99},
        {"size": SIDE, "image_processor_type": "LevitImageProcessor"},
    ],
)
def test_a_file_that_asks_for_what_is_not_done_is_refused(more: dict[str, Any]) -> None:
    usual = PLAIN_FILE | {"size": {"height": SIDE, "width": SIDE}, "do_pad": False}
    sight = CLIPVisionConfig(image_size=SIDE)
    assert read_settings(usual, sight).height == SIDE  # the control
    with pytest.raises(ValueError, match=r"do_|_offset|crop_pct|image_|resc|resample|size"):
        read_settings(usual | more, sight)


def test_the_longest_picture_takes_no_memory_to_scale() -> None:
    """Adversary: whoever made it. What is longer is refused where it is read."""
    sight = processor(height=224, width=224, resize=(224,), resample=3)
    strip = np.zeros((1, MOST_RATIO, 3), dtype=np.uint8)
    assert sight([pack(strip)]).values.shape == (1, 3, 224, 224)
    with pytest.raises(UnreadableError, match="times as long"):
        from_array(np.zeros((1, MOST_RATIO + 1, 3), dtype=np.uint8).tolist())


def test_the_class_head_is_no_target(tmp_path: Path) -> None:
    """It is frozen; an adapter on it would be summed, and lie in no file that is read back."""
    directory = saved(tmp_path / "vit", FAMILIES["ViT"])
    known = [n for n, m in loaded(directory).model.named_modules() if isinstance(m, nn.Linear)]
    block = next(n for n in known if n != "classifier").rpartition(".")[2]
    for targets in (["classifier"], ["classifier", block]):
        found = loaded(directory)
        set_head(found.model, LABELS, 1)
        with pytest.raises(ConfigError, match="is the class head, which is frozen"):
            attach(found.model, rank=2, targets=targets)
    found = loaded(directory)
    set_head(found.model, LABELS, 1)
    names = full_layout(attach(found.model, rank=2, targets=[block])).names  # the control
    assert names
    assert all(f".{block}." in name for name in names)


def test_named_layers_of_the_last_blocks(directory: Path) -> None:
    found = loaded(directory)
    set_head(found.model, LABELS, 1)
    linear = [n for n, m in found.model.named_modules() if isinstance(m, nn.Linear)]
    block = next(n for n in reversed(linear) if n.partition(".")[0] != "classifier")
    short = block.rpartition(".")[2]
    names = full_layout(attach(found.model, rank=2, targets=[short], top_layers=1)).names
    assert names
    assert all(".layers.1." in n or ".layer.1." in n for n in names)
    assert all(f".{short}." in name for name in names)
    fresh = loaded(directory)
    set_head(fresh.model, LABELS, 1)
    first = next(n for n in linear if ".0." in n)
    with pytest.raises(ConfigError, match="none of the named layers"):
        attach(fresh.model, rank=2, targets=[first], top_layers=1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample": 3, "mean": (0.4,) * 3},
        {"resize": (12,), "resample": 3},
        {"resize": (11, 10)},
    ],
)
def test_inputs_are_those_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its processors are many; ours reads their files. Resized, cropped, scaled."""
    ours = processor(**settings)
    ours.save_pretrained(tmp_path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = np.random.default_rng(2).integers(0, 256, (20, 26, 3), dtype=np.uint8)
    found = ours([pack(pixels)]).inputs(torch.float32)
    wanted = theirs(pixels, return_tensors="pt")["pixel_values"]
    assert found.shape == wanted.shape == (1, 3, SIDE, SIDE)
    assert torch.allclose(found, wanted, atol=1e-5)
