"""The run's privacy report as one HTML page: for a compliance officer, a printer and a file.

Every number is followed by the entry of the evidence that it comes from; the cited entries stand at
the end, as they were signed. Nothing is fetched, and every value is escaped: the bundle may come
from anybody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from typing import Any

from securefedcollm.evidence.entries import encode_entry
from securefedcollm.primitives import sha256
from securefedcollm.privacy.page import page, step_plot, table
from securefedcollm.privacy.shown import up
from securefedcollm_audits.case import Case
from securefedcollm_audits.finding import CAVEAT
from securefedcollm_audits.plots import advantage_plot, participation_plot, utility_plot
from securefedcollm_audits.report import AuditRow, Report, RoundRow, SiloRow
from securefedcollm_audits.table import sentence
from securefedcollm_audits.verdict import Result

_PLACE = re.compile(r"^(?P<owner>[^#]{1,64})#(?P<seq>\d+)\b")
_MOST_SILOS = 12
"""Ledgers that are printed line by line: those that spent most."""
_OTHER = "; at another setting of the same code"
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
_CLASS = {"pass": "pass", "fail": "fail", "not covered": "open"}

_WEAK = (
    "At this ε the bound by itself promises little against an attacker of that strength. Real "
    "attackers know less and find fewer, but how many fewer no accountant can say."
)

GLOSSARY = (
    ("ε (epsilon)", "How much one unit's data can change what anybody may conclude: each odds "
     "ratio by a factor of at most e^ε. Smaller is better; 0 would be no influence at all."),
    ("δ (delta)", "A small probability for which the bound of ε is not promised."),
    ("unit", "Whose presence is protected: one record of a silo, or a silo's whole data set."),
    ("add or remove", "Two data sets are neighbours if one has a unit that the other lacks."),
    ("noise multiplier (z)", "Size of the noise over the largest influence of one unit."),
    ("silo", "An organisation that tunes the small model on records that never leave it."),
    ("server", "The party that adds up the silos' updates, which it cannot read one by one."),
    ("secure sum", "Updates are masked so that only their sum over enough silos can be opened."),
    ("survivors", "The silos whose updates are in a round's sum."),
    ("reserved, settled", "The worst case is charged before training and corrected afterwards to "
     "what happened, never upwards."),
    ("head, cosignature", "A signed fingerprint of a whole log; other participants' signatures "
     "under it show that all saw the same log."),
    ("accountant", "A program that works out ε from the list of noisy releases."),
    ("canary", "A made-up record that an audit puts in or leaves out by a coin, to see whether an "
     "attacker can tell."),
    ("auc", "Chance that an attack ranks a record that was in above one that was not: 0.5 is "
     "guessing, 1 certainty."),
    ("tpr at 1 % fpr", "Share of members that an attack finds when it takes one in a hundred of "
     "the others for a member."),
    ("raw update, masked upload, opened sum, noised sum", "Where an audit tried to read words "
     "back, and the share it got; “by chance” is what guessing gets."),
)  # fmt: skip


def to_html(report: Report, case: Case) -> str:
    """The whole page."""
    cited = Citations(case)
    body = "".join(
        (
            _summary(report, cited),
            _adversaries(report),
            _pyramid(report),
            _ledger(report, cited),
            _second(report, cited),
            _audits(report, cited),
            _assumptions(report),
            _registry(report),
            _controls(report),
            _glossary(),
        )
    )
    return page(f"Privacy report of {report.verdict.study}", body + cited.appendix())


class Citations:
    """Links to entries of the evidence, and the list of those that were cited."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._cited: dict[tuple[str, int], None] = {}

    def __call__(self, place: str | None) -> str:
        """A link for ``silo-1#12 (settled)``; empty if that names no entry."""
        found = _PLACE.match(place or "")
        if found is None or int(found["seq"]) >= len(self._case.logs.get(found["owner"], [])):
            return ""
        key = found["owner"], int(found["seq"])
        self._cited[key] = None
        return f'<a class="ref" href="#{_anchor(*key)}">{escape("#".join(map(str, key)))}</a>'

    def appendix(self) -> str:
        """The cited entries, in their signed form, with their leaf hashes (RFC 9162)."""
        if not self._cited:
            return ""
        rows = []
        for owner, seq in sorted(self._cited):
            entry = self._case.logs[owner][seq]
            raw = encode_entry(entry)
            leaf = sha256(b"\0", raw).hex()
            rows.append(
                (
                    f'<span id="{_anchor(owner, seq)}">{escape(entry.place)}</span>',
                    escape(entry.time),
                    f"<code>{leaf[:16]}…</code>",
                    f"<code>{escape(raw.decode()[:1200])}</code>",
                )
            )
        head = ("entry", "its keeper's clock (UTC)", "leaf hash", "as signed")
        return "<h2>Evidence entries cited above</h2>" + table(head, rows)


