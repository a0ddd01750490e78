"""Every participant of a federation on this machine: real roles, only without the network.

Each silo runs in a worker process, or in this one, with its own directory (identity, ledger, log,
journal, updates), and exchanges the same frames as over a network. Identities are made for the run;
their keys lie in the participants' directories, unencrypted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from securefedcollm.aggregation import Roster
from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm.evidence.ledger import Anchors, LoggedLedger, read_anchors
from securefedcollm.evidence.log import FILE_NAME as EVIDENCE
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.evidence.many import ROSTER, are_many, encode_roster, read_roster
from securefedcollm.federation.authority import AuthoritySession
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.coordinator import Coordinator
from securefedcollm.federation.engines import SiloPort
from securefedcollm.federation.engines.dropouts import Drop, DroppingEngine
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.files import make_directory, write_durably
from securefedcollm.federation.hooks import Hooks, OnRound
from securefedcollm.federation.keeping import is_over
from securefedcollm.federation.plan import AUTHORITY, authority_of, stated
from securefedcollm.federation.questions.prepaid import has_prepaid
from securefedcollm.federation.records import SERVER, AuthorityRecord, ServerRecord, SiloRecord
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.silo import Seat, SiloSession
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.federation.workload import Progress, ServerWorkload, SiloWorkload
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.journal import rehearsed
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.simulation.plan import ledger_of
from securefedcollm.study import Study, digest
from securefedcollm.study.identity import create_identity, open_identity, read_identity

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

MakeWorkload = Callable[[str, Progress], SiloWorkload]
"""Silo's name → its training; picklable where processes run the silos."""


@dataclass(frozen=True)
class Cohort:
    """The participants, and how this machine runs them.

    Args:
        names: of the silos.
        directory: holds ``server`` and ``silos/NAME``.
        workers: processes for the silos; 0: this one runs them, one after another.
        threads: the most threads for one silo's part of the secure sum.
        drops: silos to lose on purpose.
        context: how processes start.
        ledgers: where the silos' privacy ledgers are; None: each in the silo's own directory.
    """

    study: Study
    names: Sequence[str]
    directory: Path
    workers: int = 0
    threads: int = 1
    drops: Sequence[Drop] = ()
    context: BaseContext | None = None
    ledgers: Path | None = None

    def run(
        self,
        store: RunStore,
        server: ServerWorkload,
        workload: MakeWorkload,
        progress: Progress,
        on_round: OnRound,
    ) -> None:
        """Run all rounds that ``store`` has not finished."""
        study, directory = self.study, self.directory
        key = identity_at(directory / "server", SERVER)
        roster = Roster(
            {name: identity_at(directory / "silos" / name, name).public for name in self.names}
        )
        if are_many(len(roster)):
            _keep_roster(directory / "server" / ROSTER, roster)
        log = EvidenceLog(
            directory / "server" / EVIDENCE,
            study=digest(study),
            owner=SERVER,
            key=key,
            silos=roster,
        )
        office = b""
        if study.scheme == "ckks-authority":
            office = identity_at(directory / AUTHORITY, AUTHORITY).public
        parties = _Parties(study=study, roster=roster, server=key.public, authority=office)
        authority = authority_of(study, office)
        evidence = ServerRecord(
            log, key=key, roster=roster, quorum=study.threshold, authority=office
        )
        if is_over(study, store.state.history) and evidence.sealed:
            log.close()
            return
        opened = ExitStack()
        opened.callback(log.close)
        with (
            opened,
            EmbeddedEngine(
                [*self.names, *([authority.name] if authority else [])],
                self._maker(parties, workload, opened),
                workers=self.workers,
                progress=progress,
                context=self.context,
            ) as engine,
        ):
            coordinator = Coordinator(
                study=study,
                roster=roster,
                engine=DroppingEngine(engine, self.drops, study.scheme) if self.drops else engine,
                workload=server,
                store=store,
                evidence=evidence,
                hooks=Hooks(progress=progress, on_round=on_round),
                authority=authority,
            )
            coordinator.run()
            coordinator.end()

    def _maker(
        self, parties: _Parties, workload: MakeWorkload, opened: ExitStack
    ) -> Callable[[str, Progress], SiloPort]:
        """What makes a silo, or the authority, in whatever process it will run."""
        return partial(
            _make_party,
            parties=parties,
            directory=self.directory,
            threads=self.threads,
            workload=workload,
            ledgers=self.ledgers,
            opened=None if self.workers else opened,  # a worker's end closes what it opened
        )


def _keep_roster(path: Path, roster: Roster) -> None:
    """Have the list of silos at ``path`` that all logs of this run name by its root.

    Raises:
        ConfigError: the run began with other silos. The list stays: without it no log can be read.
    """
    began = read_roster(path) if path.exists() else roster
    was, now = (dict(zip(silos.names, silos.keys, strict=True)) for silos in (began, roster))
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            raise ConfigError(
                f"{name} has another identity than the run began with",
                where=str(path),
                hint="put its identity.json back, or begin another run in another directory",
            )
    if not path.exists():
        write_durably(path, encode_roster(roster))


