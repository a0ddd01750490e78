"""Texts as vectors: the mean of a model's hidden states over the tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from securefedcollm.errors import ConfigError, DataError
from securefedcollm.retrieval.terms import MOST_TOKENS
from securefedcollm.tuning.head import check_vocabulary, device_of, text_config
from securefedcollm.tuning.models import LoadedModel
from securefedcollm.tuning.recipe import Progress, inference_mode, quiet_transformers, silent

Vectors = npt.NDArray[np.float64]

_PASS_TOKENS: Final = 8192
"""Padding included: the memory of one pass."""


def encodes(text: str) -> bool:
    """Whether it is valid Unicode.

    Adversary: whoever wrote the text. Python makes a lone surrogate of a byte of an argument that
    is not UTF-8, and tokenizers then raise anything.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class TextEncoder:
    """Embeds texts with the body of a model. Texts are cut to 512 tokens, and to its positions.

    Args:
        loaded: as ``load_model(…, part="body")`` gives it.
        layer: whose output is averaged: 0, the token embeddings; None, the last.
        source: names the model in errors.

    Raises:
        ConfigError: the model has no such layer, or is an encoder and a decoder in one.
    """

    def __init__(self, loaded: LoadedModel, layer: int | None = None, source: str = "") -> None:
        config = text_config(loaded.model)
        layers = int(config.num_hidden_layers)
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                "has an encoder and a decoder",
                where=source,
                hint="choose a causal language model or an encoder",
            )
        if layer is not None and not 0 <= layer <= layers:
            raise ConfigError(
                f"layer {layer} of a model with {layers}", where=source, hint=f"0 to {layers}"
            )
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._at = layers if layer is None else layer
        self._source = source
        self.layer = layer
        self.digest = loaded.digest
        """The model's: what ``retrieval.encoder.sha256`` pins, 64 hexadecimal digits."""

    @property
    def width(self) -> int:
        """D, numbers in an embedding: of the first token's. A layer may have another width than
        the model's configuration says."""
        return len(self._means([[0]])[0])

    def embed(self, texts: Sequence[str], progress: Progress = silent) -> Vectors:
        """One row for each text, in order: float64 [n, D], not scaled.

        Raises:
            DataError: a text is not valid Unicode or has no tokens; names its number, from 1, and
                never its words.
        """
        with quiet_transformers():
            rows = [self._tokens(text, at) for at, text in enumerate(texts, start=1)]
        order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
        found: dict[int, npt.NDArray[np.float32]] = {}
        while len(found) < len(rows):
            batch = self._batch(rows, order[len(found) :])
            means = self._means([rows[at] for at in batch])
            found.update(zip(batch, means, strict=True))
            progress(len(found), len(rows), "embedding")
        return np.array([found[at] for at in range(len(rows))], dtype=np.float64)

    def _tokens(self, text: str, at: int) -> list[int]:
        positions = getattr(text_config(self._model), "max_position_embeddings", None)
        most = min(MOST_TOKENS, positions or MOST_TOKENS)
        if not encodes(text):
            raise DataError("is not valid Unicode", where=f"text {at}", hint="mend or leave it out")
        asked = self._tokenizer(text, truncation=True, max_length=most)
        ids: list[int] = list(asked["input_ids"])
        if not ids:
            raise DataError(
                "has no words that the encoder knows", where=f"text {at}", hint="leave it out"
            )
        return ids

    @staticmethod
    def _batch(rows: Sequence[Sequence[int]], waiting: Sequence[int]) -> list[int]:
        """The first of ``waiting``, by length, that fit one pass: at least one."""
        batch: list[int] = []
        for at in waiting:
            if batch and (len(batch) + 1) * len(rows[at]) > _PASS_TOKENS:
                break
            batch.append(at)
        return batch

    def _means(self, batch: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        longest = max(map(len, batch))
        pad = self._tokenizer.pad_token_id or 0
        device = device_of(self._model)
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in batch], device=device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in batch], device=device
        )
        check_vocabulary(self._model, self._tokenizer, ids)
        with inference_mode(self._model):
            out: Any = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            states = out.hidden_states[self._at].float()
            weights = mask[..., None].float()
            means = (states * weights).sum(1) / weights.sum(1)
        array: npt.NDArray[np.float32] = means.cpu().numpy()
        if not np.isfinite(array).all():
            raise ConfigError(
                "computes values that are not finite", where=self._source, hint="choose another"
            )
        return array
