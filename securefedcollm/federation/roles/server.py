"""The server of a real run: it coordinates, and waits for silos that were away at the end."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from securefedcollm.errors import ConfigError, TransportError
from securefedcollm.evidence.log import FILE_NAME as EVIDENCE
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.coordinator import Coordinator
from securefedcollm.federation.engines import Engine
from securefedcollm.federation.files import write_durably
from securefedcollm.federation.hooks import NO_HOOKS, Arrived, Hooks
from securefedcollm.federation.keeping import BEST, best_round, describe_best
from securefedcollm.federation.records import SERVER, ServerRecord
from securefedcollm.federation.results import best_method, method_of, rows
from securefedcollm.federation.roles.member import Member
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.tracking import Kind, tracking
from securefedcollm.federation.workload import ServerWorkload
from securefedcollm.study import Study, digest
from securefedcollm.version import __version__

if TYPE_CHECKING:
    from securefedcollm.tuning.question import Question

_messages = logging.getLogger(__name__)

_RESULTS: Final = "results.json"
_TOLD: Final = ".told"
_PAUSE: Final = 5.0


def coordinate(
    member: Member,
    engine: Engine,
    workload: ServerWorkload,
    hooks: Hooks = NO_HOOKS,
    *,
    linger: float = 0.0,
    track: Kind | None = None,
) -> dict[str, Any]:
    """Run, or go on with, the study over ``engine``; returns the run's record.

    Args:
        linger: seconds after the end, this time or before, in which silos that were away then get
            the last adapter, as ``hooks.arrived`` finds them.
        track: the tool that gets the server's measurements.

    Raises:
        SecureFedCoLLMError: with the run in a state from which the same call goes on.
    """
    study, run = member.study, member.run
    resume = (run / "server" / "state.json").exists()
    store = RunStore(run, digest(study), resume=resume)
    log, office = _log_of(member), member.authority
    evidence = ServerRecord(
        log,
        key=member.key,
        roster=member.roster,
        quorum=study.threshold,
        authority=office.key if office else b"",
    )
    with tracking(track, study, run, store.state.run_id) as follow:

        def finished_round(record: dict[str, Any]) -> None:
            store.write_metrics()
            follow(store.state.history)
            hooks.on_round(record)

        coordinator = Coordinator(
            study=study,
            roster=member.roster,
            engine=engine,
            workload=workload,
            store=store,
            evidence=evidence,
            hooks=replace(hooks, on_round=finished_round),
            authority=office,
        )
        follow(store.state.history)
        _go_to_the_end(member, coordinator, store)
        if linger:
            _linger(member, coordinator, linger, hooks.arrived)
    log.close()
    record: dict[str, Any] = json.loads((run / _RESULTS).read_bytes())
    return record


def _log_of(member: Member) -> EvidenceLog:
    return EvidenceLog(
        member.run / "server" / EVIDENCE,
        study=digest(member.study),
        owner=SERVER,
        key=member.key,
        silos=member.roster,
    )


def _go_to_the_end(member: Member, coordinator: Coordinator, store: RunStore) -> None:
    """Run all rounds that are left, unless an earlier process told silos that none is: those have
    left, and need not answer."""
    run = member.run
    if (run / _TOLD).exists():
        return
    coordinator.run()  # all rounds may be done
    if not (run / _RESULTS).exists():
        _finish(member, store, run / _RESULTS)
    coordinator.end()
    _note_told(run, coordinator.told)


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
    """The silos that know that the run is over; None if an older version did not note them."""
    text = (run / _TOLD).read_text()
    return set(json.loads(text)) if text else None


def _finish(member: Member, store: RunStore, path: Path) -> None:
    """Write the adapters and the run's own record, which says that it is finished."""
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
