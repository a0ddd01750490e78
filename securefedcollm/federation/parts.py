"""The two parts of a silo's records where a study has a validation, and what each is charged for.

The tuned part pays for the updates, the part set aside for the counts. No record is in both. Its
part follows from the record and a secret alone (:mod:`~securefedcollm.privacy.aside`). So a
record's ε is that of its own part: to it, the other part's releases are as public as the model.
The ledger charges the two parts as two studies, each within the study's (ε, δ).

Adversary: the server, and the author of the study.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation.plan import round_of
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.federation.workload import PrivateRecords, Vector
from securefedcollm.primitives import sha256
from securefedcollm.privacy.aside import validation_of
from securefedcollm.privacy.identities import Content, Records
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import Study, digest

_DATA: Final = b"securefedcollm/validation/data/v1\0"
_PIN: Final = b"securefedcollm/validation/pin/v1\0"


@runtime_checkable
class SetsAside(Protocol):
    """Records of which some can be set aside."""

    def set_aside(self, key: bytes) -> None:
        """Set units aside for good, by this key. Until then nothing can be tuned.

        Raises:
            ConfigError: nothing, or everything, is set aside; or more than the counts have room
                for.
        """
        ...

    def aside(self) -> npt.NDArray[np.bool_]:
        """Which records are set aside, bool [records], in the order of ``contents``."""
        ...


@runtime_checkable
class HoldsOut(SetsAside, Protocol):
    """A workload that can set records aside and answer them."""

    def right_shares(self, adapter: Vector) -> npt.NDArray[np.float64]:
        """The share that ``adapter`` answers right of every unit set aside, [units]."""
        ...


class Part(NamedTuple):
    """One part of a silo's records, as the ledger knows it."""

    held: bool
    """It is set aside."""
    dataset: str
    study: str
    """The name under which its charges stay within the study's (ε, δ)."""
    records: Records


def hold_out(study: Study, workload: PrivateRecords, ledger: Ledger) -> None:
    """Set the study's part of the records aside; the same units every time.

    Raises:
        ConfigError: the workload cannot do this, or it would set too few or too many aside.
    """
    if study.validation is None:
        return
    if not isinstance(workload, SetsAside):
        raise ConfigError(
            "this training answers no questions", where="validation", hint="remove it"
        )
    workload.set_aside(ledger.part_key(digest(study)))


def pin_parts(study: Study, ledger: Ledger, store: SiloStore) -> None:
    """One key for the whole run.

    Adversary: whoever takes the ledger's key away between two rounds. Validation would then ask
    records that were tuned on, and vice versa.

    Raises:
        StateError: the run began with another.
    """
    if study.validation is None:
        return
    mine = sha256(_PIN, ledger.part_key(digest(study)))
    if store.record(b"parts:" + digest(study), mine) != mine:
        raise StateError(
            "the key by which records are set aside is not the one that the run began with",
            hint="restore the file that ends in .key beside the privacy ledger",
        )


def part_of(study: Study, workload: PrivateRecords, ledger: Ledger, *, held: bool) -> Part:
    """The records that a sum of this kind charges; all of them where the study has no validation.

    Args:
        held: those that are set aside, after :func:`hold_out`.
    """
    also, whole = workload.also, digest(study).hex()
    records = ledger.identify(_contents(study, workload, held), column=study.subject, also=also)
    if not held:
        return Part(held, workload.dataset, whole, records)
    return Part(
        held,
        sha256(_DATA, bytes.fromhex(workload.dataset)).hex(),
        validation_study(study),
        records,
    )


def validation_study(study: Study) -> str:
    """The name under which the ledger has the charges of a study's validations."""
    return validation_of(digest(study).hex())


def refuse_shared(tuned: Part, held: Part) -> None:
    """Refuse parts that share a unit: no draw by the unit's identity makes such parts.

    Raises:
        StateError: our own mistake; the ledger would charge one part for the releases of both.
    """
    mine, others = tuned.records.owners, held.records.owners
    if mine is None or others is None:
        mine, others = tuned.records.rows, held.records.rows
    if bool(np.isin(mine, others).any()):
        raise StateError("a record or subject is set aside and tuned on at once")


def sums_left(study: Study, sum_: int, *, held: bool) -> int:
    """How many sums of a part are still to come, from ``sum_`` on."""
    round_ = round_of(study, sum_)
    if held:
        return study.rounds - round_
    each = study.sums // study.rounds
    done = min(sum_ - round_ * each, study.tuning_sums)
    return (study.rounds - round_) * study.tuning_sums - done


def _contents(study: Study, workload: PrivateRecords, held: bool) -> Iterator[Content]:
    if study.validation is None:
        yield from workload.contents()
        return
    assert isinstance(workload, SetsAside)  # hold_out
    for content, aside in zip(workload.contents(), workload.aside().tolist(), strict=True):
        if aside == held:
            yield content
