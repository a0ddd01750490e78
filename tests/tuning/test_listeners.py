"""Classifiers of recordings: real families by path, their heads, and records that stay apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from securefedcollm_cli.main import app
from transformers import (
    AutoFeatureExtractor,
    HubertConfig,
    HubertForSequenceClassification,
    WhisperConfig,
)
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.adapters import attach, full_layout, layout_of, select
from securefedcollm.tuning.audio_processor import processor_of, read_settings
from securefedcollm.tuning.classifiers import head_of, own_labels, places_of, set_head
from securefedcollm.tuning.independence import made_up_adapter
from securefedcollm.tuning.local import check_records
from securefedcollm.tuning.models import hearing, load_model
from securefedcollm.tuning.per_record import question_losses
from securefedcollm.tuning.questions import PLAIN, EncodedQuestions, choice_scores, encode
from securefedcollm.tuning.recipe import evaluation_mode, training_mode
from securefedcollm.tuning.signals import Signal
from securefedcollm.tuning.sounds import LEAST, pack
from tests.support.signals import LABELS, LOSS, gradients_and_control
from tests.support.sounds import (
    BINS,
    FAMILIES,
    HEADLESS,
    PROCESSORS,
    SECONDS,
    SHAPE,
    WAVES,
    noise,
    saved,
    spoken,
)


@pytest.fixture(scope="module", params=list(FAMILIES))
def directory(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = request.param
    return saved(tmp_path_factory.mktemp("family"), family, FAMILIES[family])


def loaded(directory: Path, seconds: float = 2 * SECONDS) -> Any:
    return hearing(load_model(f"path:{directory}", part="audio"), seconds)


def encoded(count: int, tokenizer: Any, seed: int = 0) -> EncodedQuestions:
    return encode(noise(count, seed), tokenizer, 1, "audio_classification")


def test_a_family_scores_its_classes_as_transformers_does(directory: Path) -> None:
    found = loaded(directory)
    data = encoded(3, found.tokenizer)
    assert data.signal is not None
    given = {found.model.main_input_name: data.signal.inputs(torch.float32)}
    with torch.no_grad():
        ours = choice_scores(found.model, data)
        seen: list[int] = []
        attention = next(m for n, m in found.model.named_modules() if n.endswith("q_proj"))
        attention.register_forward_hook(lambda module, x, out: seen.append(out.shape[1]))
        theirs = found.model(**given).logits.log_softmax(-1)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert theirs.std() > 0.01  # it does listen
    assert seen == [places_of(found.model)]
    assert own_labels(found.model) == list(LABELS)
    assert loaded(directory, 1.0).digest == found.digest  # the study's length is no part of it


def test_every_record_has_its_own_gradient_and_no_company_moves_it(directory: Path) -> None:
    """To the bit, whatever the others' lengths. Control: without the mean of a batch."""
    found = loaded(directory)
    set_head(found.model, LABELS, 7)
    model = attach(found.model, rank=2, seed=7)
    check_records(model, LOSS)
    data, layout = encoded(6, found.tokenizer), layout_of(model, "ffa-lora")
    assert all(".lora_B." in name and "classifier" not in name for name in layout.names)
    parameters = select(model, layout)
    with made_up_adapter(model, 0.3), evaluation_mode(model):
        (alone, apart), (together, coupled) = (
            gradients_and_control(model, data.select(torch.arange(count)), Centred)
            for count in (2, 6)
        )
        losses = question_losses(model, data.select(torch.tensor([1])), "answer", PLAIN)
        wanted = torch.autograd.grad(losses.sum(), parameters)
    assert np.array_equal(alone, together[:2])
    flat = torch.cat([gradient.flatten() for gradient in wanted]).numpy()
    assert np.allclose(alone[1], flat, atol=1e-4 * np.abs(flat).max())
    assert np.abs(alone).max() > 1e-4
    assert not np.allclose(apart, coupled[:2], rtol=1e-2)


