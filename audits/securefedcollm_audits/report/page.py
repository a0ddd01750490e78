"""The run's privacy report as one HTML page: for a compliance officer, a printer and a file.

Every number is followed by the entry of the evidence that it comes from; the cited entries are at
the end, as they were signed. Nothing is fetched. The pages are in ``templates/``.

Adversary: the bundle may come from anybody. The templates escape every value.
:func:`securefedcollm.privacy.page.render` makes characters visible that would reorder or hide text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, Final, NamedTuple

from jinja2 import Environment
from markupsafe import Markup, escape

from securefedcollm.primitives import sha256
from securefedcollm.privacy import shown
from securefedcollm.privacy.page import environment, render, step_plot
from securefedcollm_audits.privacy.finding import CAVEAT
from securefedcollm_audits.report import words
from securefedcollm_audits.report.plots import advantage_plot, participation_plot, utility_plot
from securefedcollm_audits.report.report import Report
from securefedcollm_audits.report.rows import AuditRow, RoundRow, SiloRow
from securefedcollm_audits.verification.case import Case
from securefedcollm_audits.verification.table import sentence

_PLACE = re.compile(r"^(?P<owner>[^#]{1,64})#(?P<seq>\d+)\b")
MOST_LEDGERS: Final = 4
"""Silos whose ledgers are all shown, with a plot each; of more, the one that spent most."""
MOST_NAMED: Final = 12
"""Silos in the first table; the others are in that of the second accountant."""
_MOST_MECHANISMS: Final = 12
_NEARLY: Final = 0.1
"""Share of a budget below which the rest is nearly nothing."""
_SHARES = (
    "tpr at 1 % fpr",
    "raw update",
    "masked upload",
    "opened sum",
    "noised sum",
    "noised sum, by chance",
)
_TELLING = ("noise charged", "noise measured", "auc", *_SHARES)
"""Figures of audits that the page shows, shares as percentages; the others are in the log."""
_MARK: Final = {"pass": "pass", "fail": "fail", "not covered": "open"}


def to_html(report: Report, case: Case) -> str:
    """The whole page."""
    cited = Citations(case)
    ranked = sorted(report.silos, key=lambda silo: -silo.high)
    return render(
        _templates().get_template("report.html"),
        report=report,
        cited=cited,
        fault_link=cited.fault,
        outcome=sentence(report.verdict),
        first_silos=ranked[:MOST_NAMED] if len(ranked) > MOST_NAMED else report.silos,
        other_silos=ranked[MOST_NAMED:],
        status={result.name: result.status for result in report.verdict.results},
        registry=json.dumps(report.registry, indent=2, ensure_ascii=False),
        controls=controls(),
        **_risk(report),
        **_rounds(report, ranked),
    )


@lru_cache(maxsize=1)
def _templates() -> Environment:
    found = environment("securefedcollm_audits")
    found.filters["label"] = lambda group: f"{group or 'accuracy'}, %"
    found.globals |= {
        "accountants": words.accountants,
        "caveat": CAVEAT,
        "dash": _dash,
        "glossary": words.GLOSSARY,
        "left": _left,
        "mark": _MARK,
        "measured": _measured,
        "missing": _missing,
        "plain": lambda value: _dash(value, "%g"),
        "up": lambda value: "–" if value is None else shown.up(value),
    }
    return found


class Cited(NamedTuple):
    """An entry that the page cites, in its signed form, with its leaf hash (RFC 9162)."""

    anchor: str
    place: str
    time: str
    leaf: str
    raw: str


class Citations:
    """Links to entries of the evidence, and the list of those that were cited."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._cited: dict[tuple[str, int], None] = {}

    def __call__(self, place: str | None) -> Markup:
        """A link for ``silo-1#12 (settled)``; empty if that names no entry."""
        found = _PLACE.match(place or "")
        if found is None or int(found["seq"]) >= len(self._case.logs.get(found["owner"], [])):
            return Markup()
        key = found["owner"], int(found["seq"])
        self._cited[key] = None
        name = "#".join(map(str, key))
        return Markup('<a class="ref" href="#{}">{}</a>').format(_anchor(*key), name)

    def fault(self, fault: str) -> Markup:
        """A fault that begins with the entry it is in."""
        link = self(fault)
        return link + escape(_PLACE.sub("", fault)) if link else escape(fault)

    def entries(self) -> list[Cited]:
        """All that were cited so far."""
        found = []
        for owner, seq in sorted(self._cited):
            entry = self._case.logs[owner][seq]
            raw = self._case.bundle.leaves[owner][seq]
            leaf = sha256(b"\0", raw).hex()
            text = raw.decode()[:1200]
            found.append(Cited(_anchor(owner, seq), entry.place, entry.time, leaf, text))
        return found


