"""A run goes on with the records that it began with, or not at all.

ε is planned for one set of records. If a round is trained again with others, all records in common
are charged again; a silo that goes on with another set has spent more than it said. The
fingerprints stay in the silo's own journal, keyed like those of its records: the server only sees
that a silo does not come back.
"""

from __future__ import annotations

from collections.abc import Sequence

from securefedcollm.errors import ConfigError
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.privacy.identities import ID_BYTES
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import Study, digest


def require_same_data(
    store: SiloStore, ledger: Ledger, study: Study, name: str, dataset: str
) -> None:
    """Call it before anything is shown, asked or sent.

    Args:
        dataset: fingerprint of the records that are here now.

    Raises:
        ConfigError: silo ``name`` began the run with others.
    """
    known, whole = store.recorded(_key(study)), digest(study).hex()
    began = [] if known is None else [known]
    # A run that an older version began has only its charges.
    began += _keyed(ledger, [e.key.dataset for e in ledger.entries() if e.about.study == whole])
    (mine,) = _keyed(ledger, [dataset])
    other = next((fingerprint for fingerprint in began if fingerprint != mine), None)
    if other is not None:
        raise ConfigError(
            f"{name}: these are not the records that the run began with (fingerprint "
            f"{mine.hex()}, it began with {other.hex()})",
            where="data",
            hint="put the file back as it was; other records need a new study, which is charged "
            "anew",
        )


def pin_data(store: SiloStore, ledger: Ledger, study: Study, name: str, dataset: str) -> None:
    """Call it when a run begins or goes on, before its first charge. Raises as its companion."""
    (mine,) = _keyed(ledger, [dataset])
    if store.record(_key(study), mine) != mine:
        require_same_data(store, ledger, study, name, dataset)


def _key(study: Study) -> bytes:
    return b"data:" + digest(study)


def _keyed(ledger: Ledger, datasets: Sequence[str]) -> list[bytes]:
    """Identities of whole sets, under the same secret as those of the records."""
    blob = ledger.identify((bytes.fromhex(dataset), None) for dataset in datasets).rows.tobytes()
    return [blob[at : at + ID_BYTES] for at in range(0, len(blob), ID_BYTES)]