class Centred(EncodedQuestions):
    """Without the mean of a batch, as by a batch normalisation before the model."""

    def select(self, index: torch.Tensor) -> EncodedQuestions:
        batch = super().select(index)
        assert batch.signal is not None
        values = batch.signal.values
        centred = values - values.mean(0)
        return replace(batch, signal=Signal(centred, batch.signal.scale, batch.signal.shift))


def test_an_adapter_on_the_last_layer_alone(directory: Path) -> None:
    found = loaded(directory)
    set_head(found.model, LABELS, 1)
    names = full_layout(attach(found.model, rank=2, top_layers=1)).names
    assert names
    assert all(".layers.1." in name or ".layer.1." in name for name in names)


@pytest.mark.parametrize("family", ["Wav2Vec2", "Whisper"])
def test_nothing_is_left_out_by_chance_in_training(family: str, tmp_path: Path) -> None:
    """LayerDrop and SpecAugment draw for a whole batch. Control: the library's own model."""
    found = loaded(saved(tmp_path / "model", family, FAMILIES[family]))
    theirs = type(found.model).from_pretrained(tmp_path / "model")
    for model in (found.model, theirs):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "activation_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    signal = encoded(8, found.tokenizer).signal
    assert signal is not None
    given = {found.model.main_input_name: signal.inputs(torch.float32)}
    outs = {}
    for name, model in {"ours": found.model, "theirs": theirs}.items():
        with torch.no_grad():
            with training_mode(model, seed=1):
                trained = model(**given).logits
            with evaluation_mode(model):
                outs[name] = trained - model(**given).logits
    assert outs["ours"].abs().max() < 1e-5
    assert outs["theirs"].abs().max() > 1e-3


@pytest.mark.parametrize("family", HEADLESS)
def test_a_model_without_a_head_gets_one_from_the_seed(family: str, tmp_path: Path) -> None:
    """The library would fill in random numbers, and the digest would never be the same."""
    directory = saved(tmp_path / "bare", family, HEADLESS[family])
    found = loaded(directory)
    assert loaded(directory).digest == found.digest
    assert own_labels(found.model) == []
    assert not set_head(found.model, LABELS, 3)
    head = head_of(found.model)
    assert head.in_features == SHAPE["hidden_size"]
    assert torch.allclose(head.weight @ head.weight.T, torch.eye(3), atol=1e-6)
    again = loaded(directory).model
    set_head(again, LABELS, 3)
    data = encoded(2, found.tokenizer)
    with torch.no_grad():
        assert torch.equal(choice_scores(found.model, data), choice_scores(again, data))


def test_batch_normalisation_is_refused_by_name(tmp_path: Path) -> None:
    config = HubertConfig(**SHAPE, **WAVES, conv_pos_batch_norm=True, num_labels=3)
    directory = saved(tmp_path / "h", "HuBERT", lambda: HubertForSequenceClassification(config))
    with pytest.raises(ConfigError, match=r"its layer hubert\.\S+ is a batch normalisation"):
        loaded(directory)


def test_another_processor_is_another_model(tmp_path: Path) -> None:
    directory = saved(tmp_path / "ast", "AST", FAMILIES["AST"])
    digest = loaded(directory).digest
    replace(PROCESSORS["AST"], mean=-4.1).save_pretrained(directory)
    assert loaded(directory).digest != digest
    with pytest.raises(ConfigError, match="the study pins"):
        load_model(f"path:{directory}", part="audio", sha256=digest)
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"its preprocessor_config.json cannot be read"):
        loaded(directory)


def test_the_command_line_prints_the_digest(tmp_path: Path) -> None:
    directory = saved(tmp_path / "ast", "AST", FAMILIES["AST"])
    words = ["model", "digest", f"path:{directory}", "--audio"]
    result = CliRunner().invoke(app, words)
    assert result.stdout.strip() == loaded(directory).digest
    assert CliRunner().invoke(app, [*words, "--images"]).exit_code != 0