def _anchor(owner: str, seq: int) -> str:
    return f"e-{re.sub(r'[^A-Za-z0-9_.-]', '_', owner)}-{seq}"


def controls() -> dict[str, Any]:
    """Which check is evidence for which requirement: ``controls.json``."""
    text = resources.files("securefedcollm_audits").joinpath("controls.json").read_text("utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def _risk(report: Report) -> dict[str, Any]:
    """Sections 2 and 3: the limits of an attacker, the mechanisms, and the accuracy for it."""
    telling = [point for point in report.advantage if point[0] in {0.001, 0.01, 0.05, 0.1}]
    first = report.adversaries[0].epsilons if report.adversaries else ()
    mechanisms = sorted({c.mechanism for silo in report.silos for c in silo.charges})
    methods = report.utility.methods if report.utility else []
    points = report.utility.course if report.utility else []
    return {
        "deltas": [f"ε at δ = {claim.delta:.0e}" for claim in first],
        "telling": telling,
        "weak": dict(telling).get(0.01, 0.0) >= 0.5,
        "advantage": Markup(advantage_plot(report.advantage)),  # noqa: S704 - escapes its texts
        "mechanisms": mechanisms[:_MOST_MECHANISMS],
        "mechanism_words": words.mechanisms(mechanisms),
        "groups": list(dict.fromkeys(group for m in methods for group in m.accuracy)),
        "compared": len({m.method for m in methods} - {"zero-shot"}) > 1,
        "course": Markup(  # noqa: S704 - likewise
            utility_plot([(point.epsilon, point.accuracy) for point in points])
        ),
    }


def _rounds(report: Report, ranked: Sequence[SiloRow]) -> dict[str, Any]:
    """Section 4: attendance, and ledgers line by line. Of many silos one represents all."""
    names = sorted({name for row in report.rounds for name in (*row.survivors, *row.dropouts)})
    charged = [silo for silo in ranked if silo.charges]
    few = charged if len(charged) <= MOST_LEDGERS else charged[:1]
    return {
        "participation": Markup(  # noqa: S704 - escapes its texts
            participation_plot(names, [set(row.survivors) for row in report.rounds])
        ),
        "ledgers": [(silo, _plot(silo), _columns(silo)) for silo in few],
        "unplotted": len(charged) - len(few),
    }


def _plot(silo: SiloRow) -> Markup:
    points = [(i + 1, charge.cumulative) for i, charge in enumerate(silo.charges)]
    return step_plot(points, silo.limit or 0.0, "trainings")


def _columns(silo: SiloRow) -> list[str]:
    """Columns for noise that silos share."""
    shared = any(charge.honest_shares is not None for charge in silo.charges)
    return ["sensitivity", "honest shares"] if shared else []


def _dash(value: float | None, form: str = "%s") -> str:
    return "–" if value is None else form % value


def _left(silo: SiloRow) -> str:
    """What is left of a budget, rounded down."""
    if silo.left is None or silo.limit is None:
        return "–" if silo.limit is None else "not settled yet"
    text = shown.down(silo.left)
    if float(text) == 0.0:
        return "used up"
    return f"{text}, nearly used up" if silo.left < _NEARLY * silo.limit else text


def _missing(row: RoundRow) -> str:
    if not row.survivors:
        return "–"  # nothing was opened
    return ", ".join(row.dropouts) or "nobody"


def _measured(row: AuditRow) -> str:
    found = [(name, row.figures[name]) for name in _TELLING if name in row.figures]
    return "; ".join(
        f"{label} {f'{100 * value:.1f} %' if label in _SHARES else f'{value:.3g}'}"
        for label, value in found
    )
