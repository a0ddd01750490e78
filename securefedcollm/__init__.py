"""securefedcollm: federated co-tuning of a server's LLM and its silos' SLMs, privacy checkable.

::

    import securefedcollm as sfc

    study = sfc.load_study("quickstart", {"rounds": 2})
    run = sfc.simulate(study, out="runs/mine")
    print(run.table, run.epsilon, run.adapters)
    assert sfc.verify(run.bundle()).holds

    total = sfc.secure_sum({"clinic-1": v1, "clinic-2": v2, "clinic-3": v3})

What ``__all__`` names is the public interface: it changes only with a new minor version, and with
an entry in CHANGELOG.md. Nothing is imported before it is used; ``secure_sum`` and ``verify`` never
import torch.

The rooms, in the order in which one update walks through them: ``study`` (what everybody agreed),
``tuning`` (the only one with torch), ``privacy``, ``aggregation``, ``evidence``, ``federation``
(the loops that join them), ``simulation`` (all roles on one machine) and ``experiment`` (several
runs beside each other). See ``docs/`` for the threat model and the protocol.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from securefedcollm.version import __version__

if TYPE_CHECKING:
    from securefedcollm_audits import Verdict as Verdict
    from securefedcollm_audits import verify as verify

    from securefedcollm.api.questions import Answer as Answer
    from securefedcollm.api.questions import Cited as Cited
    from securefedcollm.api.questions import Shelf as Shelf
    from securefedcollm.api.questions import ask as ask
    from securefedcollm.api.questions import build_index as build_index
    from securefedcollm.api.questions import make_reduction as make_reduction
    from securefedcollm.api.runs import Run as Run
    from securefedcollm.api.runs import Score as Score
    from securefedcollm.api.runs import plan_budget as plan_budget
    from securefedcollm.api.runs import simulate as simulate
    from securefedcollm.api.runs import simulate_own as simulate_own
    from securefedcollm.api.sums import secure_sum as secure_sum
    from securefedcollm.errors import BudgetExceeded as BudgetExceeded
    from securefedcollm.errors import ConfigError as ConfigError
    from securefedcollm.errors import SecureFedCoLLMError as SecureFedCoLLMError
    from securefedcollm.privacy.planner import Plan as Plan
    from securefedcollm.simulation.ask_records import Vote as Vote
    from securefedcollm.simulation.ask_records import ask_records as ask_records
    from securefedcollm.simulation.ask_records import ask_records_from as ask_records_from
    from securefedcollm.study import Study as Study
    from securefedcollm.study import dump_study as dump_study
    from securefedcollm.study import load_study as load_study

_DOORS: Final = {
    "Answer": "securefedcollm.api.questions",
    "BudgetExceeded": "securefedcollm.errors",
    "Cited": "securefedcollm.api.questions",
    "ConfigError": "securefedcollm.errors",
    "Plan": "securefedcollm.privacy.planner",
    "Run": "securefedcollm.api.runs",
    "Score": "securefedcollm.api.runs",
    "SecureFedCoLLMError": "securefedcollm.errors",
    "Shelf": "securefedcollm.api.questions",
    "Study": "securefedcollm.study",
    "Verdict": "securefedcollm_audits",
    "Vote": "securefedcollm.simulation.ask_records",
    "ask": "securefedcollm.api.questions",
    "ask_records": "securefedcollm.simulation.ask_records",
    "ask_records_from": "securefedcollm.simulation.ask_records",
    "build_index": "securefedcollm.api.questions",
    "dump_study": "securefedcollm.study",
    "load_study": "securefedcollm.study",
    "make_reduction": "securefedcollm.api.questions",
    "plan_budget": "securefedcollm.api.runs",
    "secure_sum": "securefedcollm.api.sums",
    "simulate": "securefedcollm.api.runs",
    "simulate_own": "securefedcollm.api.runs",
    "verify": "securefedcollm_audits",
}
__all__ = [
    "Answer",
    "BudgetExceeded",
    "Cited",
    "ConfigError",
    "Plan",
    "Run",
    "Score",
    "SecureFedCoLLMError",
    "Shelf",
    "Study",
    "Verdict",
    "Vote",
    "__version__",
    "ask",
    "ask_records",
    "ask_records_from",
    "build_index",
    "dump_study",
    "load_study",
    "make_reduction",
    "plan_budget",
    "secure_sum",
    "simulate",
    "simulate_own",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_DOORS[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
