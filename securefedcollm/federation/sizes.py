"""The numbers of values and records of a study, and the cost of its ε, without torch or data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from securefedcollm.errors import ConfigError
from securefedcollm.privacy import planner
from securefedcollm.study import Study
from securefedcollm.study.config import PLACEMENTS

_SHAPE: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_SHAPES: Final = {
    "hospital-slm": (64, 192, 2, 4, 4, 432),
    "hospital-llm": (128, 384, 2, 4, 4, 432),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49_152),
    "smollm2-135m-18of30": (576, 1536, 18, 9, 3, 49_152),
}
BUILTIN_MODELS: Final[dict[str, dict[str, Any]]] = {
    name: dict(zip(_SHAPE, shape, strict=True)) | {"tie_word_embeddings": True}
    for name, shape in _SHAPES.items()
}
"""What matters of every built-in model's config.json."""
_ENCODERS: Final = {
    "digits-large": (64, 3),
    "digits-small": (32, 2),
    "wards-large": (64, 3),
    "wards-small": (32, 2),
}
"""Width and number of layers of the built-in classifiers."""
BUILTIN_RECORDS: Final = 3000
BUILTIN_SUBJECTS: Final = 752
CLASSIFIED_RECORDS: Final = 1000


def update_values(study: Study, data: Path | None) -> int:
    """d: values that a silo sends in a round (the larger of RoLoRA's two kinds of round).

    Raises:
        ConfigError: the SLM's shape is not known here; give --values.
    """
    kind, _, rest = study.models.slm.source.partition(":")
    if kind == "own":
        raise ConfigError(
            "only the silos' own code knows how many values it tunes",
            where="models.slm",
            hint="give --values N",
        )
    if kind == "builtin" and rest in _ENCODERS:
        return _encoder_values(*_ENCODERS[rest], study)
    if kind == "builtin" and rest in BUILTIN_MODELS:
        config = BUILTIN_MODELS[rest]
    elif kind == "path" and data is not None:
        config = _read(data / rest / "config.json")
    else:
        raise ConfigError(
            "the small model's shape is not known before it is loaded",
            where="models.slm",
            hint="give --values N (the size of an update), or --data DIR for a path: model",
        )
    return adapter_values(config, study)


def builtin_units(study: Study) -> int:
    """Units of a silo in an embedded world, where the study does not say how many records."""
    if study.task.senses:
        return CLASSIFIED_RECORDS if study.subject is None else _subjects(study)
    return BUILTIN_RECORDS if study.subject is None else BUILTIN_SUBJECTS


def _subjects(study: Study) -> int:
    """Subjects of the silo that has fewest."""
    from securefedcollm.federation.dealing import CLASSIFIED

    world = CLASSIFIED[study.task.data.builtin or ""](study.seed, study.silos.count)
    return min(world.subjects(silo, CLASSIFIED_RECORDS) for silo in range(study.silos.count))


def unit_records(study: Study) -> int:
    """Records, or subjects where they are the unit, of each simulated silo.

    Raises:
        ConfigError: the study does not say.
    """
    if study.task.kind == "own":
        return study.local.batch_size  # the unit is the silo: what it has counts for nothing
    if study.task.data.skew != 1:
        raise ConfigError(
            "with task.data.skew the silos have different numbers of records",
            where="task.data.skew",
            hint="give --records N: those of the smallest silo",
        )
    if study.task.data.builtin and study.task.data.per_silo is None:
        return builtin_units(study)
    if study.subject is not None:
        raise ConfigError(
            "a study does not say how many subjects a silo has",
            where="privacy.subject",
            hint=f"give --records N: different values of {study.subject!r} in the smallest silo",
        )
    if study.task.data.per_silo is None:
        raise ConfigError(
            "the study does not say how many records a silo has",
            where="task.data.per_silo",
            hint="give --records N: those of the smallest silo",
        )
    return study.task.data.per_silo


