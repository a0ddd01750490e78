"""The roles of a real run: server, silos and authority, each in a process and home of its own.

A participant's *home* holds what outlives a run::

    identity.json                its signing key
    kit/, lead/, request/        its start-up kit (:mod:`.engines.flare.kit`)
    flare.log                    what FLARE's processes say
    ledger.sqlite, ledger.key    a silo's privacy ledger, of all its studies; what knows its records
    studies/STUDY-DIGEST/        one directory a study, as ``audit bundle`` wants it

The process may be killed at any moment and started again with the same command.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from securefedcollm.aggregation import Authority, Roster
from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.errors import ConfigError, StateError, TransportError
from securefedcollm.evidence.entries import Entry
from securefedcollm.evidence.ledger import LoggedLedger
from securefedcollm.evidence.log import FILE_NAME as EVIDENCE
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.anchors import check_ledger
from securefedcollm.federation.authority import AuthoritySession
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.coordinator import (
    Arrived,
    Coordinator,
    Rejoined,
    nobody_arrives,
    nobody_rejoins,
)
from securefedcollm.federation.engines import Engine, SiloPort
from securefedcollm.federation.engines.link import SiloInbox
from securefedcollm.federation.engines.requests import (
    Followed,
    Parcel,
    check_header,
    new_session,
    sign_request,
)
from securefedcollm.federation.files import make_directory, sync_tree, write_durably
from securefedcollm.federation.keeping import BEST, best_round, describe_best
from securefedcollm.federation.messages import MAX_FRAME
from securefedcollm.federation.plan import AUTHORITY, authority_of, sums_to_an_end
from securefedcollm.federation.records import SERVER, AuthorityRecord, ServerRecord, SiloRecord
from securefedcollm.federation.results import best_method, method_of, rows
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.samedata import require_same_data
from securefedcollm.federation.silo import Seat, SiloSession
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.federation.tracking import Kind, tracking
from securefedcollm.federation.workload import Progress, ServerWorkload, SiloWorkload, Vector
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.ledger import Budget, Ledger
from securefedcollm.study import Study, digest, dump_study
from securefedcollm.study.identity import open_identity, read_identity
from securefedcollm.study.signing import encode_envelope, require_signed, signatures_path
from securefedcollm.version import __version__

if TYPE_CHECKING:
    from securefedcollm.federation.cotuning import SiloTuning
    from securefedcollm.tuning.question import Question

_messages = logging.getLogger(__name__)

IDENTITY: Final = "identity.json"
LEDGER: Final = "ledger.sqlite"
ADAPTER: Final = "adapters/slm"
"""In a silo's directory of a study: what the newest round ended with."""
PROOF: Final = "proof.json"
"""In it: the server's log entry that says so, and the signed head that it is in."""
_TOLD: Final = ".told"
_SESSION: Final = ".session"
_FOLLOWED: Final = ".followed"
_PAUSE: Final = 5.0
_SLACK: Final = 64 << 20
"""Bytes of a frame besides the adapter: lists and shares of 128 silos, proofs."""


@dataclass(frozen=True)
class Member:
    """One participant in one study, ready to take part."""

    study: Study
    name: str
    role: str
    key: SigningKey
    roster: Roster
    server: bytes
    """The server's Ed25519 public key."""
    authority: Authority | None
    """Who holds the decryption key, in a study where one party does."""
    home: Path
    run: Path
    """The study's directory in ``home``."""


