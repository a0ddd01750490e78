"""The state of a run, from its participant's files: for an operator, and for machines."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.evidence.entries import (
    Agreed,
    Asked,
    Counted,
    Decrypted,
    Entry,
    Heard,
    Polled,
    Refused,
    Released,
    Reserved,
    Round,
    Served,
    Settled,
    Tallied,
    Told,
    Unmasked,
    Uploaded,
    Voted,
    Voting,
    Witnessed,
)
from securefedcollm.evidence.log import FILE_NAME as EVIDENCE
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.evidence.many import silos_of
from securefedcollm.federation.parts import validation_study
from securefedcollm.federation.plan import (
    AUTHORITY,
    ends_round,
    round_of,
    sum_name,
    sums_to_an_end,
    validates,
)
from securefedcollm.privacy.charges import Entry as Charge
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import Study, digest, load_study

MOST_GROUPS = 8
"""Most groups of test questions whose scores fit on a line."""


@dataclass(frozen=True)
class RunStatus:
    """One study of one participant. ε is what this run's data set has spent in all studies."""

    study: str
    digest: str
    directory: str
    name: str
    role: str
    rounds: int
    rounds_done: int
    last_entry: str | None
    survivors: list[str] = field(default_factory=list)
    bytes_up: dict[str, int] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    epsilon_spent: float | None = None
    epsilon_study: float | None = None
    continues: list[str] = field(default_factory=list)
    """The studies that this one continues, oldest first, by name where this home has them."""
    problem: str | None = None

    def sentences(self) -> list[str]:
        """For a terminal."""
        lines = [f"{self.study}  {self.role} {self.name}  {self.directory}"]
        lines.append(f"  rounds     {self.rounds_done} of {self.rounds} finished")
        if self.continues:
            lines.append(f"  goes on    from {', '.join(self.continues)}")
        if self.survivors:
            lines.append(f"  survivors  {', '.join(self.survivors)} (last round)")
        if self.bytes_up:
            up, down = sum(self.bytes_up.values()), sum(self.bytes_down.values())
            lines.append(f"  traffic    {up:,} bytes from the silos, {down:,} to them")
        if self.epsilon_spent is not None:
            lines.append(
                f"  privacy    ε = {self.epsilon_spent:.2f} spent on these data, in all studies; "
                f"this one may spend {self.epsilon_study:g}"
            )
        if self.last_entry is not None:
            lines.append(f"  last heard {self.last_entry}")
        if self.problem is not None:
            lines.append(f"  problem    {self.problem}")
        return lines


def runs_of(home: Path) -> list[RunStatus]:
    """Every study that was run in ``home``, the newest last. Reads only."""
    found = [path for path in (home / "studies").glob("*") if (path / "study.yaml").is_file()]
    runs = []
    for path in sorted(found, key=lambda p: p.stat().st_mtime):
        try:
            runs.append(_read(path))
        except SecureFedCoLLMError as error:  # a study that cannot be read hides no other
            what = (path.name, "", str(path), "", "", 0, 0, None)
            runs.append(RunStatus(*what, problem=str(error)))
    return runs


def _read(run: Path) -> RunStatus:
    study = load_study(run / "study.yaml")
    silo = next((path for path in (run / "silos").glob("*") if path.is_dir()), None)
    role = "silo" if silo else "authority" if (run / AUTHORITY).is_dir() else "server"
    name = silo.name if silo else next((p.name for p in study.roster if p.role == role), "")
    known: dict[str, Any] = {
        "study": study.study,
        "digest": digest(study).hex(),
        "directory": str(run),
        "name": name,
        "role": role,
        "rounds": study.rounds,
        "rounds_done": 0,
        "last_entry": None,
        "continues": _continues(study, run.parent),
    }
    try:
        known |= _of_silo(study, silo) if silo else _of_office(study, run, role)
    except (SecureFedCoLLMError, OSError, ValueError, KeyError) as error:
        known["problem"] = str(error)
    return RunStatus(**known)


def _continues(study: Study, studies: Path) -> list[str]:
    chain = study.continues.earlier if study.continues else []
    here = {path.name[-12:]: path.name[:-13] for path in studies.glob("*")}
    return [here.get(link.study[:12], f"{link.study[:16]}…") for link in chain]


def _of_office(study: Study, run: Path, role: str) -> dict[str, Any]:
    if role == AUTHORITY:
        opened = [e for e in _entries(study, run / AUTHORITY) if isinstance(e.what, Decrypted)]
        numbers = {e.what.round for e in opened if isinstance(e.what, Decrypted)}
        return {
            "rounds_done": len({round_of(study, n) for n in numbers if ends_round(study, n)}),
            "last_entry": opened[-1].time if opened else None,
        }
    path = run / "server" / "state.json"
    if not path.exists():
        return {}
    history = json.loads(path.read_bytes())["history"]
    total: dict[str, dict[str, int]] = {"bytes_up": {}, "bytes_down": {}}
    for record in history:
        for key, sums in total.items():
            for silo, count in record.get(key, {}).items():
                sums[silo] = sums.get(silo, 0) + count
    last = history[-1] if history else {}
    return {"rounds_done": len(history), "survivors": last.get("survivors", []), **total}


