"""How a study runs on one machine: where its run lies, with which files, in how many processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from securefedcollm.federation.tracking import Kind
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.study import Study

if TYPE_CHECKING:
    from securefedcollm.federation.dealing import Files


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """The directory that something runs in.

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
    """What it runs with.

    Args:
        data: directory of the study's data files and ``path:`` models.
        workers: processes for the silos; 0: none; None: as many as the run thinks right.
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
        files: the participants' own, where nothing is dealt out; their silos have its names.
        track: the tool that is told what the server measures.
        ledgers: where the silos' privacy ledgers are, one file for each name; None: in the run.
            With one directory for several runs the records' budgets go on from run to run.
    """

    baselines: Sequence[str] = ("standalone", "fedavg")
    drops: Sequence[str] = ()
    distillation: bool = True
    noisy: int = 0
    tested: bool = True
    files: Files | None = None
    track: Kind | None = None
    ledgers: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ExperimentPlan(Machine):
    """All rows of a comparison in one directory. ``workers``: None is one for each silo.

    Args:
        seeds: how many: the study's own, and those that follow it.
        noisy: also run FedAvg and FedCoLLM with so many silos whose answers mean nothing.
        files: as in :class:`SimulationPlan`; the same under every seed.
    """

    seeds: int = 3
    noisy: int = 0
    files: Files | None = None


@dataclass(frozen=True, kw_only=True)
class SiloPlan:
    """What the process of a silo needs to train: the same for all silos, and picklable.

    Args:
        threads: that a silo's training may use.
        planned: silo → what a round of its DP-SGD releases; None without it.
        noisy, files: as in :class:`SimulationPlan`.
    """

    study: Study
    planned: Mapping[str, PoissonGaussian | None]
    threads: int
    data: Path | None = None
    device: str = "cpu"
    noisy: int = 0
    files: Files | None = None
