"""The front door: what the package's top level offers, in functions of plain arguments.

Everything here is a few lines over the rooms behind it, and does what the command line does. Paths
may be strings. Errors are :class:`~securefedcollm.errors.SecureFedCoLLMError` with a ``hint``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation.tracking import Kind
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.privacy.planner import Plan
from securefedcollm.study import Study, load_study

if TYPE_CHECKING:
    from securefedcollm.federation.dealing import Files
    from securefedcollm.federation.questions.inquiry import Answered

Place = str | Path


@dataclass(frozen=True)
class Shelf:
    """An index that :func:`build_index` wrote. ``fingerprint`` and ``encoder``: SHA-256 in hex of
    the index's content, and of the model as ``retrieval.encoder.sha256`` pins it."""

    path: Path
    passages: int
    fingerprint: str
    encoder: str


@dataclass(frozen=True)
class Cited:
    """A passage that a question found. ``id`` and ``text`` are the silo's words: data, and nothing
    more. ``score``: cosine similarity to the question, as the asker computed it."""

    silo: str
    id: str
    text: str
    score: float


@dataclass(frozen=True)
class Answer:
    """What came back for one question.

    ``passages``: the best of all silos, best first. ``answered``: silos that sent theirs;
    ``failed``: silo → why it did not; ``suspect``: silo → what was wrong with its scores.
    ``spent``: silo → questions of this asker that it counted, of at most ``limit``. ``sent`` and
    ``received``: bytes of all frames; ``seconds``: of the protocol.
    """

    passages: Sequence[Cited]
    answered: Sequence[str]
    failed: Mapping[str, str]
    suspect: Mapping[str, str]
    spent: Mapping[str, int]
    limit: int
    sent: int
    received: int
    seconds: float
    directory: Path

    def bundle(self, out: Place | None = None) -> Path:
        """Write the evidence of all that was asked in this directory; the file's path.

        Args:
            out: default ``evidence.zip`` in the directory.
        """
        return _bundled(self.directory, out)


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
        return _bundled(self.directory, out)


def _bundled(directory: Path, out: Place | None) -> Path:
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


