"""What a study will cost; only a ``config.json`` is downloaded for it.

The models are built on torch's meta device: every shape is real, no weight exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from securefedcollm.federation.tuned import adapted, part_of
from securefedcollm.privacy.counting import VALUES
from securefedcollm.study import Study
from securefedcollm.study.config import Model
from securefedcollm.tuning.adapters import full_layout, layout_of
from securefedcollm.tuning.classifiers import places_of
from securefedcollm.tuning.head import check_positions, sees, text_config
from securefedcollm.tuning.meta import meta_model
from securefedcollm.tuning.quantised import weights_bytes
from securefedcollm.tuning.sounds import RATE

_OPTIMIZER = 4 * 4  # bytes a trained value: itself, its gradient, Adam's two moments
_PER_RECORD = 4 + 8  # of a per-record gradient: float32 in torch, float64 where it is clipped


def estimate(study: Study, data: Path | None) -> dict[str, Any]:
    """Sizes of the models' adapters, bytes a round of one silo, and memory of both sides.

    ``memory_bytes`` covers weights, adapter, optimiser, per-record gradients and activations, but
    not the needs of library and allocator, nor the encoded records (small).

    Raises:
        ConfigError: own training; a model's ``config.json`` cannot be read; or the adapter does not
            fit.
    """
    _ = study.task.rows  # refuses own training
    llm = {} if study.models.llm is None else {"llm": _shape(study, study.models.llm, data)}
    slm = _shape(study, study.models.slm, data)
    sums = study.tuning_sums
    micro = min(study.local.micro_batch, study.local.batch_size)
    silo = slm["weights_bytes"] + slm["trained_values"] * _OPTIMIZER
    silo += micro * slm["activation_bytes_per_record"]
    if study.adapter.method == "full":  # the base stays beside, and one gradient is there at a time
        silo += slm["weights_bytes"]
    if study.privacy is not None and study.privacy.unit != "silo":
        silo += (
            (1 if study.adapter.method == "full" else micro) * slm["trained_values"] * _PER_RECORD
        )
    server = _server_bytes(study, llm, slm)
    asked = study.validation is not None
    return {
        **llm,
        "slm": slm,
        "bytes_up_per_round": sums * _upload(study, slm["update_values"])
        + asked * _upload(study, VALUES),
        # To train on, once a sum; to answer with, if it is asked; and what the round ended with.
        "bytes_down_per_round": (sums + asked + 1) * 4 * slm["broadcast_values"],
        "memory_bytes": {"silo": silo, "server": server},
    }


def _server_bytes(study: Study, llm: dict[str, Any], slm: dict[str, Any]) -> int:
    """Memory of the server: distillation holds both models, central steps the small one's rows."""
    micro, plan, parts = study.local.micro_batch, study.distillation, study.server
    distilled = min(micro, plan.batch_labelled + plan.batch_unlabelled) if llm else 0
    central = min(micro, parts.central.batch_size) if parts and parts.central else 0
    models = [(model, distilled) for model in llm.values()] + [(slm, max(distilled, central))]
    total = sum(
        model["weights_bytes"]
        + model["trained_values"] * _OPTIMIZER
        + batch * model["activation_bytes_per_record"]
        for model, batch in models
    )
    if parts and parts.outer:  # its memory, the mean, the step
        total += 4 * (slm["broadcast_values"] + 3 * slm["update_values"])
    return int(total)


def _shape(study: Study, spec: Model, data: Path | None) -> dict[str, Any]:
    model = meta_model(
        spec.source, revision=spec.revision, base_dir=data or Path(), part=part_of(study.task.kind)
    )
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    width = 4 if spec.dtype == "float32" else 2
    weights = weights_bytes(model, spec.quantization, width)  # before there is an adapter on it
    config = text_config(model)
    method = study.adapter.method
    if sees(model):
        model.heard = round(study.task.max_seconds * RATE)
    places = places_of(model) if sees(model) else 0
    tuned = adapted(model, study, spec)
    check_positions(tuned, study.task.max_tokens, spec.source)
    rounds = range(2 if method == "rolora" else 1)
    update = max(layout_of(tuned, method, round_).size for round_ in rounds)
    full = full_layout(tuned).size
    return {
        "source": spec.source,
        "parameters": parameters,
        "weights_bytes": weights,
        "adapter_values": full,
        "adapter_share": full / parameters,
        "trained_values": update,
        "update_values": update,
        "broadcast_values": update if method == "ffa-lora" else full,
        "activation_bytes_per_record": _activations(study, spec, config, width, places),
    }


def _activations(study: Study, spec: Model, config: Any, width: int, places: int) -> int:
    """Memory of one record of ``task.max_tokens``, or of a signal of ``places``, in bytes.

    Per layer s·h·(34 + 5·a·s/h) at two bytes a value (Korthikanti et al. 2022, arXiv 2205.05198,
    eq. 2; s tokens, h hidden, a heads), and the logits in float32. Layers below the adapted ones
    keep nothing. With checkpointing a layer keeps its input, and one layer at a time has the rest.
    """
    h = int(config.hidden_size)
    s = places or study.task.max_tokens + study.adapter.tokens
    a, layers = int(getattr(config, "num_attention_heads", 0)), int(config.num_hidden_layers)
    layers = min(layers, study.top_layers(spec) or layers)
    kept = layers * s * h * (34 + 5 * a * s / h) * width / 2
    if spec.checkpointing:
        kept = kept / layers + layers * s * h * width
    return int(kept + (0 if places else 4 * s * int(config.vocab_size)))


def _upload(study: Study, values: int) -> int:
    """Bytes of one silo's protected vector; keys and shares (a few kB a silo) not counted."""
    ring = study.ring
    if ring is None:
        return 8 * -(-values // study.field.per_word)
    shape = ring.shape(values, study.silos.colluders)
    return int(4096 * ring.value_bytes * (shape.keys + 2 * shape.chunks + shape.groups))
