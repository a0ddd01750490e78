"""How a study runs on one machine: the run's directory, its files, the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from securefedcollm.federation.tracking import Kind
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.study import Study

if TYPE_CHECKING:
    from securefedcollm.federation.dealing import Files

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """The directory of a run.

    Args:
        out: the directory.
        resume: continue what is in it.
        overwrite: remove what is in it first.
    """

    out: Path
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Machine(RunPlace):
    """The machine's part of a run.

    Args:
        data: directory of the study's data files and ``path:`` models.
        workers: processes for the silos; 0: none; None: the run chooses.
        device: where all models compute, as torch calls it.
    """

    data: Path | None = None
    workers: int | None = None
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class SimulationPlan(Machine):
    """A study and its baselines in one directory. ``workers``: None is one for each core.

    Args:
        baselines: which comparisons to run: ``standalone``, ``fedavg``.
        drops: silos to lose on purpose, ``SILO@STEP[:ROUND]``.
        distillation: False leaves out the server's phase, every part of it: plain FedAvg, without
            the LLM.
        noisy: number of silos whose answers are replaced at random.
        tested: False leaves out the test questions: the adapters are the result.
        files: the participants' own, where nothing is dealt out; they name the silos.
        track: the tool that gets the server's measurements.
        ledgers: where the silos' privacy ledgers are, one file for each name; None: in the run.
            One directory for several runs carries the records' budgets from run to run.
        replaced: what ``overwrite`` removes, in this order; if empty, ``out``.
        records: ``refuse`` a study that some of a silo's records cannot pay for, or ``skip`` those.
    """

    baselines: Sequence[str] = ("standalone", "fedavg")
    drops: Sequence[str] = ()
    distillation: bool = True
    noisy: int = 0
    tested: bool = True
    files: Files | None = None
    track: Kind | None = None
    ledgers: Path | None = None
    records: Literal["refuse", "skip"] = "refuse"
    replaced: Sequence[Path] = ()

    def ledger_of(self, name: str) -> Path | None:
        """The ledger of earlier studies that the silo goes on with; None if it begins afresh."""
        return None if self.ledgers in self.replaced else ledger_of(self.ledgers, name)


@dataclass(frozen=True, kw_only=True)
class ExperimentPlan(Machine):
    """All rows of a comparison in one directory. ``workers``: None is one for each silo.

    Args:
        seeds: their number: the study's own seed, and those that follow it.
        noisy: also run FedAvg and FedCoLLM with this many silos whose answers are random.
        files: as in :class:`SimulationPlan`; the same under every seed.
        only: keys of the rows to run; none: all.
    """

    seeds: int = 3
    noisy: int = 0
    files: Files | None = None
    only: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class SiloPlan:
    """What the process of a silo needs to train: the same for all silos, and picklable.

    Args:
        threads: the most threads for a silo's training.
        planned: silo → what a round of its DP-SGD releases; None without it.
        noisy, files: as in :class:`SimulationPlan`.
        run: the run's directory, beside which earlier ones may lie.
        kept: silo → places of the questions that take part; a silo that is not in it has all.
        shared: what a process has made of the plan, for all of its silos; empty at its beginning.
    """

    study: Study
    planned: Mapping[str, PoissonGaussian | None]
    threads: int
    run: Path
    data: Path | None = None
    device: str = "cpu"
    noisy: int = 0
    files: Files | None = None
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """``make()``, or what it gave this process before under ``name``."""
        if name not in self.shared:
            self.shared[name] = make()
        found: T = self.shared[name]
        return found


def ledger_of(ledgers: Path | None, name: str) -> Path | None:
    """The silo's ledger where all studies share them; None if each run has its own."""
    return None if ledgers is None else ledgers / f"{name}.sqlite"