@dataclass(frozen=True, kw_only=True)
class _Parties:
    """The participants' public data, for every process: no secrets.

    Args:
        server: its Ed25519 public key, 32 bytes.
        authority: the key holder's; empty where nobody holds the key.
    """

    study: Study
    roster: Roster
    server: bytes
    authority: bytes


def _make_party(
    name: str,
    progress: Progress,
    *,
    parties: _Parties,
    directory: Path,
    threads: int,
    workload: MakeWorkload,
    ledgers: Path | None = None,
    opened: ExitStack | None = None,
) -> SiloPort:
    """Build one silo, or the authority, in the process that will run it.

    Args:
        opened: closes the party's files; None where the end of the process does.
    """
    opened = opened or ExitStack()
    if name not in parties.roster:
        return _make_authority(parties, directory / AUTHORITY, opened)
    study = parties.study
    home = make_directory(directory / "silos" / name)
    training = workload(name, progress)
    key = identity_at(home, name)
    # The disk of this one machine, not privacy, would take most of the time of a thousand silos.
    with rehearsed() if are_many(len(parties.roster)) and ledgers is None else nullcontext():
        log = EvidenceLog(
            home / EVIDENCE, study=digest(study), owner=name, key=key, silos=parties.roster
        )
        opened.callback(log.close)
        book = _ledger(home, name, ledgers)
        ledger = LoggedLedger(book, name, log, **stated(study))
        opened.callback(ledger.close)
        store = SiloStore(home)
        opened.callback(store.close)
    return SiloSession(
        Seat(study, name, parties.roster, key, parties.authority),
        ChargedTraining(study, name, training, store, ledger, progress=progress),
        SiloRecord(
            log,
            key=key,
            roster=parties.roster,
            server=parties.server,
            authority=parties.authority,
        ),
        threads=threads,
        explain=True,
    )


def _ledger(home: Path, name: str, ledgers: Path | None) -> Path:
    """The path of the silo's ledger; its own directory then has a link, as with a real silo."""
    link = home / "ledger.sqlite"
    book = ledger_of(ledgers, name)
    if book is not None:
        make_directory(book.parent)
        if not link.is_symlink() and not link.exists():
            link.symlink_to(os.path.relpath(book.resolve(), home.resolve()))
    return same_ledger(home, name, ledgers)


def same_ledger(home: Path, name: str, ledgers: Path | None) -> Path:
    """The path of the ledger of the silo whose directory in the run is ``home``.

    Of a finished run too: the next study of a life counts on what that ledger says.

    Raises:
        ConfigError: the run began with another ledger, or what it charged is gone.
    """
    link = home / "ledger.sqlite"
    book = ledger_of(ledgers, name) or link
    if (link.is_symlink() or link.exists()) and link.resolve() != book.resolve():
        raise ConfigError(
            f"the run of {name} began with another ledger, {link.resolve()}",
            where="--ledgers",
            hint="resume with the directory that the run began with, or without --ledgers if it "
            "began without",
        )
    anchors = _anchors(home / EVIDENCE)
    if anchors is not None and not _holds(book, name, anchors):
        raise ConfigError(
            f"{name} has spent by the ledger {link.resolve()}, and that is gone, or an older copy",
            where="--ledgers",
            hint="put it back: without it nobody knows what its records have spent",
        )
    return book


def _anchors(evidence: Path) -> Anchors | None:
    """What the log says of the ledger; None if it says nothing, as when a start was killed."""
    try:
        found = read_anchors(evidence) if evidence.exists() else None
    except SecureFedCoLLMError:  # whoever opens the log says so
        return None
    return found if found and (found.charges or found.answered) else None


def _holds(book: Path, name: str, anchors: Anchors) -> bool:
    if not book.exists():
        return False
    with Ledger(book, name) as ledger:
        prepaid = not anchors.answered or has_prepaid(ledger, book, anchors.study)
        return anchors.missing(ledger.rows()) is None and prepaid


def _make_authority(parties: _Parties, home: Path, opened: ExitStack) -> AuthoritySession:
    """The party that holds the key, in a process that has no silo's secrets or data."""
    key, study, roster = identity_at(home, AUTHORITY), parties.study, parties.roster
    log = EvidenceLog(home / EVIDENCE, study=digest(study), owner=AUTHORITY, key=key)
    store = SiloStore(home, "authority.sqlite")
    for file in (log, store):
        opened.callback(file.close)
    return AuthoritySession(
        study=study,
        roster=roster,
        key=key,
        store=store,
        evidence=AuthorityRecord(log, key=key.public, roster=roster, server=parties.server),
    )


def identity_at(home: Path, name: str) -> SigningKey:
    """The participant's throw-away identity: in its own directory, so that ``resume`` has it."""
    path = make_directory(home) / "identity.json"
    if not path.exists():
        create_identity(name, path, None)
    return open_identity(read_identity(path), None)
