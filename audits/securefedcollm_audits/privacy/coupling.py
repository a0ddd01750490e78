"""Coupling audit: does one record change the others' contribution, by a single bit?

Adversary: the server. It chooses the adapter at which a silo takes its gradients, and knows all
records except one. DP-SGD is charged as if that record moved the sum by its own clipped gradient.
If its presence also moves the last bits of the others' gradients (by padding, by the order of
additions that a kernel chooses), an adapter can amplify that to many clip norms.

The audit searches for the adapter that amplifies most. The positive control is how much an added
unit moves the others where micro-batches are padded to their longest record, as in most programs.
Pictures have one size, and recordings are followed by silence up to one length for all. Their
control makes the last pass as large as there are records left: by one more record it grows, a
kernel adds up in another order, and last bits move. Then it applies the same adapters to the
product's own path, frozen layers and priors included, and computes ‖S(D + x) − S(D) − S(x)‖ in
exact integers. The answer has to be 0.

Imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from securefedcollm.errors import ConfigError
from securefedcollm.federation.cotuning import by_unit
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.recipes import loss_plan
from securefedcollm.federation.tuned import Tuned
from securefedcollm.federation.workload import Progress, Vector, silent
from securefedcollm.privacy.noise import GridSum, NoiseSource, grid_step
from securefedcollm.study import Study
from securefedcollm.study.config import Privacy
from securefedcollm.tuning.adapters import (
    PROMPT,
    AdapterLayout,
    load_vector,
    select,
    to_vector,
)
from securefedcollm.tuning.independence import refuse_coupling
from securefedcollm.tuning.local import members_of, records_of, sum_clipped
from securefedcollm.tuning.media import medium_of
from securefedcollm.tuning.passes import Indices, Widths
from securefedcollm.tuning.per_record import (
    Records,
    per_record_gradients,
    question_losses,
    watched,
    without_broken,
)
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions, sorted_by_length
from securefedcollm.tuning.recipe import evaluation_mode
from securefedcollm.tuning.whole import WholeModel
from securefedcollm_audits.privacy.finding import Finding

ADAPTERS: Final = 40
RECORDS: Final = 64
_WORST: Final = 3  # adapters that are tried on the product's own path
_FIRST: Final = (1e2, 1e4, 1e6, 1e8, 1e12)
_SECOND: Final = (1.0, 1e2, 1e4, 1e8, 1e16, 1e22)
_PARTS: Final = 16  # of the numbers of a virtual token
_CONTROL: Final = 1e-9
"""Clip norms that the control must find, or the audit would not have noticed anything."""

Floats = npt.NDArray[np.float64]


class Case(NamedTuple):
    """Data sets that differ by one unit."""

    name: str
    others: list[Question]
    added: list[Question]
    """All records of the added unit."""


def audit(
    study: Study,
    *,
    data: Path | None = None,
    device: str = "cpu",
    records: int = RECORDS,
    adapters: int = ADAPTERS,
    seed: int | None = None,
    progress: Progress = silent,
) -> Finding:
    """Search for the worst adapter and apply it to the silo's own path.

    Args:
        records: records of the first silo, which the added unit may move.
        adapters: how many to try on the control, half of them within ``adapter.max_abs``.

    Raises:
        ConfigError: the study protects no records or subjects one by one.
    """
    privacy = _privacy_by_unit(study)
    silo = next(iter(deal(study, data).silos.values()))
    tuned = Tuned.load(study, study.models.slm, data=data, device=device)
    refuse_coupling(tuned.model, "models.slm", study.task.max_tokens)
    draw = np.random.default_rng(seed)
    layout = tuned.broadcast_layout()
    start = to_vector(tuned.model, layout)
    cases = cases_of(silo, records, draw)
    bench = Bench(tuned, privacy.clip_norm)
    bounded, limit = adapters // 2, study.adapter.max_abs
    hostile = {
        "any": hostile_adapters(start, layout, adapters - bounded, None, draw),
        "within the bound": hostile_adapters(start, layout, bounded, limit, draw),
    }
    total = adapters + _WORST * len(hostile) * len(cases)
    worst = _worst(bench, cases, hostile, lambda done: progress(done, total, "adapters"))
    moved = _moved(
        bench,
        cases,
        [adapter for found in worst.values() for _, adapter in found],
        lambda done: progress(adapters + done, total, "the silo's own path"),
    )
    control = {name: found[0][0] for name, found in worst.items()}
    return Finding(
        audit="coupling",
        study=study,
        setting=f"one {privacy.unit} more among {records} records, worst of {adapters} adapters",
        claimed=None,
        bound=None,
        delta=privacy.delta,
        faults=_faults(max(control.values()), moved, privacy.unit),
        figures={
            "adapters": float(adapters),
            "records": float(records),
            "control, any adapter": control["any"],
            "control, within the bound": control["within the bound"],
            **{f"moved, {name}": value for name, value in moved.items()},
        },
    )


def _privacy_by_unit(study: Study) -> Privacy:
    if study.privacy is None or not by_unit(study):
        raise ConfigError(
            "this study protects no single records, so nothing could couple",
            where="privacy.unit",
            hint="choose a study with privacy.unit: record or subject",
        )
    return study.privacy


def _worst(
    bench: Bench,
    cases: Sequence[Case],
    hostile: Mapping[str, Iterator[Vector]],
    tell: Callable[[int], None],
) -> dict[str, list[tuple[float, Vector]]]:
    """The adapters of each kind that move the control most, with the clip norms, worst first."""
    done = 0
    worst = {}
    for name, adapters in hostile.items():
        found = []
        for adapter in adapters:
            found.append((max(bench.control(adapter, case) for case in cases), adapter))
            done += 1
            tell(done)
        worst[name] = sorted(found, key=lambda pair: -pair[0])[:_WORST]
    return worst


def _moved(
    bench: Bench, cases: Sequence[Case], adapters: Sequence[Vector], tell: Callable[[int], None]
) -> dict[str, float]:
    """By case, the largest movement of a silo's real sum by the added unit, in clip norms."""
    moved = {case.name: 0.0 for case in cases}
    done = 0
    for adapter in adapters:
        for case in cases:
            moved[case.name] = max(moved[case.name], bench.product(adapter, case))
            done += 1
            tell(done)
    return moved


