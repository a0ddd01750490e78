"""Your own training code in a federation: named tensors in, named tensors out.

The code sees the global values and returns the tuned ones. Clipping, noise, masks, budget and
evidence are the same as for the language models of this project. The privacy unit is the whole
silo, or there is no differential privacy: a bound on one record's influence needs gradients that
this project computes.
"""

from __future__ import annotations

import math
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import rfc8785
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from securefedcollm.errors import (
    ConfigError,
    LocalProtocolError,
    SecureFedCoLLMError,
    StateError,
    TrainingError,
)
from securefedcollm.federation.engines.dropouts import Drop
from securefedcollm.federation.files import copy_tree, make_directory, replacing, write_durably
from securefedcollm.federation.plan import check_names
from securefedcollm.federation.results import method_of, remembered, rows, write_results
from securefedcollm.federation.runstore import RunStore, check_directory
from securefedcollm.federation.serverparts import OuterStep
from securefedcollm.federation.status import round_sentence
from securefedcollm.federation.workload import Gradient, Progress, Vector
from securefedcollm.foreign import printable
from securefedcollm.primitives import sha256
from securefedcollm.privacy.events import Event
from securefedcollm.privacy.identities import Content
from securefedcollm.simulation.cohort import Cohort
from securefedcollm.simulation.plan import RunPlace
from securefedcollm.study import Study, digest, dump_study

Values = Mapping[str, Any]
"""Name → tensor: numpy arrays, or torch tensors, of floating-point numbers."""
Training = Callable[[dict[str, Any], int], Values]
"""``train(values, round)``: the tuned values by the same names. Rounds count from 0."""
Evaluate = Callable[[dict[str, Any]], Mapping[str, float]]
"""``evaluate(values)``: shares by name, 0 to 1, e.g. ``{"accuracy": 0.8}``."""

FILE: Final = "values.safetensors"


class Tensors:
    """Names, shapes and kind of the values that everybody tunes, and their start."""

    def __init__(self, start: Values) -> None:
        """
        Args:
            start: the values before the first round. They come back in the same type, dtype and
                place: torch tensors if these are torch tensors, else numpy arrays.

        Raises:
            ConfigError: there are none, or one is no floating-point tensor.
        """
        self._like = dict(start)
        parts = {name: _float32(value, f"start[{name!r}]") for name, value in start.items()}
        self.shapes = {name: part.shape for name, part in parts.items()}
        self.start: Vector = _joined(list(parts.values()))
        if not self.size:
            raise ConfigError(
                "no values to tune", where="start", hint="name → tensor, at least one"
            )
        layout = rfc8785.dumps([[name, [*shape]] for name, shape in self.shapes.items()])
        self.layout = sha256(b"securefedcollm/own/layout/v1\0", layout)
        """Digest of names, shapes and order."""
        self.digest = sha256(b"securefedcollm/own/start/v1\0", self.layout, self.start.tobytes())
        """Digest of the start as well; ``models.slm.sha256`` pins it."""

    @property
    def size(self) -> int:
        """The number of numbers."""
        return len(self.start)

    def values(self, vector: Vector) -> dict[str, Any]:
        """Fresh tensors with the numbers of ``vector``, float32 [size]."""
        found, at = {}, 0
        for name, shape in self.shapes.items():
            part = vector[at : at + math.prod(shape)].reshape(shape)
            found[name] = _as(part, self._like[name])
            at += part.size
        return found

    def vector(self, values: Any) -> Vector:
        """The numbers of ``values``, float32 [size].

        Raises:
            TrainingError: other names or shapes than those of the start.
        """
        if not isinstance(values, Mapping):
            raise TrainingError(
                f"own training returned {type(values).__name__}",
                hint="return the tuned values as a mapping, by the names that they came with",
            )
        missing = [name for name in self.shapes if name not in values]
        more = [name for name in values if name not in self.shapes]
        if missing or more:
            raise TrainingError(
                f"own training returned {len(more)} values that nobody knows and left out "
                f"{len(missing)}, such as {printable(str((missing or more)[0]))}",
                hint="return the same names as those that came, and no others",
            )
        parts = [_float32(values[name], f"values[{name!r}]") for name in self.shapes]
        for part, (name, shape) in zip(parts, self.shapes.items(), strict=True):
            if part.shape != shape:
                raise TrainingError(
                    f"own training made {printable(name)} of shape {[*part.shape]}, "
                    f"it came with {[*shape]}",
                    hint="return every value in its shape",
                )
        return _joined(parts)

    def write(self, vector: Vector, directory: Path) -> None:
        """``directory``/values.safetensors, float32."""
        parts = {n: _float32(v, n) for n, v in self.values(vector).items()}
        write_durably(directory / FILE, safetensors.save(parts))

    def read(self, directory: Path) -> Vector:
        """What :meth:`write` wrote, bit for bit.

        Raises:
            StateError: the file is lost or damaged, or holds other values.
        """
        path = directory / FILE
        try:
            return self.vector(safetensors.load(path.read_bytes()))
        except (OSError, ValueError, SafetensorError, TrainingError) as error:
            raise StateError(
                f"{path}: cannot be read ({printable(str(error))})",
                hint="start again with overwrite, or restore the file",
            ) from None


