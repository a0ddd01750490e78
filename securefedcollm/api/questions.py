"""Questions to the documents of all silos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from securefedcollm.api.runs import Place, bundled
from securefedcollm.errors import ConfigError
from securefedcollm.federation.workload import Progress, silent
from securefedcollm.study import Study, load_study

if TYPE_CHECKING:
    from securefedcollm.federation.questions.inquiry import Answered


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
        return bundled(self.directory, out)


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
