"""The front door: what the package's top level offers, in functions of plain arguments.

Everything here is a few lines over the rooms behind it, and does what the command line does. Paths
may be strings. Errors are :class:`~securefedcollm.errors.SecureFedCoLLMError` with a ``hint``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError
from securefedcollm.federation.tracking import Kind
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.privacy.planner import Plan
from securefedcollm.study import Study, load_study

Place = str | Path


@dataclass(frozen=True)
class Score:
    """One row of a run's table: accuracies (0 to 1) of a model on the test questions, by group."""

    model: str
    """``slm`` or ``llm``."""
    method: str
    """``FedCoLLM``, ``FedAvg``, ``standalone`` or ``zero-shot``."""
    accuracy: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Of the groups."""
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True)
class Run:
    """A finished simulation in its directory."""

    directory: Path
    results: Mapping[str, Any]
    """The content of ``results.json``."""

    @property
    def table(self) -> list[Score]:
        """Every model and method."""
        return [
            Score(row["model"], row["method"], row["accuracy"]) for row in self.results["table"]
        ]

    @property
    def epsilon(self) -> dict[str, float | None]:
        """Silo → ε that its most charged record has spent, at the study's δ; None without DP."""
        return {silo["name"]: silo["epsilon_spent"] for silo in self.results["silos"]}

    @property
    def adapters(self) -> Path:
        """``slm`` and ``llm`` below it, in PEFT's format."""
        return self.directory / "adapters"

    def bundle(self, out: Place | None = None) -> Path:
        """Write the run's evidence, for :func:`securefedcollm.verify`; the file's path.

        Args:
            out: default ``evidence.zip`` in the run's directory.
        """
        from securefedcollm.evidence.bundle import make_bundle
        from securefedcollm.federation.files import write_durably

        path = Path(out) if out is not None else self.directory / "evidence.zip"
        write_durably(path, make_bundle(self.directory))
        return path