def adapter_values(config: dict[str, Any], study: Study) -> int:
    """Trained values of the study's adapter on a Llama-style model with this ``config.json``."""
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        groups = int(config.get("num_key_value_heads") or heads)
        width = int(config.get("head_dim") or hidden // heads)
        words = int(config["vocab_size"]) if study.adapter.method == "full" else 0
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            "the small model's config.json is not that of a Llama-style model",
            where="models.slm",
            hint="give --values N, the size of an update",
        ) from None
    if study.adapter.method == "prompt":
        return study.adapter.tokens * hidden
    if study.adapter.method == "prefix":
        return study.adapter.tokens * layers * 2 * groups * width
    shapes = {  # (in, out)
        "q_proj": (hidden, heads * width),
        "k_proj": (hidden, groups * width),
        "v_proj": (hidden, groups * width),
        "o_proj": (heads * width, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    if study.adapter.method == "full":
        return _all_weights(config, shapes, words)
    adapter = study.adapter
    chosen = [
        shape
        for name, shape in shapes.items()
        if adapter.targets == "all-linear" or name in adapter.targets
    ]
    layers = min(layers, study.top_layers(study.models.slm) or layers)
    sides = {
        "A": adapter.rank * layers * sum(given for given, _ in chosen),
        "B": adapter.rank * layers * sum(out for _, out in chosen),
    }
    if adapter.method == "lora":
        return sides["A"] + sides["B"]
    return max(sides.values()) if adapter.method == "rolora" else sides["B"]


def _encoder_values(width: int, layers: int, study: Study) -> int:
    """Trained values of an adapter on all linear layers of a built-in classifier.

    Raises:
        ConfigError: it is on some of them.
    """
    adapter = study.adapter
    if adapter.targets != "all-linear":
        raise ConfigError(
            "how many values an adapter on these layers has is not known before they are loaded",
            where="adapter.targets",
            hint="give --values N (`securefedcollm study estimate` says how many)",
        )
    layers = min(layers, study.top_layers(study.models.slm) or layers)
    # Query, key, value and output are square; the other two widen to three times and back.
    sides = {"A": (4 + 1 + 3) * width, "B": (4 + 3 + 1) * width}
    values = [adapter.rank * layers * side for side in sides.values()]
    return sum(values) if adapter.method == "lora" else max(values)


def _all_weights(config: dict[str, Any], shapes: dict[str, tuple[int, int]], words: int) -> int:
    """Weights of a Llama model with ``words`` tokens and these layers.

    Raises:
        ConfigError: it is a relative of Llama, which has more of them.
    """
    if config.get("model_type", "llama") != "llama" or any(
        config.get(key) for key in ("attention_bias", "mlp_bias")
    ):
        raise ConfigError(
            "how many weights the small model has does not follow from its config.json",
            where="models.slm",
            hint="give --values N (`securefedcollm study estimate` says how many)",
        )
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    tables = 1 if config.get("tie_word_embeddings") else 2
    layer = sum(given * out for given, out in shapes.values()) + 2 * hidden
    return tables * words * hidden + layers * layer + hidden


def federation_of(
    study: Study, *, records: int | None = None, values: int | None = None, data: Path | None = None
) -> planner.Federation:
    """The figures that the cost of an ε depends on.

    Args:
        records: of the smallest silo, subjects where they are the unit; default: the study's.
        values: numbers in an update; default: by the SLM's shape.
        data: directory of the study's ``path:`` models.

    Raises:
        ConfigError: the study does not say one of them.
    """
    adaptive = study.privacy.adaptive if study.privacy else None
    local, units, rate = study.local, records or unit_records(study), study.local.sampling_rate
    return planner.Federation(
        values=values or update_values(study, data),
        silos=study.silos.count,
        least_survivors=study.noise_shares(),
        colluders=study.silos.colluders,
        records=units,
        rounds=study.rounds,
        steps=local.steps or math.ceil((local.epochs or 0) * units / local.batch_size),
        # in joint DP-SGD the study gives the batch of all silos together
        batch_size=max(1, round(rate * units)) if rate else local.batch_size,
        unit="record" if study.subject is None else "subject",
        count_noise=adaptive.count_noise if adaptive else None,
        removes=bool(study.privacy and study.privacy.excess_noise == "remove"),
    )


def plans_of(
    study: Study, federation: planner.Federation, epsilon: Sequence[float] = ()
) -> list[planner.Plan]:
    """The noise that each ``epsilon`` costs, for every unit and placement; default: the study's ε.

    Raises:
        ConfigError: no ε is given and the study has none; or :func:`.planner.plan` refuses.
    """
    if study.privacy is None and not epsilon:
        raise ConfigError(
            "the study has no differential privacy",
            where="privacy",
            hint="add a privacy section, or give --epsilon to see what it would cost",
        )
    delta = study.privacy.delta if study.privacy else min(1e-5, 0.1 / federation.records)
    targets = epsilon or [study.privacy.epsilon if study.privacy else 0.0]
    own = study.task.kind == "own"

    def offered(unit: str, noise: str) -> bool:
        return (unit, noise) in PLACEMENTS and (unit == "silo" or not own)

    return [planner.plan(federation, target, delta, offered) for target in targets]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be read ({error})", where=str(path), hint="is --data the right directory?"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError("is not a model's config", where=str(path), hint="check models.slm")
    return found
