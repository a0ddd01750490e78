"""Inversion audit: which words of its records does a silo's update give away?

The span check of DAGER (Petrov et al., "DAGER: exact gradient inversion for large language models",
2024): the gradient of a first-layer adapter matrix is Σ_t gₜ xₜᵀ over the tokens of the batch, so
its row space is spanned by these tokens' inputs, and in a model with rotary positions a token's
input to the first layer depends on nothing but the token. An attacker with the gradient tries the
whole vocabulary. The audit raises the adapter's rank to the model's width, the attacker's best
case.

The same small batches are attacked at four places: the raw update of one silo; what the server
receives of it under the masks; the opened sum; the opened sum with the study's noise. The control
is what could be guessed without any update: the words found, compared with the *other* batches.

Imports torch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from securefedcollm.aggregation.header import RingParameters
from securefedcollm.aggregation.masking.upload import HEAD_BYTES
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import ConfigError
from securefedcollm.federation.cotuning import planned_event
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.plan import joint_step, quantiser, silo_unit
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.study import Study
from securefedcollm.tuning.adapters import AdapterLayout, load_vector
from securefedcollm.tuning.local import sampled_gradients, train_dp, train_plain
from securefedcollm.tuning.per_record import watched
from securefedcollm.tuning.plans import LossPlan, Protection, TrainPlan
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions
from securefedcollm_audits.privacy.canaries import masked_sum, seats_of
from securefedcollm_audits.privacy.finding import Finding
from securefedcollm_audits.protocol.cohort import Vector

BATCHES: Final = 20
RECORDS: Final = 2
PLACES: Final = ("raw update", "masked upload", "opened sum", "noised sum")
_PROMISED: Final = ("masked upload", "noised sum")
ERROR: Final = 1e-3
_PERMUTATIONS: Final = 20_000
_MATRIX: Final = ".layers.0.self_attn.v_proj."

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Look(NamedTuple):
    """One batch at one place: bool [V] its tokens, float64 [V] two scores of every token."""

    truth: Flags
    span: Floats
    energy: Floats


class Row(NamedTuple):
    """What was recovered at one place, over all batches."""

    recovered: float
    """Share of the batch's tokens among as many best-scored ones."""
    chance: float
    """The same against other batches' tokens."""
    p_value: float


def audit(
    study: Study,
    *,
    data: Path | None = None,
    batches: int = BATCHES,
    records: int = RECORDS,
    seed: int | None = None,
    progress: Progress = silent,
) -> Finding:
    """Invert the updates of ``batches`` steps on ``records`` records a silo each.

    Raises:
        ConfigError: the small model is not one whose first layer shows its tokens.
    """
    attack = _Attack(study, data, records, seed)
    looks: dict[str, list[Look]] = {place: [] for place in PLACES}
    for done in range(batches):
        for place, look in attack.batch().items():
            looks[place].append(look)
        progress(done + 1, batches, "batches inverted")
    draw = np.random.default_rng(seed)
    rows = {place: judge(found, draw) for place, found in looks.items() if found}
    faults = [
        f"{100 * rows[place].recovered:.0f} % of the words are recovered from the {place}, "
        f"{100 * rows[place].chance:.0f} % by chance"
        for place in _PROMISED
        if place in rows and rows[place].p_value <= ERROR / 2
    ]
    figures = {"records": float(records), "batches": float(batches)}
    for place, row in rows.items():
        figures |= {place: row.recovered, f"{place}, by chance": row.chance}
        figures[f"{place}, p"] = row.p_value
    return Finding(
        audit="inversion",
        study=study,
        setting=f"{batches} steps on {records} records in each of {study.silos.count} silos, "
        f"adapter of rank {attack.rank}",
        claimed=None,
        bound=None,
        delta=study.privacy.delta if study.privacy else 1e-5,
        faults=faults,
        figures=figures,
    )