def simulate(
    study: Study | Place,
    *,
    out: Place | None = None,
    data: Place | None = None,
    silos: Mapping[str, Place] | None = None,
    public: Place | None = None,
    test: Place | None = None,
    baselines: Sequence[str] = (),
    drops: Iterable[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    device: str = "cpu",
    track: Kind | None = None,
    progress: Progress = silent,
) -> Run:
    """Run every role of ``study`` on this machine: server, silos, secure sums, distillation.

    Args:
        study: or the path of its file.
        out: the run's directory; default ``runs/STUDY``.
        data: the directory of the study's data files and ``path:`` models.
        silos, public, test: the participants' own files, in place of ``data``.
        baselines: also run ``standalone`` silos and ``fedavg``, for comparison.
        drops: silos to lose on purpose, ``SILO@STEP[:ROUND]``.
        resume: go on with the run in ``out``. overwrite: replace it.
        workers: processes for the silos. They import the calling script, which then needs
            ``if __name__ == "__main__":``. 0: this process runs the silos, one after the other.
        track: ``tensorboard`` or ``mlflow`` is told what the server measures, and nothing of silos.
        progress: called as ``progress(done, total, text)``, often.

    Raises:
        SecureFedCoLLMError: with the run in a state that ``resume`` continues, or not begun.
    """
    from securefedcollm.federation.dealing import given_files
    from securefedcollm.federation.simulate import Simulation

    agreed = study if isinstance(study, Study) else load_study(study)
    files = None
    if silos or public or test:
        own = [(name, Path(path)) for name, path in (silos or {}).items()]
        files = given_files(agreed, own, *(None if p is None else Path(p) for p in (public, test)))
    directory = Path(out) if out is not None else Path("runs") / agreed.study
    results = Simulation(
        agreed,
        out=directory,
        data=None if data is None else Path(data),
        resume=resume,
        overwrite=overwrite,
        baselines=baselines,
        workers=workers,
        drops=drops,
        device=device,
        files=files,
        track=track,
    ).run(progress, lambda text: None)
    return Run(directory, results)


def plan_budget(
    study: Study | Place,
    *epsilon: float,
    records: int | None = None,
    values: int | None = None,
    data: Place | None = None,
) -> list[Plan]:
    """What each ε costs in noise, for every unit and placement, before anyone trains.

    Args:
        epsilon: default: the study's.
        records: of the smallest silo (subjects, if they are the unit); default: the study's.
        values: numbers in an update; default: by the SLM's shape.
        data: the directory of the study's ``path:`` models.

    Raises:
        ConfigError: the study does not say one of these.
    """
    from securefedcollm.federation.sizes import federation_of, plans_of

    agreed = study if isinstance(study, Study) else load_study(study)
    place = None if data is None else Path(data)
    return plans_of(
        agreed, federation_of(agreed, records=records, values=values, data=place), epsilon
    )


def secure_sum(
    vectors: Mapping[str, npt.ArrayLike],
    *,
    clip_norm: float | None = None,
    bound: int | None = None,
    colluders: int = 0,
) -> npt.NDArray[Any]:
    """The sum of several parties' vectors, by a round of masked secure aggregation in this process.

    Every party's keys, masks and signatures are real; only the network is missing. So this is for
    trials: see ``docs/protocol.md`` for the roles that exchange bytes between organisations.
    A sum has no differential privacy.

    Args:
        vectors: name → vector, all of one length d, of at least three parties. Integers, or floats
            with ``clip_norm``.
        clip_norm: L2 norm that every float vector is clipped to. A vector of this norm becomes
            2^30 steps, so each value is rounded by at most clip_norm · 2^-31 or so.
        bound: of integers: all satisfy abs(q) ≤ bound. It is public. Default: the largest absolute
            value there is, which the parties must then agree to tell.
        colluders: parties that may work with the server and learn no more than the sum.

    Returns:
        int64 [d], exact; or float64 [d], where ``clip_norm`` is given.

    Raises:
        ConfigError: too few parties, several lengths, floats without ``clip_norm``, or a value
            beyond ``bound``.
        TrainingError: a float is not finite.
    """
    from securefedcollm.aggregation.inmemory import sum_of
    from securefedcollm.privacy.quantise import Quantiser

    given = {name: np.asarray(vector) for name, vector in vectors.items()}
    shapes = sorted({vector.shape for vector in given.values()})
    if len(shapes) > 1:
        raise ConfigError(
            f"of several shapes: {', '.join(map(str, shapes))}",
            where="vectors",
            hint="every party's vector has the same length",
        )
    for name, vector in given.items():
        if vector.ndim != 1 or not len(vector) or vector.dtype.kind not in "iuf":
            raise ConfigError(
                f"{vector.dtype} {list(vector.shape)}",
                where=f"vectors[{name!r}]",
                hint="one-dimensional, with at least one number",
            )
        if (clip_norm is None) == (vector.dtype.kind == "f"):
            raise ConfigError(
                "floats need clip_norm, integers have none",
                where=f"vectors[{name!r}]",
                hint="clip_norm=C clips every vector to L2 norm C",
            )
    if clip_norm is not None:
        made = Quantiser(shapes[0][0] if shapes else 1, clip_norm, bound or 2**30)
        whole = {n: made.encode(v.astype(np.float64)).integers for n, v in given.items()}
        total = sum_of(whole, made.bound, colluders).sum
        return total.astype(np.float64) / made.scale
    greatest = max((max(int(v.max()), -int(v.min())) for v in given.values()), default=1)
    if bound is not None and greatest > bound:
        raise ConfigError(
            f"{greatest} is beyond the bound {bound}",
            where="bound",
            hint="a bound is agreed before anybody sees the vectors; choose it large enough",
        )
    whole = {name: vector.astype(np.int64) for name, vector in given.items()}
    return sum_of(whole, bound or max(1, greatest), colluders).sum