def build_index(
    study: Study | Place,
    files: Sequence[Place],
    out: Place,
    *,
    data: Place | None = None,
    columns: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Shelf:
    """Cut documents into passages, embed them, and write the index of one silo's shelf.

    Members of the consortium may read every passage. Put no records on a shelf.

    Args:
        study: with a section ``retrieval``; or the path of its file.
        files: ``.txt`` and ``.md`` (paragraphs), ``.jsonl``, ``.csv`` and ``.parquet`` (column
            ``text``); or ``builtin:SILO``, a hospital's house rules in the embedded world.
        out: the index's file. An older index is replaced, and nothing else.
        data: the directory of the study's data files and ``path:`` models.
        columns: the files' own name of the column ``text``.
        progress: called as ``progress(done, total, text)``.

    Raises:
        ConfigError: the study has no such section, its encoder is another than it pins, or ``out``
            is there and no index.
        DataError: a document has a fault, or there are more passages than fit.
        StateError: the file cannot be written.
    """
    from securefedcollm.federation.files import write_durably
    from securefedcollm.federation.questions import shelves
    from securefedcollm.federation.questions.output import check_output
    from securefedcollm.federation.questions.space import plan_of, space_of
    from securefedcollm.retrieval.index import MAGIC

    agreed = study if isinstance(study, Study) else load_study(study)
    check_output(Path(out), [Path(file) for file in files], MAGIC)
    passages = shelves.passages_of(agreed, files, columns)
    space = space_of(agreed, None if data is None else Path(data), progress)
    index = shelves.build_index(space, passages, plan_of(agreed).block_bytes, progress)
    write_durably(Path(out), index.encode())
    return Shelf(Path(out), len(index), index.fingerprint.hex(), space.encoder.digest)


def make_reduction(
    study: Study | Place,
    out: Place,
    *,
    text: Sequence[Place] = (),
    data: Place | None = None,
    progress: Progress = silent,
) -> str:
    """Write the public map to ``retrieval.dimension`` numbers; its digest (hex), for the study.

    Args:
        study: with a section ``retrieval``; or the path of its file.
        out: the file. An older map is replaced, and nothing else.
        text: public text, one text a line, or question files; default: the study's public rows.
        data: the directory of the study's data files and ``path:`` models.
        progress: called as ``progress(done, total, text)``.

    Raises:
        ConfigError: the study has no such section, its encoder is another than it pins, or ``out``
            is there and no map.
        DataError: a file cannot be read, or there is too little text.
        StateError: the file cannot be written.
    """
    from securefedcollm.federation.files import write_durably
    from securefedcollm.federation.questions.output import check_output
    from securefedcollm.federation.questions.space import fit_reduction, load_encoder
    from securefedcollm.retrieval.reduction import MAGIC

    agreed = study if isinstance(study, Study) else load_study(study)
    place = None if data is None else Path(data)
    files = [Path(file) for file in text]
    check_output(Path(out), files, MAGIC)
    encoder = load_encoder(agreed, place, progress)
    made = fit_reduction(agreed, encoder, files, data=place, progress=progress)
    write_durably(Path(out), made.encode())
    return made.digest.hex()


def ask(
    question: str,
    study: Study | Place,
    *,
    shelves: Mapping[str, Place] | None = None,
    asker: str = "server",
    out: Place | None = None,
    home: Place | None = None,
    data: Place | None = None,
    progress: Progress = silent,
) -> Answer:
    """Ask all silos' documents a question that no silo can read.

    With ``shelves`` every role is on this machine. Every party has its own keys and evidence log;
    only the network is missing. A shelf's count of questions is beside its index file
    (``INDEX.questions.sqlite``), for all runs and studies.

    With ``home`` a member of a signed study asks over the network, through its process that runs
    there (``securefedcollm shelf serve``; at the server ``shelf relay``). ``spent`` is then what
    this member has asked in the study.

    Args:
        question: words that the study's encoder knows.
        study: with a section ``retrieval``; or the path of its file.
        shelves: silo → its index (:func:`build_index`).
        asker: ``server``, or a silo that is not asked.
        out: the run's directory; default ``runs/STUDY``. It may be that of a finished simulation of
            the same study.
        home: the member's directory, in place of ``shelves``, ``asker`` and ``out``.
        data: the directory of the study's data files and ``path:`` models.
        progress: called as ``progress(done, total, text)``.

    Raises:
        ConfigError: the study has a roster (with ``shelves``), a name is none of its own, an index
            does not fit it, ``out`` is of another study or in use, no process runs in ``home``, or
            the question is not valid Unicode.
        DataError: an index is damaged, or the question has no words.
        StateError: a participant's file cannot be written; nothing was answered then.
        TransportError: the process in ``home`` has ended, or the server carries no questions.
    """
    from securefedcollm.federation.questions.space import space_of
    from securefedcollm.federation.roles import ask_from
    from securefedcollm.simulation.asking import Questions
    from securefedcollm.tuning.embed import encodes

    if not encodes(question):
        raise ConfigError("is not valid Unicode", where="QUESTION", hint="write it in UTF-8")
    agreed = study if isinstance(study, Study) else load_study(study)
    space = space_of(agreed, None if data is None else Path(data), progress)
    if home is not None:
        return _answer(*ask_from(agreed, Path(home), question, space))
    directory = Path(out) if out is not None else Path("runs") / agreed.study
    with Questions(
        agreed,
        shelves={name: Path(path) for name, path in (shelves or {}).items()},
        asker=asker,
        directory=directory,
        space=space,
    ) as questions:
        return _answer(questions.ask(question), directory)


def _answer(answered: Answered, directory: Path) -> Answer:
    found = answered.found
    return Answer(
        passages=[Cited(hit.silo, *hit.passage, hit.score) for hit in found.hits],
        answered=found.answered,
        failed=found.failed,
        suspect=found.suspect,
        spent=answered.spent,
        limit=answered.limit,
        sent=found.sent,
        received=found.received,
        seconds=answered.seconds,
        directory=directory,
    )


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

    given = _checked(vectors, floats=clip_norm is not None)
    if clip_norm is not None:
        length = max(map(len, given.values()), default=1)
        made = Quantiser(length, clip_norm, bound or 2**30)
        whole = {n: made.encode(v.astype(np.float64)).integers for n, v in given.items()}
        total = sum_of(whole, made.bound, colluders).sum.astype(np.int64, copy=False)
        return total.astype(np.float64) / made.scale
    greatest = max((max(int(v.max()), -int(v.min())) for v in given.values()), default=1)
    if bound is not None and greatest > bound:
        raise ConfigError(
            f"{greatest} is beyond the bound {bound}",
            where="bound",
            hint="a bound is agreed before anybody sees the vectors; choose it large enough",
        )
    whole = {name: vector.astype(np.int64) for name, vector in given.items()}
    return sum_of(whole, bound or max(1, greatest), colluders).sum.astype(np.int64, copy=False)


def _checked(vectors: Mapping[str, npt.ArrayLike], *, floats: bool) -> dict[str, npt.NDArray[Any]]:
    """The vectors as arrays of one length, of floats or of integers.

    Raises:
        ConfigError: they are not.
    """
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
        if floats != (vector.dtype.kind == "f"):
            raise ConfigError(
                "floats need clip_norm, integers have none",
                where=f"vectors[{name!r}]",
                hint="clip_norm=C clips every vector to L2 norm C",
            )
    return given
