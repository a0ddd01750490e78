"""A question to the silos' documents, with every role in this process.

Asker and silos are those of :mod:`.cohort`: each has its own directory with identity and evidence
log. A shelf's count of questions is beside its index file, for all runs. They exchange the
frames of :mod:`securefedcollm.retrieval`.
So a run's directory may be the one of a finished simulation, whose evidence then goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Final

from securefedcollm.aggregation import Roster
from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.files import alone, make_directory, write_durably
from securefedcollm.federation.plan import AUTHORITY, silo_names
from securefedcollm.federation.questions.agreed import documents_of, terms_of
from securefedcollm.federation.questions.begun import Everybody, begin_log
from securefedcollm.federation.questions.desk import Desk, DeskConversation
from securefedcollm.federation.questions.inquiry import Answered, Inquiry, check_question
from securefedcollm.federation.questions.quota import StoredQuota, beside
from securefedcollm.federation.questions.space import Space
from securefedcollm.federation.records import SERVER
from securefedcollm.federation.runstore import RunStore
from securefedcollm.retrieval import Index, PreparedShelf, Terms
from securefedcollm.simulation.cohort import identity_at
from securefedcollm.study import Study, digest, dump_study, load_study

_STUDY: Final = "study.yaml"


class Questions:
    """The participants of a study in one directory, for questions to documents.

    A context manager; closing it closes the participants' files.

    Args:
        shelves: silo → its index file. Its count of questions is beside it, and is made if absent.
        asker: who asks: ``server``, or a silo without a shelf here.
        directory: of the run; made if absent.
        space: the study's encoder and reduction.

    Raises:
        ConfigError: the study has a roster, a name is none of the study's, or the directory belongs
            to another study or is in use.
        DataError: an index is damaged, or does not fit the study.
        EvidenceError: a participant's file is older than its evidence, or its log is of another
            run.
        StateError: a file cannot be written.
    """

    def __init__(
        self,
        study: Study,
        *,
        shelves: Mapping[str, Path],
        asker: str,
        directory: Path,
        space: Space,
    ) -> None:
        check_keys(study)
        names = silo_names(study)
        _check_names(names, shelves, asker)
        self._study, self._names, self._directory = study, names, directory
        self._asker, self._space = asker, space
        self._limit = documents_of(study).questions
        terms = terms_of(study, space.digest)
        self._files = ExitStack()
        with ExitStack() as failing:
            failing.callback(self._files.close)
            prepared = {name: self._prepared(shelves[name], terms) for name in sorted(shelves)}
            self._files.enter_context(held(directory))
            self._run = begun(directory, study)
            self._keys = {
                name: identity_at(home_of(directory, name), name) for name in [SERVER, *names]
            }
            self._roster = Roster({name: self._keys[name].public for name in names})
            self._office = b""
            if study.scheme == "ckks-authority":
                self._office = identity_at(directory / AUTHORITY, AUTHORITY).public
            self._log = self._opened(asker)
            self._desks = {
                name: self._desk(name, shelf, shelves[name]) for name, shelf in prepared.items()
            }
            self._terms = terms
            failing.pop_all()

    def __enter__(self) -> Questions:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def ask(self, question: str) -> Answered:
        """Ask every silo that has a shelf here.

        Raises:
            DataError: the question has no words that the encoder knows.
            StateError: a participant's file cannot be written.
        """
        check_question(question)
        (query,) = self._space.embed([question])
        open_now: dict[str, DeskConversation] = {}

        def carry(silo: str, frame: bytes) -> bytes:
            if silo not in open_now:
                open_now[silo] = self._desks[silo].open(self._asker)
            return open_now[silo].handle(frame)

        started = time.perf_counter()
        found = Inquiry(
            study=digest(self._study),
            run=self._run,
            key=self._keys[self._asker],
            silos={name: self._keys[name].public for name in self._desks},
            terms=self._terms,
            log=self._log,
            embed=self._space.embed,
        ).ask(query, carry)
        seconds = time.perf_counter() - started
        spent = {name: desk.quota.spent(self._asker) for name, desk in self._desks.items()}
        return Answered(found, spent, self._limit, seconds)

    def _prepared(self, path: Path, terms: Terms) -> PreparedShelf:
        """The shelf in an index file.

        Raises:
            ConfigError: it was made for other terms.
            DataError: it is damaged.
            StateError: it cannot be read.
        """
        index = Index.load(path, terms)
        try:
            shelf = PreparedShelf(index, terms)
        except SecureFedCoLLMError as error:
            raise ConfigError(error.message, where=str(path), hint=error.hint) from None
        self._files.callback(shelf.close)
        return shelf

    def _opened(self, name: str) -> EvidenceLog:
        """The participant's log, with its first entry."""
        study, server = digest(self._study), self._keys[SERVER].public
        everybody = Everybody(study, self._roster, server, self._office)
        home, key = home_of(self._directory, name), self._keys[name]
        log = begin_log(home, name, key, self._run, everybody)
        self._files.callback(log.close)
        return log

    def _desk(self, name: str, shelf: PreparedShelf, index: Path) -> Desk:
        log = self._opened(name)
        quota = StoredQuota(beside(index), self._limit)
        self._files.callback(quota.close)
        quota.check(log)
        askers = {other: key.public for other, key in self._keys.items() if other != name}
        study = digest(self._study)
        return Desk(study, self._run, self._keys[name], askers, shelf, quota, log)