def _anchor(owner: str, seq: int) -> str:
    return f"e-{re.sub(r'[^A-Za-z0-9_.-]', '_', owner)}-{seq}"


def _summary(report: Report, cited: Citations) -> str:
    verdict = report.verdict
    bad = "" if verdict.holds else " bad"
    word = "pass" if verdict.holds else "fail"
    return (
        f"<h1>Privacy report of {escape(verdict.study)}</h1>"
        f'<p class="note">Study <code>{verdict.digest}</code>, run <code>{verdict.run}</code>. '
        f"Evidence bundle SHA-256 <code>{verdict.sha256}</code>.</p>"
        "<h2>1. The claim</h2>"
        f'<p class="claim{bad}">{escape(report.claim)}<br><span class="{word}">'
        f"{escape(sentence(verdict))}</span> (section 6).</p>" + _spent(report, cited)
    )


def _spent(report: Report, cited: Citations) -> str:
    rows = [
        (
            escape(silo.name),
            "–" if silo.claimed is None else up(silo.claimed),
            "–" if silo.limit is None else f"{silo.limit:g}",
            "–" if silo.delta is None else f"{silo.delta:g}",
            escape(silo.accountant or "–"),
            cited(silo.place),
        )
        for silo in report.silos
    ]
    head = ("silo", "ε spent", "of", "at δ", "accountant", "evidence")
    return table(head, rows, numbers=(1, 2, 3)) if rows else ""


def _adversaries(report: Report) -> str:
    title = "<h2>2. Who could learn how much</h2>"
    if not report.adversaries:
        return f"{title}<p>No silo's charges are in this bundle, or no privacy was claimed.</p>"
    deltas = [claim.delta for claim in report.adversaries[0].epsilons]
    head = ("adversary", *(f"ε at δ = {delta:.0e}" for delta in deltas))
    rows = [
        (escape(row.adversary), *(up(claim.epsilon) for claim in row.epsilons))
        for row in report.adversaries
    ]
    points = [p for p in report.advantage if p[0] in {0.001, 0.01, 0.05, 0.1}]
    weak = "" if dict(points).get(0.01, 0.0) < 0.5 else f"<p>{_WEAK}</p>"
    telling = table(
        ("false alarms that the attacker accepts", "members found, at most"),
        [(f"{100 * alpha:g} %", f"{100 * power:.1f} %") for alpha, power in points],
        numbers=(0, 1),
    )
    return (
        f"{title}<p>Upper bounds for the silo that spent most. A smaller δ asks for more certainty "
        f"and so gives a larger ε.</p>{table(head, rows, numbers=range(1, len(head)))}"
        "<h3>What that means for one unit</h3><p>Suppose an attacker knows everything but whether "
        "one unit was in the data, and tests for it. Whatever the test, it finds at most this "
        f"share of those who were in it:</p>{telling}{weak}{advantage_plot(report.advantage)}"
    )


def _pyramid(report: Report) -> str:
    rows = [(escape(name), escape(str(value))) for name, value in report.parameters.items()]
    mechanisms = sorted({c.mechanism for silo in report.silos for c in silo.charges})
    shown = "".join(f"<li><code>{escape(text)}</code></li>" for text in mechanisms[:12])
    listed = f"<p>Mechanisms charged:</p><ul>{shown}</ul>" if shown else ""
    return (
        "<h2>3. How it was done</h2><p>The blocks of the differential-privacy pyramid of NIST SP "
        "800-226 are the first table of section 9.</p>"
        f"{table(('parameter', 'value'), rows)}{listed}{_utility(report)}"
    )


