"""A silo of a real run: its model, its records, its budget, and the adapters that it keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from securefedcollm.errors import StateError
from securefedcollm.evidence.entries import Entry
from securefedcollm.evidence.ledger import LoggedLedger
from securefedcollm.evidence.log import FILE_NAME as EVIDENCE
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.files import make_directory, sync_tree
from securefedcollm.federation.plan import stated
from securefedcollm.federation.records import SiloRecord
from securefedcollm.federation.roles.member import LEDGER, Member
from securefedcollm.federation.samedata import require_same_data
from securefedcollm.federation.silo import Seat, SiloSession
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.federation.workload import Progress, SiloWorkload, Vector
from securefedcollm.privacy.ledger import Budget, Ledger
from securefedcollm.study import Study, digest

if TYPE_CHECKING:
    from securefedcollm.federation.cotuning import SiloTuning
    from securefedcollm.tuning.question import Question

ADAPTER: Final = "adapters/slm"
"""In a silo's directory of a study: the adapter at the newest round's end."""
PROOF: Final = "proof.json"
"""In it: the server's log entry that says so, and the signed head that it is in."""


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
    """As :func:`silo_workload`, with questions that were read already."""
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
        place / EVIDENCE,
        study=digest(study),
        owner=name,
        key=member.key,
        on_entry=on_entry,
        silos=member.roster,
    )
    ledger = LoggedLedger(member.home / LEDGER, name, log, **stated(study))
    link = place / LEDGER  # where `audit bundle` looks for it
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(member.home / LEDGER, place))
    store = SiloStore(place)
    return SiloSession(
        Seat(study, name, member.roster, member.key, office),
        ChargedTraining(study, name, workload, store, ledger, progress=progress, budget=budget),
        SiloRecord(
            log,
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