@contextmanager
def take_part(
    study: Study, study_file: Path, home: Path, role: str, passphrase: Callable[[], str]
) -> Iterator[Member]:
    """Enter the study as the participant whose home this is, and keep others out meanwhile.

    The lock is the operating system's and goes with the process, so that a killed one leaves none.

    Raises:
        ConfigError: not signed by everybody, not on the roster in this role, or already running.
        CryptoError: a signature or the passphrase is wrong.
        StateError: a silo's privacy ledger is older than its own evidence.
    """
    envelope = require_signed(study, signatures_path(study_file))
    file = read_identity(home / IDENTITY)
    listed = {p.name: p for p in study.roster}
    me = listed.get(file.name)
    if me is None or me.key != file.public or me.role != role:
        raise ConfigError(
            f"{file.name} is not on this study's roster as {role} with this key",
            where=str(study_file),
            hint=f"`securefedcollm identity show {home / IDENTITY}` prints the line it needs",
        )
    key = open_identity(file, passphrase() if file.encrypted else None)
    server = next((p for p in study.roster if p.role == "server"), None)
    if server is None:
        raise ConfigError(
            "the study names no server", where="roster", hint="add a participant of role: server"
        )
    home.chmod(0o700)
    run = make_directory(home / "studies" / f"{study.study}-{digest(study).hex()[:12]}")
    with _alone(run):
        if role == "silo":
            check_ledger(home, home / LEDGER, file.name)
        # Adversary: whoever may exchange the files meanwhile. What was checked is what is kept.
        write_durably(run / "study.yaml", dump_study(study).encode())
        write_durably(signatures_path(run / "study.yaml"), encode_envelope(envelope))
        silos = {p.name: bytes.fromhex(p.key) for p in study.roster if p.role == "silo"}
        yield Member(
            study=study,
            name=file.name,
            role=role,
            key=key,
            roster=Roster(silos),
            server=bytes.fromhex(server.key),
            authority=authority_of(study),
            home=home,
            run=run,
        )


def sign_for(member: Member) -> Callable[[str, Parcel, bytes], bytes]:
    """How this server signs what it sends."""
    return partial(sign_request, member.key, digest(member.study))


def session_of(member: Member) -> bytes:
    """A new session of this server's, after all that it had in this study."""
    return new_session(member.run / _SESSION)


def inbox_for(member: Member, port: SiloPort, limit: int) -> SiloInbox:
    """Where the requests of the study's server arrive, and nobody else's.

    Args:
        port: what answers them.
        limit: bytes of the largest.
    """
    check = partial(check_header, member.server, digest(member.study), member.name)
    return SiloInbox(port, limit, check, Followed(member.run / _FOLLOWED))


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                "another process is running this study here",
                where=str(run),
                hint="stop it first; one home, one process",
            ) from None
        yield


# ---- the server ----


def coordinate(
    member: Member,
    engine: Engine,
    workload: ServerWorkload,
    progress: Progress,
    on_round: Callable[[dict[str, Any]], None],
    rejoined: Rejoined = nobody_rejoins,
    *,
    linger: float = 0.0,
    arrived: Arrived = nobody_arrives,
    track: Kind | None = None,
) -> dict[str, Any]:
    """Run, or go on with, the study over ``engine``; returns the run's record.

    Args:
        rejoined: as :class:`Coordinator` has it.
        linger: seconds after the end, this time or before, in which silos that were away then are
            brought the last adapter.
        arrived: waits for those.
        track: the tool that is told what the server measures.

    Raises:
        SecureFedCoLLMError: with the run in a state from which the same call goes on.
    """
    study, run = member.study, member.run
    resume = (run / "server" / "state.json").exists()
    store = RunStore(run, digest(study), resume=resume)
    log = EvidenceLog(run / "server" / EVIDENCE, study=digest(study), owner=SERVER, key=member.key)
    office = member.authority

    evidence = ServerRecord(
        log,
        key=member.key,
        roster=member.roster,
        quorum=study.threshold,
        authority=office.key if office else b"",
    )
    finished = run / "results.json"
    with tracking(track, study, run, store.state.run_id) as follow:

        def finished_round(record: dict[str, Any]) -> None:
            store.write_metrics()
            follow(store.state.history)
            on_round(record)

        coordinator = Coordinator(
            study=study,
            roster=member.roster,
            engine=engine,
            workload=workload,
            store=store,
            progress=progress,
            on_round=finished_round,
            evidence=evidence,
            authority=office,
            rejoined=rejoined,
        )
        follow(store.state.history)
        # Once more after a crash: silos that were told have left, and need not answer.
        if not (run / _TOLD).exists():
            coordinator.run()  # all rounds may be done
            if not finished.exists():
                _finish(member, store, finished)
            coordinator.end()
            _note_told(run, coordinator.told)
        if linger:
            _linger(member, coordinator, linger, arrived)
    log.close()
    record: dict[str, Any] = json.loads(finished.read_bytes())
    return record


def not_told(member: Member) -> list[str]:
    """Silos that were away when the server's run ended, and did not come later."""
    told = _told(member.run)
    return [] if told is None else [name for name in member.roster.names if name not in told]