def _utility(report: Report) -> str:
    """Noise against utility, if the run's own results were given."""
    if report.utility is None:
        return (
            '<p class="note">Accuracy is not in a bundle. <code>audit report --results '
            "results.json</code> puts what the run measured beside ε.</p>"
        )
    methods = report.utility.methods
    groups = list(dict.fromkeys(group for m in methods for group in m.accuracy))
    rows = [
        (
            escape(m.model.upper()),
            escape(m.method),
            *(f"{100 * m.accuracy[g]:.1f}" if g in m.accuracy else "–" for g in groups),
        )
        for m in methods
    ]
    head = ("model", "method", *(f"{escape(group) or 'accuracy'}, %" for group in groups))
    course = [(point.epsilon, point.accuracy) for point in report.utility.course]
    return (
        "<h3>Privacy against utility</h3><p>Accuracy on test questions as whoever ran the study "
        "measured it: no signature covers it, and no ε here covers its publication. Standalone, "
        "FedAvg and FedCoLLM were tuned under the same claim.</p>"
        f"{utility_plot(course)}{table(head, rows, numbers=range(2, len(head)))}"
    )


def _ledger(report: Report, cited: Citations) -> str:
    rounds = table(
        ("sum of", "in the sum", "missing", "agreed", "vouched", "attempts", "evidence"),
        [_round(row, cited) for row in report.rounds],
        numbers=(3, 4, 5),
    )
    if not report.rounds:
        rounds = "<p>The server's log is not in this bundle, or no round was opened.</p>"
    names = sorted({name for row in report.rounds for name in (*row.survivors, *row.dropouts)})
    plot = participation_plot(names, [set(row.survivors) for row in report.rounds])
    shown = sorted(report.silos, key=lambda silo: -silo.high)[:_MOST_SILOS]
    silos = "".join(_charges(silo, cited) for silo in shown)
    rest = len(report.silos) - len(shown)
    more = f"<p>{rest} further silos spent less; <code>--json</code> has them.</p>" if rest else ""
    return f"<h2>4. Round by round</h2>{rounds}{plot}{silos}{more}"


def _round(row: RoundRow, cited: Citations) -> tuple[str, ...]:
    return (
        escape(row.name),
        '<span class="fail">lost: its sum cannot be opened</span>'
        if row.lost and not row.survivors
        else f"{len(row.survivors)} silos",
        escape(", ".join(row.dropouts)) or "nobody",
        str(row.agreements),
        str(row.witnesses),
        str(row.attempts),
        " ".join(filter(None, map(cited, (row.opening, row.sum, row.place)))),
    )


def _charges(silo: SiloRow, cited: Citations) -> str:
    if not silo.charges:
        return ""
    rows = [
        (
            str(charge.round),
            charge.state,
            f"{charge.noise_multiplier:.4g}",
            "–" if charge.sensitivity is None else str(charge.sensitivity),
            "–" if charge.honest_shares is None else str(charge.honest_shares),
            "" if charge.cumulative is None else up(charge.cumulative),
            " ".join(filter(None, map(cited, (charge.reserved, charge.settled)))),
        )
        for charge in silo.charges
    ]
    head = ("sum", "charged", "z", "sensitivity", "honest shares", "ε so far ≤", "evidence")
    points = [(i + 1, charge.cumulative) for i, charge in enumerate(silo.charges)]
    refused = f" It refused the server {silo.refusals} times." if silo.refusals else ""
    return (
        f"<h3>{escape(silo.name)}</h3><p>{len(silo.charges)} trainings charged.{refused}</p>"
        f"{step_plot(points, silo.limit or 0.0, 'trainings')}"
        f"{table(head, rows, numbers=(0, 2, 3, 4, 5))}"
    )


def _second(report: Report, cited: Citations) -> str:
    rows = [
        (
            escape(silo.name),
            "–" if silo.claimed is None else f"{silo.claimed:.4f}",
            f"{silo.low:.4f}",
            f"{silo.high:.4f}",
            escape(silo.method),
            cited(silo.place),
        )
        for silo in report.silos
    ]
    head = ("silo", "claimed ε", "at least", "at most", "second accountant", "evidence")
    body = table(head, rows, numbers=(1, 2, 3)) if rows else "<p>No silo's log is here.</p>"
    return (
        "<h2>5. A second accountant</h2><p>The claims were made by one program; another one, "
        "independent of it, brackets what was charged. Bundle and page can be checked again by "
        f"anybody: <code>audit verify</code>.</p>{body}"
    )