class _Attack:
    """The attacked silos, and the server that attacks."""

    def __init__(self, study: Study, data: Path | None, records: int, seed: int | None) -> None:
        self._tuned = _full_rank(study, data)
        self.rank = self._tuned.study.adapter.rank
        self._study = study
        self._records = records
        self._draw = random.Random(seed)  # noqa: S311 - chooses records
        self._silos = deal(study, data).silos
        self._layout = self._tuned.update_layout(0)
        self._loss = LossPlan(kind=study.local.loss, scoring=self._tuned.scoring)
        self._start = np.zeros(self._layout.size, dtype=np.float32)
        self._known = _inputs(self._tuned, self._layout)
        self._telling = self._telling_tokens()
        self._protect = self._noising()

    def batch(self) -> dict[str, Look]:
        """One step of all silos, seen at every place."""
        taken = {n: self._draw.sample(list(qs), self._records) for n, qs in self._silos.items()}
        encoded = {name: self._tuned.encode(questions) for name, questions in taken.items()}
        tokens = {name: self._tokens(data) for name, data in encoded.items()}
        victim, everybody = next(iter(tokens)), np.any(list(tokens.values()), axis=0)
        raw = {name: self._raw(data) for name, data in encoded.items()}
        encoder = quantiser(self._study, self._layout.size)
        plain = {name: encoder.encode(update).integers for name, update in raw.items()}
        upload, total = self._sum(plain, self._study.field.bound)
        found = {
            "raw update": self._look(raw[victim], tokens[victim], 0.0),
            "masked upload": self._look(upload, tokens[victim], 0.0),
            "opened sum": self._look(total, everybody, np.sqrt(len(plain) / 12.0)),
        }
        if self._protect is not None:
            noised = {name: self._protect(data) for name, data in encoded.items()}
            _, total = self._sum(noised, self._study.field.bound)
            found["noised sum"] = self._look(total, everybody, np.sqrt(len(plain) / 12.0))
        return found

    def _raw(self, data: EncodedQuestions) -> npt.NDArray[np.float32]:
        load_vector(self._tuned.model, self._layout, self._start)
        plan = self._one_step(data)
        return train_plain(self._tuned.model, self._layout, data, plan, seed=0).delta

    def _one_step(self, data: EncodedQuestions) -> TrainPlan:
        """SGD of rate 1 on all of ``data``: the update is the negative gradient."""
        return TrainPlan(
            steps=1, batch_size=len(data), learning_rate=1.0, optimizer="sgd", loss=self._loss
        )

    def _noising(self) -> Callable[[EncodedQuestions], Vector] | None:
        """A silo's noised integers for a batch, by the study's own mechanism."""
        study, size = self._study, self._layout.size
        privacy = study.privacy
        if privacy is None:
            return None
        unit = silo_unit(study, lambda round_: size, 0)
        if unit is not None:
            return lambda data: unit.protect(self._raw(data), NoiseSource())
        step = joint_step(study, size)
        if step is not None:
            return lambda data: step.protect(self._gradients(data), NoiseSource())
        event = planned_event(study, next(iter(self._silos.values())))
        protection = Protection(
            noise_multiplier=event.noise_multiplier, clip_norm=privacy.clip_norm
        )
        encoder = quantiser(study, size)

        def by_dp_sgd(data: EncodedQuestions) -> Vector:
            load_vector(self._tuned.model, self._layout, self._start)
            update = train_dp(
                self._tuned.model,
                self._layout,
                data,
                self._one_step(data),
                protection,
                noise=NoiseSource(),
            ).delta
            return encoder.encode(update).integers

        return by_dp_sgd

    def _gradients(self, data: EncodedQuestions) -> list[Floats]:
        load_vector(self._tuned.model, self._layout, self._start)
        found = sampled_gradients(
            self._tuned.model, self._layout, data, self._loss, q=1.0, noise=NoiseSource()
        )
        return list(found)

    def _sum(self, vectors: dict[str, Vector], bound: int) -> tuple[Floats, Floats]:
        """(the first silo's upload, the opened sum) of a real round, as numbers [d]."""
        seen: dict[str, bytes] = {}
        cohort = seats_of(self._study).cohort(self._layout.size, bound)
        cohort.vectors = dict(zip(cohort.names, vectors.values(), strict=True))

        def watch(step: Step, name: str, frame: bytes) -> None:
            if step is Step.UPLOAD:
                seen[name] = frame

        total = masked_sum(cohort, cohort.names, watch)
        upload = _fields(seen[cohort.names[0]], cohort.header.parameters)
        return upload, total.astype(np.float64)

    def _look(self, update: npt.NDArray[np.generic], truth: Flags, rounding: float) -> Look:
        names, shapes = self._layout.names, self._layout.shapes
        index = next(i for i, name in enumerate(names) if _MATRIX in name)
        start = AdapterLayout(names[:index], shapes[:index]).size
        size = AdapterLayout(names[index : index + 1], shapes[index : index + 1]).size
        matrix = update[start : start + size].astype(np.float64).reshape(shapes[index])
        span, energy = token_scores(matrix, self._known, rounding)
        hidden = np.where(self._telling, 0.0, -np.inf)
        return Look(truth & self._telling, span + hidden, energy + hidden)

    def _tokens(self, data: EncodedQuestions) -> Flags:
        """bool [V]: the tokens of these questions' prompts."""
        present = np.zeros(len(self._known), dtype=np.bool_)
        present[data.tokens[data.segments == 0].numpy()] = True
        return present

    def _telling_tokens(self) -> Flags:
        """Tokens that fewer than half of the records have. Everybody can guess the others."""
        seen: Counter[int] = Counter()
        questions: list[Question] = [q for qs in self._silos.values() for q in qs]
        for row in torch.split(torch.arange(len(questions)), 1000):
            part = self._tuned.encode([questions[i] for i in row.tolist()])
            for tokens, segments in zip(part.tokens, part.segments, strict=True):
                seen.update(set(tokens[segments == 0].tolist()))
        often = [token for token, count in seen.items() if 2 * count >= len(questions)]
        telling = np.ones(len(self._known), dtype=np.bool_)
        telling[often] = False
        return telling