def _linger(member: Member, coordinator: Coordinator, seconds: float, arrived: Arrived) -> None:
    """Adversary: a silo that comes and goes, or refuses. It costs the server ``seconds``, and the
    others nothing: they have left."""
    told, deadline = _told(member.run) or set(), time.monotonic() + seconds
    waiting: Set[str] = set(member.roster.names) - told
    while waiting and (left := deadline - time.monotonic()) > 0:
        here = waiting & arrived(waiting, left)
        if not here:
            return
        try:
            waiting = (waiting - here) | coordinator.end_for(here)
        except TransportError as error:  # gone again
            _messages.warning("%s", error)
            time.sleep(_PAUSE)
        told |= coordinator.told
        _note_told(member.run, told)


def _note_told(run: Path, told: Set[str]) -> None:
    write_durably(run / _TOLD, json.dumps(sorted(told)).encode())


def _told(run: Path) -> set[str] | None:
    """Who was told that the run is over; None if an older version did not note whom it told."""
    text = (run / _TOLD).read_text()
    return set(json.loads(text)) if text else None


def _finish(member: Member, store: RunStore, path: Path) -> None:
    """The adapters and the run's own record: what says that it is finished."""
    study, run, history = member.study, member.run, store.state.history
    store.write_metrics()  # a crash may have come after the last round
    final = store.adapters
    for name in ("slm", "llm"):
        if (final / name).is_dir():
            shutil.rmtree(run / "adapters" / name, ignore_errors=True)
            shutil.copytree(final / name, run / "adapters" / name)
    table = rows(method_of(study), history[-1]["evaluation"])
    best = best_round(study, history)
    if best is not None:
        shutil.rmtree(run / BEST, ignore_errors=True)
        shutil.copytree(store.best_adapters(best), run / BEST)
        table += rows(best_method(method_of(study), best), history[best - 1]["evaluation"])
    record = ({"best": describe_best(study, history)} if best is not None else {}) | {
        "study": study.study,
        "digest": digest(study).hex(),
        "version": __version__,
        "run_id": store.state.run_id,
        "finished": True,
        "groups": list(table[0]["accuracy"]) if table else [],
        "table": table,
        "rounds": history,
        "adapters": str(run / "adapters"),
    }
    write_durably(path, json.dumps(record, indent=2).encode())


def server_questions(
    study: Study, public: Path | None, test: Path | None
) -> tuple[Sequence[Question], Sequence[Question]]:
    """The public and the test questions that the server works with.

    Raises:
        ConfigError: the server learns from public questions, and no file of them was given.
        DataError: a file cannot be read.
    """
    from securefedcollm.federation.dealing import deal, read_public, read_records

    if study.task.data.builtin and public is None:
        dealt = deal(study, None)
        return dealt.public, (
            dealt.test if test is None else read_records(study, test, private=False)
        )
    if public is None and study.needs_public:
        raise ConfigError(
            "the server needs the study's public questions",
            where="--public",
            hint="`securefedcollm study deal` writes public.jsonl for a study on files",
        )
    tests = [] if test is None else read_records(study, test, private=False)
    return ([] if public is None else read_public(study, public)), tests


# ---- a silo ----


def silo_workload(
    study: Study,
    name: str,
    data: Path,
    models: Path | None,
    progress: Progress,
    *,
    device: str = "cpu",
) -> SiloTuning:
    """The silo's model and its private questions, all that are in the file ``data``.

    Args:
        device: where the model computes, as torch calls it.

    Raises:
        ConfigError, DataError: the file, the model, the device or the study does not fit.
    """
    from securefedcollm.federation.dealing import read_records

    return workload_of(study, name, read_records(study, data), models, progress, device=device)


def workload_of(
    study: Study,
    name: str,
    questions: Sequence[Question],
    models: Path | None,
    progress: Progress,
    *,
    device: str = "cpu",
) -> SiloTuning:
    """As :func:`silo_workload`, of questions that were read already."""
    from securefedcollm.federation.cotuning import SiloTuning

    return SiloTuning(study, name, questions, data=models, device=device, progress=progress)


def trained_on(study: Study, test: Path, workload: SiloTuning) -> int:
    """How many of the held-out records in the file ``test`` are among the training records.

    Raises:
        DataError, ConfigError: it holds no labelled records of the study's task.
    """
    from securefedcollm.federation.cotuning import contents_of
    from securefedcollm.federation.dealing import read_records

    known = {content.words for content in workload.contents()}
    held_out = contents_of(read_records(study, test, private=False))
    return sum(content.words in known for content in held_out)