def _audits(report: Report, cited: Citations) -> str:
    rows = [
        (
            f'<span class="{_CLASS[result.status]}">{result.status}</span>',
            f'<span id="c-{escape(result.name)}">{escape(result.title)}</span>',
            _evidence(result, cited),
        )
        for result in report.verdict.results
    ]
    return (
        "<h2>6. Checks of the evidence</h2>"
        f"{table(('', 'check', 'evidence'), rows)}{_attacks(report, cited)}"
    )


def _attacks(report: Report, cited: Citations) -> str:
    """Privacy audits: lower bounds from attacks on the same code."""
    title = "<h3>Privacy audits: attacks on the mechanism and the model</h3>"
    if not report.audits:
        return (
            f'{title}<p class="note">None was written into a log of this bundle. <code>audit '
            "mechanism</code>, <code>coupling</code>, <code>one-run</code>, <code>canaries</code> "
            "and <code>inversion</code> attack the same code; <code>audit protocol</code> attacks "
            "the aggregation.</p>"
        )
    rows = [
        (
            f'<span class="{"pass" if row.held else "fail"}">'
            f"{'not refuted' if row.held else 'REFUTED'}</span>",
            f'<div class="prose"><b>{escape(row.audit)}</b>: {escape(row.setting)}'
            f"{_OTHER if row.other else ''}{_measured(row)}</div>",
            "–" if row.claimed is None else up(row.claimed),
            "–" if row.bound is None else f"{row.bound:.2f}",
            cited(row.place),
        )
        for row in report.audits
    ]
    head = ("", "what was attacked", "ε claimed of it", "ε at least", "evidence")
    return (
        f"{title}<p>Each is a {CAVEAT}. A bound above the claim refutes it; a bound below "
        "proves only that this attack, with so many trials, did not.</p>"
        f"{table(head, rows, numbers=(2, 3))}"
    )


def _measured(row: AuditRow) -> str:
    shown = [(name, row.figures[name]) for name in _TELLING if name in row.figures]
    text = "; ".join(
        f"{escape(label)} {f'{100 * value:.1f} %' if label in _SHARES else f'{value:.3g}'}"
        for label, value in shown
    )
    return f'<br><span class="note">{text}</span>' if text else ""


def _evidence(result: Result, cited: Citations) -> str:
    if not result.faults:
        return escape(result.evidence)
    return "<br>".join(_fault(fault, cited) for fault in result.faults)


def _fault(fault: str, cited: Citations) -> str:
    link = cited(fault)
    return link + escape(_PLACE.sub("", fault)) if link else escape(fault)


def _assumptions(report: Report) -> str:
    return (
        "<h2>7. What this rests on, and what it does not cover</h2>"
        f"{_list(report.assumptions)}<h3>Not covered by any ε here</h3>{_list(report.not_covered)}"
    )


def _registry(report: Report) -> str:
    text = escape(json.dumps(report.registry, indent=2, ensure_ascii=False))
    return (
        "<h2>8. For a register of deployments</h2><p>Plain names, to be fitted to the form of a "
        f"public register.</p><pre><code>{text}</code></pre>"
    )


def controls() -> dict[str, Any]:
    """Which check is evidence for which requirement: ``controls.json``."""
    text = resources.files("securefedcollm_audits").joinpath("controls.json").read_text("utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def _controls(report: Report) -> str:
    tables = controls()
    status = {result.name: result.status for result in report.verdict.results}
    parts = [f"<h2>9. Evidence for requirements</h2><p>{escape(tables['note'])}</p>"]
    for framework in tables["frameworks"]:
        rows = [
            (
                escape(row["control"]),
                escape(row["asks"]),
                "<br>".join(_check(name, status) for name in row["checks"]),
                escape(row["elsewhere"]),
            )
            for row in framework["rows"]
        ]
        head = ("requirement", "asks for", "checks in this bundle", "to be shown elsewhere")
        parts.append(f"<h3>{escape(framework['name'])}</h3>{table(head, rows)}")
    return "".join(parts)


def _check(name: str, status: Mapping[str, str]) -> str:
    found = status[name]
    return f'<a class="{_CLASS[found]}" href="#c-{escape(name)}">{escape(name)}: {found}</a>'


def _glossary() -> str:
    rows = [(f"<b>{escape(word)}</b>", escape(text)) for word, text in GLOSSARY]
    return f"<h2>10. Words</h2>{table(('word', 'meaning'), rows)}"


def _list(texts: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"