def home_of(directory: Path, name: str) -> Path:
    """A participant's own directory in the run's."""
    return directory / name if name == SERVER else directory / "silos" / name


def check_keys(study: Study) -> None:
    """Every party gets throw-away keys here. With others than the roster's nothing verifies, and
    the silos' questions would be spent for that."""
    if study.roster:
        raise ConfigError(
            "this study's participants have keys of their own, which are not on this machine; what "
            "is signed here with others would never verify",
            where="roster",
            hint="they ask over the network, with --home; to try it out here, ask with a copy of "
            "the study without its roster",
        )


def _check_names(names: list[str], shelves: Mapping[str, Path], asker: str) -> None:
    if not shelves:
        raise ConfigError(
            "no shelf",
            where="--shelf",
            hint="give NAME=INDEX; `securefedcollm index build` makes it",
        )
    for name in shelves:
        if name not in names:
            raise ConfigError(
                f"{name!r} is no silo of the study",
                where="--shelf",
                hint=f"its silos: {', '.join(names)}",
            )
    check_asker(names, asker)
    if asker in shelves:
        raise ConfigError(
            f"{asker} would ask itself",
            where="--as",
            hint="leave its own shelf out, which it can search without a protocol",
        )


def check_asker(names: list[str], asker: str) -> None:
    """Raises: ConfigError if ``asker`` is no participant."""
    if asker not in {SERVER, *names}:
        raise ConfigError(
            f"{asker!r} takes no part in the study",
            where="--as",
            hint=f"{SERVER}, {', '.join(names)}",
        )


def held(directory: Path) -> AbstractContextManager[None]:
    """Two first questions at once would both make identities and begin the same logs."""
    return alone(
        make_directory(directory),
        "somebody else asks here at this moment",
        "ask again when that is done, or choose another --out",
    )


def begun(directory: Path, study: Study) -> bytes:
    """The id of the run in ``directory``, 16 bytes, which begins here if there is none.

    Raises:
        ConfigError: the study there is another one, or cannot be read.
    """
    agreed = directory / _STUDY
    given = agreed.exists() or agreed.is_symlink()
    if given:
        _check_same(agreed, study)
    known = (directory / "server" / "state.json").exists()
    store = RunStore(make_directory(directory), digest(study), resume=known)
    if not given:
        write_durably(agreed, dump_study(study).encode())
    return store.run_id


def _check_same(agreed: Path, study: Study) -> None:
    """Adversary: whoever puts another study's file there, so that answers are spent on evidence
    that never verifies."""
    try:
        found = digest(load_study(agreed))
    except SecureFedCoLLMError as error:
        raise ConfigError(
            f"the study there cannot be read: {error.message}",
            where=str(agreed),
            hint="put the run's own study.yaml back, or choose another --out",
        ) from None
    if found != digest(study):
        raise ConfigError(
            f"the run there is of another study ({found.hex()[:12]}…, this one is "
            f"{digest(study).hex()[:12]}…)",
            where=str(agreed.parent),
            hint="ask with its study.yaml, or choose another --out",
        )