def _of_silo(study: Study, place: Path) -> dict[str, Any]:
    known: dict[str, Any] = {}
    entries = _entries(study, place)
    if entries:
        agreed = [e.what for e in entries if isinstance(e.what, Agreed | Told)]
        opened = {e.what.round for e in entries if isinstance(e.what, Unmasked | Told)}
        known["rounds_done"] = len({round_of(study, n) for n in opened if ends_round(study, n)})
        known["survivors"] = agreed[-1].survivors if agreed else []
        known["last_entry"] = entries[-1].time
    privacy = study.privacy
    if privacy is not None and (place / "ledger.sqlite").exists():
        with Ledger(place / "ledger.sqlite", place.name) as ledger:
            names = {digest(study).hex(), validation_study(study), ""}  # "": an older ledger
            mine = [entry for entry in ledger.entries() if entry.about.study in names]
            if mine:
                last = {entry.key.dataset: entry for entry in mine}  # of either part
                spent = max(_worst(ledger, entry, privacy.delta) for entry in last.values())
                known |= {"epsilon_spent": float(spent), "epsilon_study": privacy.epsilon}
    return known


def _worst(ledger: Ledger, last: Charge, delta: float) -> float:
    """ε of the record that has spent most, among those that were charged last."""
    if not last.about.records:
        return ledger.spent(last.key.dataset, last.key.unit, delta).claim.epsilon
    return ledger.standing(ledger.stored(last.about.records)).worst


def _entries(study: Study, place: Path) -> list[Entry]:
    if not (place / EVIDENCE).exists():
        return []
    silos = silos_of(study, place.parent.parent)
    log = EvidenceLog(
        place / EVIDENCE, study=digest(study), owner=place.name, key=None, silos=silos
    )
    log.close()
    return log.entries


def told(entry: Entry, study: Study) -> str | None:
    """The line for a silo's operator about an entry of the silo's log; None: not worth one."""
    match entry.what:
        case Reserved(round=sum_, epsilon=epsilon):
            what = "answering" if validates(study, sum_) else "training"
            return f"{_when(study, sum_)}: privacy reserved, within ε = {epsilon:g}; {what}"
        case Round(round=sum_, attempt=attempt) if attempt:
            return f"{_when(study, sum_)}: attempt {attempt + 1}"
        case Released(round=sum_):
            what = "counts are" if validates(study, sum_) else "update is"
            return f"{_when(study, sum_)}: the {what} finished and charged"
        case Uploaded(round=sum_):
            return f"{_when(study, sum_)}: protected update about to leave"
        case Agreed(round=sum_, survivors=survivors) | Told(round=sum_, survivors=survivors):
            return f"{_when(study, sum_)}: agreed to a sum of {len(survivors)} silos"
        case Decrypted(round=sum_):
            return f"{_when(study, sum_)}: a sum is about to be opened"
        case Settled(round=sum_, spent=spent) if spent is not None:
            what = "the run is" if study.sums == sums_to_an_end(study) else "all rounds so far are"
            whose = ""
            if study.validation is not None:  # either part has an end of its own
                part = "set aside" if validates(study, sum_) else "tuned on"
                whose = f" for the records that are {part}"
            return f"{what} settled{whose}: ε = {spent.epsilon:.2f} at δ = {spent.delta:g} in all"
        case Witnessed(size=size):
            return f"vouched for the server's log of {size} entries"
        case Counted(asker=asker, number=number):
            return f"question {number} of {asker}: counted, scores about to leave"
        case Served():
            return "its passages are about to leave"
        case Asked(questions=questions):
            return f"a question of this member is about to leave, to {len(questions)} silos"
        case Heard(answers=answers):
            return f"{len(answers)} silos answered it"
        case Voting(asker=asker):
            return f"a question of {asker}: charged, votes about to leave"
        case Voted(survivors=survivors):
            return f"agreed to a sum of the votes of {len(survivors)} silos"
        case Polled():
            return "a question of this member to the silos' records is about to leave"
        case Tallied(survivors=survivors):
            return f"the votes of {len(survivors)} silos were opened"
        case Refused(error=error):
            carried = ", or a question that it carried" if study.retrieval is not None else ""
            return f"REFUSED a request of the server{carried}: {error}"
    return None


def _when(study: Study, sum_: int) -> str:
    round_, comma, part = sum_name(study, sum_).partition(",")
    return f"{round_} of {study.rounds}{comma}{part}"


def _by_group(scores: dict[str, float]) -> str:
    if len(scores) > MOST_GROUPS:
        return f"mean of {len(scores)} groups {sum(scores.values()) / len(scores):.0f}"
    return ", ".join(f"{group} {score:.0f}".strip() for group, score in scores.items())


def round_sentence(record: dict[str, Any], rounds: int) -> str:
    """The line for the server's operator about a finished round."""
    models: dict[str, dict[str, float]] = {}
    for key, value in record["evaluation"].items():
        model, _, group = key.partition("/")
        models.setdefault(model.upper(), {})[group] = 100 * value
    scores = "; ".join(f"{model} {_by_group(found)}" for model, found in models.items())
    gone = "".join(f", {silo} lost ({why})" for silo, why in record.get("dropouts", {}).items())
    lost = ", THE ROUND IS LOST: its sum cannot be opened" if "lost" in record else ""
    silos = len(record["survivors"])
    private = private_words(record)
    scores = "; ".join(filter(None, [scores, private]))
    shown = f": {scores} (%)" if scores else ""
    return f"round {record['round']}/{rounds}, {silos} silos{gone}{lost}{shown}"


def private_words(record: dict[str, Any]) -> str:
    """The noised accuracy on silos' own records, in percent; empty without a validation."""
    found = record.get("private")
    if found is None:
        return ""
    if "lost" in found:
        return "set aside LOST: its sum cannot be opened"
    if found["accuracy"] is None:
        return f"set aside: drowned in noise of {found['sigma']:.0f} records"
    noise = f" ± {100 * found['margin']:.1f}" if found["sigma"] else ""
    return f"set aside {100 * found['accuracy']:.1f}{noise}"
