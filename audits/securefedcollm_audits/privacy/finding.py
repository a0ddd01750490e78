"""The result of a privacy audit: a lower bound and a claim, in one form for all audits."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from securefedcollm.errors import ConfigError
from securefedcollm.evidence.entries import Audited
from securefedcollm.evidence.log import FILE_NAME, EvidenceLog
from securefedcollm.evidence.many import silos_of
from securefedcollm.evidence.software import code_digest
from securefedcollm.primitives import SigningKey
from securefedcollm.study import Study, digest, load_study

CAVEAT = "95 % lower bound for this attack; not a guarantee"


class Finding(msgspec.Struct, frozen=True):
    """One audit's result.

    Args:
        audit: its name, as of the command.
        setting: the target and the attack, in one sentence.
        claimed: the accountant's ε for exactly the attacked mechanism; None if it claims nothing.
        bound: lower bound on ε that the attack proves; None where it measures something else.
        delta: both are at this δ.
        faults: why the claim is refuted, one sentence each; empty: not refuted.
        figures: measured numbers by name, for the log and ``--json``.
        power: how much missing noise the audit could have noticed, one sentence.
    """

    audit: str
    study: Study
    setting: str
    claimed: float | None
    bound: float | None
    delta: float
    faults: list[str]
    figures: dict[str, float]
    power: str = ""

    @property
    def held(self) -> bool:
        """Whether nothing was refuted."""
        return not self.faults

    @property
    def sentence(self) -> str:
        """The outcome in one line."""
        if self.faults:
            return f"FAIL: {'; '.join(self.faults)}"
        return "not refuted"

    def entry(self) -> Audited:
        """For the evidence log of the participant that carried out the audit."""
        return Audited(
            audit=self.audit,
            study=digest(self.study).hex(),
            code=code_digest().hex(),
            setting=self.setting,
            claimed=self.claimed,
            bound=self.bound,
            delta=self.delta,
            held=self.held,
            figures=self.figures,
        )

    def plain(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            **msgspec.to_builtins(self.entry()),
            "faults": self.faults,
            "verdict": self.sentence,
            "power": self.power,
            "caveat": CAVEAT,
        }


def write_down(finding: Finding, run: Path, owner: str, key: SigningKey) -> str:
    """Append the finding to a participant's evidence log; returns the entry's place.

    Args:
        run: the run's directory; its study may differ from the finding's.
        owner: the log's owner: ``server``, or a silo.
        key: its identity.

    Raises:
        ConfigError: there is no such log.
        EvidenceError: the log is another identity's.
    """
    path = home(run, owner) / FILE_NAME
    if not path.is_file():
        raise ConfigError(
            f"{owner} has no evidence log there",
            where=str(run),
            hint="--run names a run's directory, --owner a participant whose log is in it",
        )
    study = load_study(run / "study.yaml")
    silos = silos_of(study, run)
    log = EvidenceLog(path, study=digest(study), owner=owner, key=key, silos=silos)
    try:
        return log.append(finding.entry()).place
    finally:
        log.close()


def home(run: Path, owner: str) -> Path:
    """A participant's directory in a run."""
    return run / "server" if owner == "server" else run / "silos" / owner


def power_of(factor: float, least: str = "would") -> str:
    """Says by how much the noise of a build must fall short for an audit to fail.

    Args:
        factor: noise over that charged, below which it fails; 0 if at none.
        least: ``would``, or less if that rests on an assumption.
    """
    if factor <= 0.0:
        return "would notice no build by its noise, however little of it is left"
    down = math.floor(factor * 1e3) / 1e3
    return f"{least} notice a build whose noise is below {down:g} of what is charged"


def above_claim(bound: float, claimed: float | None) -> list[str]:
    """The fault of a bound that exceeds the claim."""
    if claimed is None or bound <= claimed:
        return []
    return [f"ε is at least {bound:.2f}, the accountant claims {claimed:.2f}"]