def _faults(control: float, moved: dict[str, float], unit: str) -> list[str]:
    faults = [
        f"a {unit} moves the others' sum by {value:.3g} clip norms ({name})"
        for name, value in moved.items()
        if value
    ]
    if control < _CONTROL:
        faults.append(
            "the control, batches as long and as many as there are records, showed no coupling "
            "either, so this search would not notice any"
        )
    return faults


def cases_of(silo: Sequence[Question], records: int, draw: np.random.Generator) -> list[Case]:
    """Mixed records and copies of a short one, each with a long unit that may be there."""
    chosen = list(silo[:records])
    if len(chosen) < 2:
        raise ConfigError("two records are needed", where="--records", hint="at least 2")
    if chosen[0].signal:
        return _signals(chosen, draw)
    short = min(chosen, key=lambda q: len(q.prompt) + sum(map(len, q.choices)))
    # Longer than any: the prompts of many, cut to task.max_tokens like every record.
    pool = " ".join(q.prompt for q in chosen).split() or ["word"]
    subject = None if chosen[0].subject is None else "the added one"
    long = [
        replace(
            chosen[i % len(chosen)],
            prompt=" ".join(draw.choice(pool, 4 * len(pool) // len(chosen) + 16)),
            subject=subject,
        )
        for i in range(3 if subject else 1)
    ]
    copies = [replace(short, subject=q.subject) for q in chosen]
    return [Case("mixed records", chosen, long), Case("copies of one record", copies, long)]


def _signals(chosen: list[Question], draw: np.random.Generator) -> list[Case]:
    """The same of pictures or recordings, which a model is given in one size: what may be there is
    noise."""
    medium = medium_of(chosen[0].signal)
    subject = None if chosen[0].subject is None else "the added one"
    added = [
        medium.question_of(
            medium.noise_like(like.signal, int(draw.integers(2**63))),
            like.choices,
            like.answer,
            subject=subject,
        )
        for like in chosen[: 3 if subject else 1]
    ]
    copies = [replace(chosen[0], subject=q.subject) for q in chosen]
    return [Case("mixed records", chosen, added), Case("copies of one record", copies, added)]


class PaddedRecords(Records):
    """The control: micro-batches as long as their longest record, as most programs have them."""

    def of_records(self, rows: Indices) -> Iterator[tuple[Indices, list[torch.Tensor]]]:
        order = sorted_by_length(self._data, torch.from_numpy(rows))
        with watched(self._model) as calls:
            for part in torch.split(order, self._widths.most) if len(order) else ():
                batch = self._data.select(part)
                losses = question_losses(self._model, batch, self._loss, self._scoring)
                if isinstance(self._model, WholeModel):
                    yield part.numpy(), _one_by_one(losses, self._parameters)
                    continue
                yield part.numpy(), per_record_gradients(losses, self._parameters, calls)


def _one_by_one(
    losses: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
) -> list[torch.Tensor]:
    """Gradient of each loss of a batch, all weights: [B, …] for every parameter."""
    rows = [
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for loss in losses
    ]
    return [torch.stack(found) for found in zip(*rows, strict=True)]


class Bench:
    """Gradient sums of some questions at a given adapter, by the control and by the product."""

    def __init__(self, tuned: Tuned, clip_norm: float) -> None:
        self._tuned, self._clip_norm = tuned, clip_norm
        self._views = os.urandom(32)  # one key: the same records have the same views
        self._encoded: dict[tuple[bool, tuple[Question, ...]], EncodedQuestions] = {}

    def control(self, adapter: Vector, case: Case) -> float:
        """By how many clip norms the added unit moves the others' sum in padded batches."""
        return float(np.linalg.norm(self.moved(adapter, case)))

    def moved(self, adapter: Vector, case: Case) -> Floats:
        """How the added unit moves the others' sum in padded batches, in clip norms: [d]."""
        self._load(adapter)
        most = self._tuned.study.local.micro_batch
        if case.others[0].signal:  # so few that the last batch is not full
            most = next(m for m in count(2) if len(case.others) % m)
        with_it = self._padded([*case.others, *case.added], most)
        without = self._padded(case.others, most)
        total: Floats = (with_it[: len(case.others)] - without).sum(0)
        return total / self._clip_norm

    def product(self, adapter: Vector, case: Case) -> float:
        """The same for a silo's real sum: ‖S(D + x) − S(D) − S(x)‖ over C, exactly.

        The added unit comes first, so every other record is in another place.
        """
        self._load(adapter)
        together = self.summed([*case.added, *case.others])
        apart = self.summed(case.others) + self.summed(case.added)
        return float(np.linalg.norm((together - apart) * grid_step(1.0)))

    def summed(self, questions: Sequence[Question]) -> npt.NDArray[np.int64]:
        """Σ of clipped gradients as in DP-SGD, every unit taken, in steps of C·2^-46."""
        tuned, study = self._tuned, self._tuned.study
        layout = tuned.update_layout(0)
        subjects = [str(q.subject) for q in questions] if study.subject else None
        records = records_of(
            tuned.model,
            layout,
            self._encode(questions, private=True),
            loss_plan(study.local, tuned.scoring),
            members_of(len(questions), subjects),
            views=NoiseSource(self._views),
        )
        total = GridSum(layout.size, self._clip_norm, self._clip_norm, len(questions))
        with evaluation_mode(tuned.model):
            sum_clipped(total, records, np.arange(records.units))
        return total.integers

    def _padded(self, questions: Sequence[Question], most: int) -> Floats:
        """Clipped gradient of every question, from batches of ``most``, as long as their longest:
        [n, d]."""
        tuned, study = self._tuned, self._tuned.study
        layout = tuned.update_layout(0)
        records = PaddedRecords(
            tuned.model,
            select(tuned.model, layout),
            self._encode(questions, private=False),
            loss=study.local.loss,
            scoring=tuned.scoring,
            widths=Widths(tokens=1, most=most),
        )
        found = np.zeros((len(questions), layout.size))
        with evaluation_mode(tuned.model):
            for rows, parts in records.of_records(np.arange(len(questions))):
                found[rows] = torch.cat([part.flatten(1) for part in parts], 1).double().cpu()
        (finite,), norms = without_broken([found])
        return finite * np.minimum(1.0, self._clip_norm / np.maximum(norms, 1e-300))[:, None]

    def _encode(self, questions: Sequence[Question], *, private: bool) -> EncodedQuestions:
        key = (private, tuple(questions))
        if key not in self._encoded:
            self._encoded[key] = self._tuned.encode(questions, private=private)
        return self._encoded[key]

    def _load(self, adapter: Vector) -> None:
        load_vector(self._tuned.model, self._tuned.broadcast_layout(), adapter)


def hostile_adapters(
    start: Vector, layout: AdapterLayout, count: int, limit: float | None, draw: np.random.Generator
) -> Iterator[Vector]:
    """Adapters that a server could send, made to amplify last bits.

    One layer writes so large a constant into the stream that the records survive in its last bits
    only; a later one projects the constant out and amplifies what is left. Place, size and
    direction are drawn. With virtual tokens, some numbers are that large. Every fifth adapter is
    merely random.

    Args:
        start: an honest adapter in ``layout``; values that are not touched stay as they are there.
        limit: on absolute values; None: whatever float32 holds.
    """
    for number in range(count):
        scale = 10.0 ** draw.uniform(-2, 2)
        noise = draw.normal(scale=scale if number % 5 == 4 else 0.02, size=layout.size)
        vector = (start + noise).astype(np.float32)
        if number % 5 != 4:
            matrices = _matrices(vector, layout)
            first, second = sorted(draw.choice(len(matrices), size=2, replace=False))
            _amplify(matrices[first], float(draw.choice(_FIRST)), draw)
            _amplify(matrices[second], float(draw.choice(_SECOND)), draw)
        yield vector if limit is None else np.clip(vector, -limit, limit)


def _matrices(vector: Vector, layout: AdapterLayout) -> list[npt.NDArray[np.float32]]:
    """Views of ``vector``: what writes into the stream, in the order of the layers.

    B, or all matrices where there is no B, but no norms or biases; of virtual tokens (one matrix,
    [p, w]) some columns each: of a prefix they are keys or values of one layer.
    """
    starts = np.cumsum([0, *(int(np.prod(shape)) for shape in layout.shapes)])
    views = [
        vector[start : start + int(np.prod(shape))].reshape(shape)
        for start, shape in zip(starts, layout.shapes, strict=False)
    ]
    if layout.names == (PROMPT,):
        return np.array_split(views[0], min(_PARTS, views[0].shape[1]), axis=1)
    found = [i for i, name in enumerate(layout.names) if ".lora_B." in name]
    found = found or [i for i, view in enumerate(views) if view.ndim == 2]
    order = sorted(found, key=lambda i: _depth(layout.names[i]))
    return [views[i] for i in order]


def _depth(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else 0


def _amplify(matrix: npt.NDArray[np.float32], scale: float, draw: np.random.Generator) -> None:
    """Make a matrix rank one, and large."""
    rows, columns = matrix.shape
    left = draw.normal(size=rows) if draw.integers(2) else np.ones(rows)
    right = np.eye(columns)[draw.integers(columns)]
    matrix[:] = scale * np.outer(left, right)