class OwnSilo:
    """Implements :class:`securefedcollm.federation.workload.SiloWorkload` with somebody's code."""

    def __init__(self, name: str, tensors: Tensors, train: Training) -> None:
        self._tensors, self._train = tensors, train
        self.base_digest = tensors.digest
        # The unit is the silo: all its releases are charged to one account, whatever its data.
        self._account = sha256(b"securefedcollm/own/account/v1\0", name.encode())
        self.dataset = self._account.hex()
        self.also: Sequence[str] = ()

    def contents(self) -> Iterator[Content]:
        yield Content(self._account)

    def layout(self, round_: int) -> bytes:
        return self._tensors.layout

    def size(self, round_: int) -> int:
        return self._tensors.size

    def update_size(self, round_: int) -> int:
        return self._tensors.size

    def events(self) -> Sequence[Event]:
        return ()

    def fit(self, adapter: Vector, round_: int, progress: Progress) -> Vector:
        progress(0, 1, "own training")
        try:
            found = self._train(self._tensors.values(adapter), round_)
        except SecureFedCoLLMError:
            raise
        except Exception as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            raise TrainingError(
                f"own training failed in {Path(last.filename).name}, line {last.lineno}: "
                f"{type(error).__name__}: {printable(str(error))}",
                hint="run it by itself on the values of `start`",
            ) from error
        update = self._tensors.vector(found) - adapter
        progress(1, 1, "own training")
        return update

    def gradients(self, adapter: Vector, round_: int, q: float) -> Iterable[Gradient]:
        raise LocalProtocolError("own training has no gradients of single records")

    def save(self, adapter: Vector, directory: Path, beside: Mapping[str, bytes]) -> None:
        with replacing(directory) as fresh:
            self._tensors.write(adapter, fresh)
            for name, content in beside.items():
                write_durably(fresh / name, content)


class OwnServer:
    """Implements :class:`securefedcollm.federation.workload.ServerWorkload` for one set of values.

    The mean is added (FedAvg), or is the gradient of the study's outer optimiser.
    """

    def __init__(self, study: Study, tensors: Tensors, evaluate: Evaluate | None) -> None:
        self._tensors, self._evaluate = tensors, evaluate
        self._outer = OuterStep(study)
        self._vector = tensors.start.copy()
        self.base_digest = tensors.digest

    def layout(self, round_: int) -> bytes:
        return self._tensors.layout

    def update_size(self, round_: int) -> int:
        return self._tensors.size

    def adapter(self) -> Vector:
        return self._vector

    def absorb(self, mean: Vector, round_: int) -> None:
        self._vector = self._outer.take("", self._vector, mean)

    def descend(self, gradient: Vector, round_: int) -> None:
        raise LocalProtocolError("own training takes no joint steps")

    def descent(self) -> dict[str, Vector]:
        return {"adapter": self._vector, **self._outer.state()}

    def restore_descent(self, state: Mapping[str, Vector]) -> None:
        self._vector = self._outer.restore(state)["adapter"]

    def distil(self, round_: int, progress: Progress) -> dict[str, float]:
        return {}

    def measure(self) -> dict[str, dict[str, float]]:
        outer = {"outer": self._outer.norms} if self._outer.norms else {}
        return {"evaluation": self.evaluate(), **outer}

    def evaluate(self) -> dict[str, float]:
        """``slm/NAME`` → the result of the caller's function on the current values.

        Raises:
            ConfigError: it does not give numbers from 0 to 1.
        """
        if self._evaluate is None:
            return {}
        scores = self._evaluate(self._tensors.values(self._vector))
        found = {f"slm/{printable(str(n))}": float(score) for n, score in scores.items()}
        if not all(0 <= score <= 1 for score in found.values()):
            raise ConfigError(
                f"{found} are not shares from 0 to 1",
                where="evaluate",
                hint='return shares by name, e.g. {"accuracy": 0.8}; print a loss yourself',
            )
        return found

    def save(self, directory: Path) -> None:
        self._tensors.write(self._vector, make_directory(directory / "slm"))

    def load(self, directory: Path) -> None:
        self._vector = self._tensors.read(directory / "slm")