def _full_rank(study: Study, data: Path | None) -> Tuned:
    """The study's small model with an adapter as wide as itself.

    Raises:
        ConfigError: its first layer does not show single tokens, or the study tunes virtual ones
            or all weights.
    """
    if study.task.senses:
        raise ConfigError(
            "the attack reads words off the gradients; this study has pictures or recordings",
            where="task.kind",
            hint="`audit one-run`, `mechanism` and `coupling` take this one",
        )
    if study.adapter.tokens or study.adapter.method == "full":
        raise ConfigError(
            "the attack reads words off the gradients of low-rank matrices; this study has none",
            where="adapter.method",
            hint="attack a study with ffa-lora; `audit one-run` and `coupling` take this one",
        )
    narrow = Tuned.load(study, study.models.slm, data=data)
    width = int(narrow.model.config.hidden_size)
    adapter = msgspec.structs.replace(
        study.adapter, method="ffa-lora", rank=width, dropout=0.0, top_layers=None, layout=None
    )
    slm = msgspec.structs.replace(study.models.slm, top_layers=None)
    tuned = Tuned.load(msgspec.structs.replace(study, adapter=adapter), slm, data=data)
    rotary = any(name.endswith("rotary_emb") for name, _ in tuned.model.named_modules())
    if not rotary or not any(_MATRIX in name for name in tuned.update_layout(0).names):
        raise ConfigError(
            "the attack is for models with rotary positions and an adapted v_proj",
            where="models.slm",
            hint="the built-in models, Llama, SmolLM2, Qwen … have both; see adapter.targets",
        )
    return tuned


def _inputs(tuned: Tuned, layout: AdapterLayout) -> Floats:
    """Every vocabulary token's input to the attacked matrix: float64 [V, r]."""
    model = tuned.model
    load_vector(model, layout, np.zeros(layout.size, dtype=np.float32))
    weights = {name.replace(".default.", "."): p for name, p in model.named_parameters()}
    weight = next(p for name, p in weights.items() if _MATRIX in name and ".lora_B." in name)
    count = model.get_input_embeddings().num_embeddings
    found = []
    model.eval()
    with watched(model) as calls:
        for tokens in torch.split(torch.arange(count), 512):
            model(input_ids=tokens[:, None], use_cache=False)
            given = next(call.given for call in calls if call.weight is weight)
            assert given is not None  # a linear layer's
            found.append(given[:, 0].double().numpy())
            calls.clear()
    return np.concatenate(found)


def _fields(upload: bytes, parameters: RingParameters) -> Floats:
    """A masked upload's fields, as if it were not masked: float64 [d]."""
    words = np.frombuffer(upload, dtype="<u8", offset=HEAD_BYTES)
    bits = parameters.field_bits
    shifts = [np.uint64(bits * field) for field in range(64 // bits)]
    low = np.uint64(2**bits - 1)
    fields = np.concatenate([(words >> shift) & low for shift in shifts])
    return fields[: parameters.values].astype(np.float64) - parameters.bound


def token_scores(matrix: Floats, inputs: Floats, rounding: float) -> tuple[Floats, Floats]:
    """How well each token fits the gradient [out, r]: by the span check, and by its energy.

    Args:
        inputs: float64 [V, r].
        rounding: standard deviation of the rounding in every entry.
    """
    directions = inputs / np.maximum(np.linalg.norm(inputs, axis=1, keepdims=True), 1e-30)
    _, sizes, rows = np.linalg.svd(matrix, full_matrices=False)
    cutoff = max(1e-5 * sizes[0], 1.1 * rounding * (np.sqrt(len(matrix)) + np.sqrt(len(sizes))))
    kept = rows[sizes > cutoff]
    span: Floats = np.linalg.norm(directions @ kept.T, axis=1)  # 1: inside the span
    energy: Floats = np.linalg.norm(directions @ matrix.T, axis=1)
    return span, energy


def judge(looks: Sequence[Look], draw: np.random.Generator) -> Row:
    """The better of the two attacks, with the p-value of both (Bonferroni)."""
    rows = [
        _row(np.array([[_share(getattr(a, kind), b.truth) for b in looks] for a in looks]), draw)
        for kind in ("span", "energy")
    ]
    best = max(rows, key=lambda row: row.recovered - row.chance)
    return best._replace(p_value=min(1.0, 2.0 * min(row.p_value for row in rows)))


def _share(scores: Floats, truth: Flags) -> float:
    count = int(truth.sum())
    if not count:
        return 0.0
    best = np.argpartition(scores, -count)[-count:]
    return float(truth[best].mean())


def _row(shares: Floats, draw: np.random.Generator) -> Row:
    """``shares``: [attacked batch, batch whose tokens are looked for]. A permutation test: if the
    update says nothing, its own batch fits no better than the others."""
    count = len(shares)
    own = float(np.trace(shares)) / count
    if count < 2:
        return Row(own, own, 1.0)
    others = float(shares.sum() - np.trace(shares)) / (count * (count - 1))
    orders = draw.permuted(np.tile(np.arange(count), (_PERMUTATIONS, 1)), axis=1)
    means = shares[np.arange(count), orders].mean(axis=1)
    reached = int((means >= own - 1e-12).sum())
    return Row(own, others, (1 + reached) / (1 + _PERMUTATIONS))
