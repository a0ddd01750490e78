"""A study to start from: a few choices, what follows from them, and defaults for the rest."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from securefedcollm.aggregation.header import MAX_SILOS
from securefedcollm.aggregation.steps import SchemeName
from securefedcollm.study.learning import VIRTUAL, VIRTUAL_TOKENS, RowKind

Unit = Literal["record", "subject", "silo"]
Method = Literal["ffa-lora", "rolora", "lora", "prompt", "prefix", "full"]

_RATES: Final = {"prompt": (2e-2, 2e-2), "prefix": (1e-1, 2e-2), "full": (1e-3, 1e-5)}
_LARGEST_BATCH: Final = 256
_LARGEST_JOINT_BATCH: Final = 512


class Choices(NamedTuple):
    """The choices that nobody can make for the participants."""

    name: str
    kind: RowKind
    labels: list[str]
    slm: dict[str, str]
    """``source`` and, for a hub model, ``revision``."""
    llm: dict[str, str] | None
    unit: Unit
    subject: str | None
    joint: bool
    scheme: SchemeName
    silos: int
    records: int
    """Approximate number of records (or subjects) of the smallest silo; the batch follows from
    it."""
    epsilon: float
    delta: float
    method: Method = "ffa-lora"


def starting_tree(chosen: Choices) -> dict[str, Any]:
    """The keys that such a study sets, in plain values; every other one has its default."""
    own = chosen.slm["source"].startswith(
        ("builtin:hospital-", "builtin:digits-", "builtin:wards-")
    )
    distributed = chosen.joint or chosen.unit == "silo"
    clip_norm = 1.0 if distributed else 8.0  # distributed noise grows with it
    task: dict[str, Any] = {"kind": chosen.kind}
    if own and chosen.kind == "multiple_choice":
        task["data"] = {"builtin": "hospitals"}
    if own and chosen.kind == "image_classification":
        task["data"] = {"builtin": "digits"}
    if own and chosen.kind == "audio_classification":
        task["data"] = {"builtin": "wards"}
        task["max_seconds"] = 0.8
    if "data" in task and chosen.unit != "subject":
        task["data"]["per_silo"] = chosen.records
    if chosen.labels:
        task["labels"] = chosen.labels
    privacy = {
        "epsilon": chosen.epsilon,
        "delta": chosen.delta,
        "unit": chosen.unit,
        "noise": "distributed" if distributed else "local",
        "clip_norm": 1.0,
    }
    if chosen.subject:
        privacy["subject"] = chosen.subject
    aggregation: dict[str, Any] = {
        "clip_norm": clip_norm,
        "scheme": "masking" if chosen.scheme == "masking" else "ckks",
    }
    if chosen.scheme == "ckks-authority":
        aggregation["key_model"] = "authority"
    if chosen.silos > MAX_SILOS:
        aggregation["graph"] = {"neighbours": None}  # as few as the bounds allow
    if chosen.joint:
        aggregation["value_bits"] = 20  # a sum of hundreds of gradients and noise needs the room
    tree = {
        "study": chosen.name,
        "rounds": 3,
        "task": task,
        "models": {"slm": chosen.slm} | ({"llm": chosen.llm} if chosen.llm else {}),
        "silos": {"count": chosen.silos, "colluders": 1},
        "local": _local(chosen, _rate(chosen.method, own)),
        "seed": 2026,
        "adapter": {"method": chosen.method, **_size(chosen.method)},
        "privacy": privacy,
        "aggregation": aggregation,
    }
    if chosen.llm:
        over = "all" if chosen.kind in {"instruction", "text"} else "choices"
        tree["distillation"] = {"loss": "entropy-pooled", "over": over, **_distilled(own)}
    return tree


def _size(method: Method) -> dict[str, Any]:
    if method == "full":
        return {}
    return {"virtual_tokens": VIRTUAL_TOKENS} if method in VIRTUAL else {"rank": 8, "alpha": 16}


def _rate(method: Method, own: bool) -> float:
    """Virtual tokens take larger steps than matrices, and whole models smaller ones.

    Of the built-in models: docs/results.md. Of others: what PEFT's own examples take, about.
    """
    built_in, other = _RATES.get(method, (1e-2, 2e-3))
    return built_in if own else other


def _distilled(own: bool) -> dict[str, Any]:
    """The server's phase, sized to the models. The defaults are for the built-in ones, of some
    100,000 weights; the others lie near those of the studies of larger models in ``configs/``."""
    if own:
        return {"steps": 40}
    return {
        "steps": 25,
        "batch_labelled": 16,
        "batch_unlabelled": 32,
        "learning_rate_slm": 1e-3,
        "learning_rate_llm": 1e-3,
    }


def _local(chosen: Choices, learning_rate: float) -> dict[str, Any]:
    local = {"steps": 20, "learning_rate": learning_rate}
    if not chosen.joint:
        return {**local, "batch_size": _tenth(chosen.records, _LARGEST_BATCH)}
    everybody = chosen.records * chosen.silos
    batch = _tenth(everybody, _LARGEST_JOINT_BATCH)
    return {**local, "batch_size": batch, "sampling_rate": float(f"{batch / everybody:.3g}")}


def _tenth(units: int, most: int) -> int:
    """A batch of a tenth of the records amplifies privacy well."""
    return max(1, min(most, units // 10))