def simulate_own(
    study: Study,
    start: Values,
    silos: Mapping[str, Training],
    *,
    place: RunPlace,
    evaluate: Evaluate | None,
    drops: Iterable[str],
    progress: Progress,
) -> dict[str, Any]:
    """:func:`securefedcollm.api.runs.simulate_own`; the content of ``results.json``."""
    started, out = time.monotonic(), place.out
    tensors = checked(study, start)
    names = sorted(silos)
    check_names(study, names, "silos")
    planned = [Drop.parse(spec, names, study.scheme) for spec in drops]
    check_directory(study, out, resume=place.resume, overwrite=place.overwrite)
    server = OwnServer(study, tensors, evaluate)
    before = server.evaluate()
    if place.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    store = RunStore(make_directory(out), digest(study), resume=place.resume)
    write_durably(out / "study.yaml", dump_study(study).encode())
    before = remembered(out / "server" / "zero-shot.json", lambda: before)

    def on_round(record: dict[str, Any]) -> None:
        store.write_metrics()
        progress(record["round"], study.rounds, round_sentence(record, study.rounds))

    def workload(name: str, report: Progress) -> OwnSilo:
        return OwnSilo(name, tensors, silos[name])

    Cohort(study, names, out, drops=planned).run(store, server, workload, progress, on_round)
    copy_tree(store.adapters / "slm", out / "adapters" / "slm")
    history = store.state.history
    table = rows("zero-shot", before) + rows(method_of(study), history[-1]["evaluation"])
    notes = ["The silos' training is code of their own, which nothing here vouches for."]
    return write_results(store, study, table, dict.fromkeys(names), notes, started)


def checked(study: Study, start: Values) -> Tensors:
    """The values that the study's participants tune.

    Raises:
        ConfigError: the study has another kind of training, or pins another start.
    """
    if study.task.kind != "own":
        raise ConfigError(
            f"kind: {study.task.kind} is trained by this project",
            where="task.kind",
            hint="for code of your own set task.kind: own and models.slm.source: own:NAME",
        )
    tensors = Tensors(start)
    pinned = study.models.slm.sha256
    if pinned is not None and pinned != tensors.digest.hex():
        raise ConfigError(
            f"the values to start from have digest {tensors.digest.hex()}, the study pins {pinned}",
            where="models.slm.sha256",
            hint="all participants need the same names, shapes and numbers; compare `start`",
        )
    return tensors


def _float32(value: Any, where: str) -> npt.NDArray[np.float32]:
    """A copy on the host.

    Raises:
        ConfigError: not a floating-point tensor.
    """
    if _is_torch(value):
        kind, real = value.dtype, value.is_floating_point()
        found = value.detach().cpu().float().numpy()
    else:
        found = np.asarray(value)
        kind, real = found.dtype, found.dtype.kind == "f"
    if not real:
        raise ConfigError(
            f"{kind} is no floating-point type",
            where=where,
            hint="leave out what nobody trains, such as counters",
        )
    return np.array(found, dtype=np.float32)


def _as(part: npt.NDArray[np.float32], like: Any) -> Any:
    if not _is_torch(like):
        return part.astype(np.asarray(like).dtype)
    import torch

    return torch.from_numpy(part.copy()).to(device=like.device, dtype=like.dtype)


def _is_torch(value: Any) -> bool:
    """Whether it is a tensor of torch; does not import torch for those who do without."""
    return hasattr(value, "detach") and hasattr(value, "is_floating_point")


def _joined(parts: Sequence[npt.NDArray[np.float32]]) -> Vector:
    return np.concatenate([part.ravel() for part in parts]) if parts else np.zeros(0, np.float32)