def require_begun_data(member: Member, workload: SiloWorkload) -> None:
    """Raises: ConfigError if the silo began the study with other records."""
    store = SiloStore(make_directory(member.run / "silos" / member.name))
    with Ledger(member.home / LEDGER, member.name) as ledger:
        require_same_data(store, ledger, member.study, member.name, workload.dataset)
    store.close()


def silo_session(
    member: Member,
    workload: SiloTuning,
    *,
    progress: Progress,
    threads: int,
    budget: Budget | None = None,
    on_entry: Callable[[Entry], None] | None = None,
) -> SiloSession:
    """The silo's side of the run, over the state in its home."""
    study, name = member.study, member.name
    office = member.authority.key if member.authority else b""
    place = make_directory(member.run / "silos" / name)
    log = EvidenceLog(
        place / EVIDENCE, study=digest(study), owner=name, key=member.key, on_entry=on_entry
    )
    ledger = LoggedLedger(member.home / LEDGER, name, log, sums=sums_to_an_end(study))
    link = place / LEDGER  # where `audit bundle` looks for it
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(member.home / LEDGER, place))
    store = SiloStore(place)
    return SiloSession(
        Seat(study, name, member.roster, member.key, office),
        ChargedTraining(study, name, workload, store, ledger, progress=progress, budget=budget),
        SiloRecord(
            log,
            name=name,
            key=member.key,
            roster=member.roster,
            server=member.server,
            authority=office,
        ),
        keep=partial(_keep, member.run / ADAPTER, workload),
        threads=threads,
    )


def _keep(
    directory: Path, workload: SiloWorkload, round_: int, adapter: Vector, proof: dict[str, Any]
) -> None:
    make_directory(directory.parent)
    facts = json.dumps({"round": round_ + 1, **proof}, indent=2, ensure_ascii=False)
    workload.save(adapter, directory, {PROOF: facts.encode()})
    sync_tree(directory)


def newest_adapter(run: Path) -> int:
    """The round, from 1, that ended with the adapter in a silo's ``run``; 0 if there is none."""
    try:
        return int(json.loads((run / ADAPTER / PROOF).read_bytes())["round"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{run / ADAPTER / PROOF}: cannot be read ({error})",
            hint="remove the directory; the server brings the adapter of the next round",
        ) from None


def largest_frame(study: Study, workload: SiloTuning) -> int:
    """Bytes of the largest request that this study can bring a silo."""
    return _largest(study, workload.size(0))


def largest_reply(study: Study, workload: ServerWorkload) -> int:
    """Bytes of the largest reply that a silo of this study can give.

    Adversary: a silo that announces a longer one, and has the server wait for it.
    """
    values = max(workload.update_size(round_) for round_ in range(study.rounds))
    return min(MAX_FRAME, _largest(study, values))


def _largest(study: Study, values: int) -> int:
    """An adapter takes 4 bytes a value. Under a threshold key a silo is sent every silo's part of
    its keys, and then every silo's second polynomials; it sends as many for all committees."""
    ring = study.ring
    polynomials = 0
    if ring is not None:
        shape = ring.shape(values, study.silos.colluders)
        polynomials = study.silos.count * max(shape.keys, shape.groups)
    return _SLACK + 32 * values + 8 * DEGREE * polynomials


# ---- the authority ----


def authority_session(
    member: Member, *, on_entry: Callable[[Entry], None] | None = None
) -> AuthoritySession:
    """The key holder's side of the run, over the state in its home.

    Raises:
        ConfigError: in this study no party holds a key.
    """
    place = make_directory(member.run / AUTHORITY)
    log = EvidenceLog(
        place / EVIDENCE,
        study=digest(member.study),
        owner=AUTHORITY,
        key=member.key,
        on_entry=on_entry,
    )
    return AuthoritySession(
        study=member.study,
        roster=member.roster,
        key=member.key,
        store=SiloStore(place, "authority.sqlite"),
        evidence=AuthorityRecord(
            log, key=member.key.public, roster=member.roster, server=member.server
        ),
    )


LARGEST_TO_AUTHORITY: Final = 1 << 31
"""Bytes of a request: half a ciphertext of every silo."""