@pytest.mark.parametrize(
    ("source", "part", "what"),
    [
        ("wards-small", "causal", "classifies recordings"),
        ("wards-small", "image", "classifies recordings"),
        ("digits-small", "audio", "classifies pictures"),
        ("hospital-slm", "audio", "reads text"),
    ],
)
def test_a_built_in_model_of_another_kind_is_refused(source: str, part: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_model(f"builtin:{source}", part=part)


@pytest.mark.parametrize("family", PROCESSORS)
def test_inputs_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Of a short recording, and of a long one. With a mask: without one, the scale of a record
    depends there on the longest that is beside it."""
    ours = PROCESSORS[family].hearing(1.0)
    ours.save_pretrained(tmp_path)
    theirs = AutoFeatureExtractor.from_pretrained(tmp_path, return_attention_mask=True)
    sounds = [spoken(1, 5000), spoken(2, 16000)]
    given = [sound.astype(np.float32) / 32768 for sound in sounds]
    more = {"padding": True} if family in {"Wav2Vec2", "HuBERT"} else {}
    wanted = theirs(given, sampling_rate=16_000, return_tensors="pt", **more)
    found = ours([pack(sound) for sound in sounds]).inputs(torch.float32)
    (wanted,) = (value for name, value in wanted.items() if name.startswith("input_"))
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("family", PROCESSORS)
def test_no_recordings_input_depends_on_its_company(family: str) -> None:
    """To the bit: silence follows up to one length for all, whatever the others' lengths."""
    processor = PROCESSORS[family].hearing(2 * SECONDS)
    short, long = pack(spoken(1)), pack(spoken(2, 9 * LEAST))
    alone, together = processor([short]).values, processor([long, short]).values
    assert torch.equal(alone[0], together[1])
    cut = processor([pack(spoken(2, 9 * LEAST)[: 2 * LEAST])]).values
    assert torch.equal(cut[0], together[0])


WHISPERED = WhisperConfig(num_mel_bins=BINS, max_source_positions=50)


@pytest.mark.parametrize(
    "more",
    [
        {"sampling_rate": 8000},
        {"dither": 0.1},
        {"hop_length": 80},
        {"n_fft": 512},
        {"do_normalize": True},
        {"chunk_length": 30},
        {"feature_size": 80},
        {"padding_value": 1.0},
        {"feature_extractor_type": "EncodecFeatureExtractor"},
    ],
)
def test_a_file_that_asks_for_what_is_not_done_is_refused(
    more: dict[str, Any], tmp_path: Path
) -> None:
    PROCESSORS["Whisper"].save_pretrained(tmp_path)
    usual = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert read_settings(usual, WHISPERED) == PROCESSORS["Whisper"]  # the control
    with pytest.raises(ValueError, match=r"rate|dither|hop|n_fft|normal|inputs|padding|Encodec"):
        read_settings(usual | more, WHISPERED)


@pytest.mark.parametrize(
    "more",
    [
        {"mean": float("nan")},
        {"mean": 10**400},
        {"std": 0.0},
        {"std": float("inf")},
        {"max_length": 9},
        {"max_length": float("inf")},
        {"max_length": 10**400},
        {"do_normalize": "no"},
    ],
)
def test_numbers_out_of_bounds_are_refused(more: dict[str, Any], tmp_path: Path) -> None:
    PROCESSORS["AST"].save_pretrained(tmp_path)
    usual = json.loads((tmp_path / "preprocessor_config.json").read_text())
    config = FAMILIES["AST"]().config
    assert processor_of(str(tmp_path), config, "path:x") == PROCESSORS["AST"]  # the control
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(usual | more))
    with pytest.raises(ConfigError, match=r"mean|inputs|float|normal"):
        processor_of(str(tmp_path), config, "path:x")
