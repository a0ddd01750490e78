"""Programs that re-verify a run, and programs that attack it.

::

    from securefedcollm_audits import expectation, make_report, verify

    known = expectation(Path("study.yaml"), [])  # what the auditor knows from elsewhere
    assert verify("evidence.zip", known).holds

What ``__all__`` names is the public interface. Nothing is imported before it is used. The wings:
``verification`` (a bundle, offline), ``report`` (the same run on a page), ``protocol`` (malicious
servers and silos), ``privacy`` (attacks that bound ε from below) and ``fuzz``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from securefedcollm_audits.report.page import to_html as to_html
    from securefedcollm_audits.report.report import Report as Report
    from securefedcollm_audits.report.report import make_report as make_report
    from securefedcollm_audits.verification.compare import compare as compare
    from securefedcollm_audits.verification.expected import Expected as Expected
    from securefedcollm_audits.verification.expected import expectation as expectation
    from securefedcollm_audits.verification.merge import merge as merge
    from securefedcollm_audits.verification.verdict import Verdict as Verdict
    from securefedcollm_audits.verification.verify import verify as verify

_DOORS: Final = {
    "Expected": "verification.expected",
    "Report": "report.report",
    "Verdict": "verification.verdict",
    "compare": "verification.compare",
    "expectation": "verification.expected",
    "make_report": "report.report",
    "merge": "verification.merge",
    "to_html": "report.page",
    "verify": "verification.verify",
}
__all__ = [
    "Expected",
    "Report",
    "Verdict",
    "compare",
    "expectation",
    "make_report",
    "merge",
    "to_html",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_DOORS[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
