"""Texts as vectors, and the models that may embed them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from securefedcollm.errors import ConfigError, DataError
from securefedcollm.tuning.embed import TextEncoder
from securefedcollm.tuning.models import load_model, save_model
from tests.support.models import llama, word_level

WORDS = ["<pad>", "<unk>", *(f"w{i}" for i in range(20))]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "causal"
    model = llama(len(WORDS), max_position_embeddings=32, pad_token_id=0)
    save_model(model, word_level(WORDS, pad_token="<pad>"), directory)
    return directory


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "bert"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
        save_model(BertModel(config), word_level(WORDS, pad_token="<pad>"), directory)
    return directory


def encoder_of(directory: Path, layer: int | None = None) -> TextEncoder:
    return TextEncoder(load_model(f"path:{directory}", part="body"), layer, "encoder")


@pytest.mark.parametrize("kind", ["causal", "bert"])
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_an_embedding_is_the_mean_of_the_texts_own_states(request, kind, layer):
    encoder = encoder_of(request.getfixturevalue(kind), layer)
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10"]
    found = encoder.embed(texts)
    assert (found.shape, found.dtype) == ((3, 16), np.float64)
    loaded = load_model(f"path:{request.getfixturevalue(kind)}", part="body")
    for text, row in zip(texts, found, strict=True):
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states
        own = states[-1 if layer is None else layer][0].mean(0).numpy()
        assert np.abs(row - own).max() < 1e-5


def test_a_body_has_one_digest_with_and_without_its_output_layer(causal, bert, tmp_path):
    whole = load_model(f"path:{causal}")
    body = load_model(f"path:{causal}", part="body")
    assert body.digest != whole.digest
    shutil.copytree(causal, tmp_path / "copy")
    again = load_model(f"path:{tmp_path / 'copy'}", sha256=body.digest, part="body")
    assert again.digest == body.digest
    with pytest.raises(ConfigError) as refused:
        load_model(f"path:{causal}", sha256=whole.digest, part="body")
    assert "--encoder" in refused.value.hint
    assert load_model(f"path:{bert}", part="body").model.pooler is None


def test_weights_that_are_not_there_are_refused(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "more")
    config = json.loads((bert / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "more" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"lack \d+ weights"):
        load_model(f"path:{tmp_path / 'more'}", part="body")


def test_faults_are_named_without_the_words(causal):
    encoder = encoder_of(causal)
    with pytest.raises(DataError, match="text 2: has no words") as refused:
        encoder.embed(["w1", "  "])
    assert "w1" not in str(refused.value)
    with pytest.raises(ConfigError, match="layer 3 of a model with 2"):
        encoder_of(causal, 3)


def test_a_long_text_is_cut_to_the_models_positions(causal):
    encoder = encoder_of(causal)
    long, cut = (" ".join(["w3"] * count) for count in (100, 32))
    assert np.array_equal(encoder.embed([long]), encoder.embed([cut]))
