"""Studies that are run on this machine, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from securefedcollm.errors import StateError
from securefedcollm.federation.tracking import Kind
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.privacy.planner import Plan
from securefedcollm.study import Study, load_study

if TYPE_CHECKING:
    from securefedcollm.federation.dealing import Files

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

    def tensors(self, model: str = "slm") -> dict[str, npt.NDArray[Any]]:
        """The tuned values of ``model`` by name, float32.

        Raises:
            StateError: the run has no adapter of this model.
        """
        from safetensors.numpy import load_file

        files = sorted((self.adapters / model).glob("*.safetensors"))
        if len(files) != 1:
            raise StateError(
                f"{self.adapters / model}: {len(files)} files with tensors",
                hint="slm, or llm in a study with one",
            )
        found: dict[str, npt.NDArray[Any]] = load_file(files[0])
        return found

    def bundle(self, out: Place | None = None) -> Path:
        """Write the run's evidence, for :func:`securefedcollm.verify`; the file's path.

        Args:
            out: default ``evidence.zip`` in the run's directory.
        """
        return bundled(self.directory, out)


def bundled(directory: Path, out: Place | None) -> Path:
    """Write the evidence of everything in ``directory``; the file's path."""
    from securefedcollm.evidence.bundle import make_bundle
    from securefedcollm.federation.files import write_durably

    path = Path(out) if out is not None else directory / "evidence.zip"
    write_durably(path, make_bundle(directory))
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
        silos: name → the silo's own file, for every silo. Nothing is dealt out then.
        public: with ``silos``: the server's public records.
        test: with ``silos``: the records to measure on.
        baselines: also run ``standalone`` silos and ``fedavg``, for comparison.
        drops: silos to lose on purpose, ``SILO@STEP[:ROUND]``.
        resume: go on with the run in ``out``.
        overwrite: replace it.
        workers: processes for the silos. They import the calling script, which then needs
            ``if __name__ == "__main__":``. 0: this process runs the silos, one after the other.
        track: ``tensorboard`` or ``mlflow`` is told what the server measures, and nothing of silos.
        progress: called as ``progress(done, total, text)``, often.

    Raises:
        SecureFedCoLLMError: with the run in a state that ``resume`` continues, or not begun.
    """
    from securefedcollm.simulation.plan import SimulationPlan
    from securefedcollm.simulation.simulate import Simulation

    agreed = study if isinstance(study, Study) else load_study(study)
    directory = Path(out) if out is not None else Path("runs") / agreed.study
    plan = SimulationPlan(
        out=directory,
        data=None if data is None else Path(data),
        resume=resume,
        overwrite=overwrite,
        baselines=baselines,
        workers=workers,
        drops=tuple(drops),
        device=device,
        files=_files(agreed, silos, public, test),
        track=track,
    )
    results = Simulation(agreed, plan).run(progress, lambda text: None)
    return Run(directory, results)


def _files(
    study: Study,
    silos: Mapping[str, Place] | None,
    public: Place | None,
    test: Place | None,
) -> Files | None:
    """The participants' own files, if any is given."""
    from securefedcollm.federation.dealing import given_files

    if not (silos or public or test):
        return None
    own = [(name, Path(path)) for name, path in (silos or {}).items()]
    return given_files(study, own, *(None if p is None else Path(p) for p in (public, test)))


def simulate_own(
    study: Study | Place | Mapping[str, Any],
    start: Mapping[str, Any],
    silos: Mapping[str, Callable[[dict[str, Any], int], Mapping[str, Any]]],
    *,
    evaluate: Callable[[dict[str, Any]], Mapping[str, float]] | None = None,
    out: Place | None = None,
    drops: Iterable[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Run:
    """Run a study whose silos train with code of their own: any model, data and loop.

    What a silo returns is compared with what it was given; the difference is clipped, noised if the
    study has privacy (``unit: silo``), masked and summed, with budget and evidence as in every
    study. The mean is added to the global values (FedAvg, McMahan et al. 2017), or is the gradient
    of the study's ``server.outer``. Adversary: the server, and ``silos.colluders`` silos; never a
    silo's own code.

    Args:
        study: with ``task.kind: own`` and ``models.slm.source: own:NAME``; a path, or a mapping.
        start: name → tensor (numpy or torch, floating point): what all silos begin with.
        silos: name → ``train(values, round)``, which returns the tuned values by the same names.
            Rounds count from 0. All run in this process, one after the other.
        evaluate: ``evaluate(values)`` returns shares (0 to 1) by name, for the table.
        out: the run's directory; default ``runs/STUDY``.
        drops: silos to lose on purpose, ``SILO@STEP[:ROUND]``.
        resume: go on with the run in ``out``.
        overwrite: replace it.
        progress: called as ``progress(done, total, text)``.

    Returns:
        the run; ``run.tensors()`` are the tuned values.

    Raises:
        SecureFedCoLLMError: with the run in a state that ``resume`` continues, or not begun. Under
            ``unit: silo`` a training that fails is logged, and the silo contributes noise alone:
            whether it failed may depend on its records.
    """
    from securefedcollm.simulation import own
    from securefedcollm.simulation.plan import RunPlace

    agreed = study if isinstance(study, Study) else load_study(study)
    directory = Path(out) if out is not None else Path("runs") / agreed.study
    results = own.simulate_own(
        agreed,
        start,
        silos,
        place=RunPlace(out=directory, resume=resume, overwrite=overwrite),
        evaluate=evaluate,
        drops=drops,
        progress=progress,
    )
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
