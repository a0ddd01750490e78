"""A finished run's results, beside its evidence: accuracy by method, one row per model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar

from securefedcollm.federation.files import write_durably
from securefedcollm.federation.keeping import BEST, best_round, describe_best
from securefedcollm.federation.parts import validation_study
from securefedcollm.federation.runstore import RunStore
from securefedcollm.privacy.accounting import prv_bounds
from securefedcollm.privacy.adversaries import per_adversary
from securefedcollm.privacy.events import Events
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import Study, digest
from securefedcollm.version import __version__

T = TypeVar("T")

_ORDER: Final = (
    "zero-shot",
    "standalone",
    "FedAvg",
    "FedOpt",
    "FedAvg + central",
    "FedOpt + central",
    "FedCoLLM",
)


def rows(method: str, scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """``{"slm/private": .7, …}`` → one row per model, in the order of ``scores``."""
    found: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        model, _, group = key.partition("/")
        found.setdefault(model, {})[group] = value
    return [{"model": m, "method": method, "accuracy": a} for m, a in found.items()]


def method_of(study: Study) -> str:
    """The name of the study's own run.

    Without an LLM it is FedAvg, or FedOpt with an outer optimiser; ``+ central`` where the server
    tunes on public rows (algorithm 2 of arXiv 2305.11414).
    """
    if study.models.llm is not None:
        return "FedCoLLM"
    server = study.server
    name = "FedOpt" if server and server.outer else "FedAvg"
    return f"{name} + central" if server and server.central else name


def main_method(methods: Iterable[str]) -> str:
    """The study's own run among the methods of its table: all others are baselines."""
    return max((method for method in methods if method in _ORDER), key=_ORDER.index)


def best_method(method: str, best: int) -> str:
    """The name of the row of the best round (from 1); the last round has its own."""
    return f"{method}, round {best} (best)"


def write_results(
    store: RunStore,
    study: Study,
    table: list[dict[str, Any]],
    records: Mapping[str, int | None],
    notes: Sequence[str],
    started: float,
) -> dict[str, Any]:
    """Write ``results.json`` of a finished simulation, and return its content.

    Args:
        table: accuracies, a row for a model and method; sorted here.
        records: number of each silo's records; None where only its own code knows.
        started: ``time.monotonic`` at the start.
    """
    table.sort(
        key=lambda row: (row["model"] != "slm", _ORDER.index(row["method"].partition(",")[0]))
    )
    privacy, history, out = study.privacy, store.state.history, store.directory
    silos = [
        {
            "name": name,
            "records": count,
            **_spent(out / "silos" / name, study),
            "epsilon_budget": privacy.epsilon if privacy else None,
            "delta": privacy.delta if privacy else None,
            "bytes_up": sum(r.get("bytes_up", {}).get(name, 0) for r in history),
            "bytes_down": sum(r.get("bytes_down", {}).get(name, 0) for r in history),
        }
        for name, count in records.items()
    ]
    best = describe_best(study, history)
    results = ({"best": best} if best else {}) | {
        "study": study.study,
        "digest": digest(study).hex(),
        "version": __version__,
        "run_id": store.state.run_id,
        "groups": list(table[0]["accuracy"]) if table else [],
        "table": table,
        "silos": silos,
        "rounds": history,
        "notes": [*notes, *_kept(study, history)],
        "places": {
            "results": str(out / "results.json"),
            "adapters": str(out / "adapters"),
            **({"best": str(out / BEST)} if best else {}),
            "metrics": str(out / "metrics.jsonl"),
        },
        "seconds": round(time.monotonic() - started, 1),
    }
    write_durably(out / "results.json", json.dumps(results, indent=2).encode())
    return results


def _spent(home: Path, study: Study) -> dict[str, Any]:
    """What the silo has spent by its ledger, at the study's δ, per adversary; None without DP.

    ``epsilon_other_accountants``: of the same releases, by the accountants that are not the claim.
    """
    spent: float | None = None
    adversaries: dict[str, float] | None = None
    others: dict[str, float] = {}
    if study.privacy is not None:
        delta = study.privacy.delta
        spent, adversaries = 0.0, {}
        with Ledger(home / "ledger.sqlite", home.name) as ledger:
            mine = {digest(study).hex(), validation_study(study)}  # a ledger may hold others too
            own = [entry for entry in ledger.entries() if entry.about.study in mine]
            firsts = {entry.key[:2]: entry for entry in reversed(own)}
            for account, first in firsts.items():  # of the tuned part, and of the part set aside
                summary = ledger.spent(*account, delta)
                rows = per_adversary(
                    summary.events, [delta], study.silos.colluders, terms=first.terms
                )
                most = summary.claim.epsilon
                if first.budget.delta == delta:
                    most = max(most, ledger.most_spent(first).epsilon)
                if most >= spent:
                    spent = most
                    adversaries = {row.adversary: row.epsilons[0].epsilon for row in rows}
                    others = _other_accountants(tuple(summary.events), delta)
    return {
        "epsilon_spent": spent,
        "epsilon_by_adversary": adversaries,
        "epsilon_other_accountants": others,
    }


@lru_cache  # silos of equal size have the same releases
def _other_accountants(events: Events, delta: float) -> dict[str, float]:
    from securefedcollm.tuning.opinion import opacus_epsilon

    theirs = opacus_epsilon(events, delta)
    if theirs is None:
        return {}
    return {"prv-accountant": prv_bounds(events, delta)[1], "opacus": theirs}


def _kept(study: Study, history: list[dict[str, Any]]) -> list[str]:
    best, keep = best_round(study, history), study.keep
    if best is None or keep is None:
        return []
    by = (
        "by noised accuracy of the SLM on the records that the silos set aside"
        if keep.metric == "private"
        else f"by {keep.metric} of the {keep.best.upper()} on {keep.rows} public questions that "
        "nothing was distilled from"
    )
    notes = [f"Round {best} was the best, {by}. Its adapters are in adapters-best."]
    if len(history) < study.rounds:
        notes.append(
            f"The run ended after {len(history)} of {study.rounds} rounds, {keep.patience} in a "
            "row without a better one. Baselines run all rounds."
            + " The end was chosen on what was released: the promise is the study's ε."
            * (study.privacy is not None)
        )
    return notes


def remembered(path: Path, make: Callable[[], dict[str, T]]) -> dict[str, T]:
    """The JSON in ``path``, made once."""
    if not path.exists():
        write_durably(path, json.dumps(make()).encode())
    content: dict[str, T] = json.loads(path.read_bytes())
    return content
