"""What a silo's operator reads before members may ask its documents or its records."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import MOST_MESSAGE, printable

if TYPE_CHECKING:
    from securefedcollm.federation.roles import AnswerTerms, ShelfTerms


def show_terms(terms: ShelfTerms | AnswerTerms, as_json: bool) -> None:
    """Show what agreeing means."""
    if as_json:
        figures = {k: None if v == float("inf") else v for k, v in asdict(terms).items()}
        typer.echo(json.dumps({"event": "terms", **figures}))
        return
    from securefedcollm.federation.roles import ShelfTerms

    shown = _reading(terms) if isinstance(terms, ShelfTerms) else _of_records(terms)
    for key, value in shown.items():
        # Adversary: the study's author, who chose the names.
        typer.echo(printable(f"{key:<9} {value}", MOST_MESSAGE), err=True)


def _reading(terms: ShelfTerms) -> dict[str, str]:
    spent = ", ".join(f"{asker} {count}" for asker, count in terms.spent.items() if count)
    shown = {
        "study": f"{terms.study}, sha256:{terms.digest}, signed by all",
        "server": f"{terms.server} carries the questions, and may ask itself",
        "shelf": f"{terms.passages:,} passages of {terms.documents:,}; {terms.index[:16]}…",
        "may ask": ", ".join(terms.askers),
        "limit": f"{terms.questions:,} questions of each, in all runs and studies together",
        "asked": spent or "nobody has asked this shelf yet",
        "together": f"{terms.together} of them may collude, and have {terms.pooled:,} questions; "
        f"{terms.telling:,} tell all embeddings (dimension {terms.dimension})",
        "reveals": f"a question tells a score of every passage, and {terms.fetched} whole passages "
        "that the asker chooses",
    }
    if terms.reads_all:
        shown["WARNING"] = (
            f"{terms.pooled:,} questions tell all embeddings on this shelf, and so much of every "
            "text; --questions lowers the limit of each asker"
        )
    return shown


def _of_records(terms: AnswerTerms) -> dict[str, str]:
    from securefedcollm.privacy.shown import up

    left_out = f", without {terms.left_out:,} that cannot pay" if terms.left_out else ""
    whose = "each record that is alike votes for its own answer"
    if terms.reader == "model":
        whose = "the SLM reads those that are alike, and answers once"
    asking = ", ".join(terms.askers)
    pin = "" if terms.pinned else "; agreeing pins that budget"
    shown = {
        "study": f"{terms.study}, sha256:{terms.digest}, signed by all",
        "server": f"{terms.server} carries the questions and reads them, and may ask itself",
        "records": f"{terms.records:,} records{left_out}; they stay on this machine",
        "may ask": f"{asking}; the asker chooses the questions, after it has seen earlier answers",
        "answers": f"{whose}, where the similarity is at least {terms.threshold:g}",
        "leaves": f"masked votes, at most {terms.votes:,} a choice; only the sum of at least "
        f"{terms.quorum} silos is opened, with noise against {terms.colluders} that collude with "
        "the asker",
        "limit": f"a record answers {terms.questions:,} questions, then it is silent; silos are "
        "asked as often as members like",
        "privacy": f"all answers of a record spend ε = {terms.epsilon:g} (δ = {terms.delta:g}); "
        "every record pays that now, whether it is asked or not",
        "budget": f"the record that has spent most has spent ε = {up(terms.spent)} of "
        f"{terms.budget:g} (δ = {terms.budget_delta:g}); with this it would be {up(terms.after)}"
        f"{pin}",
        "time": f"replies leave at multiples of {terms.slot:g} s, which hides how long your "
        "records take, as long as that is less",
    }
    if terms.left_out == terms.records:
        shown["WARNING"] = (
            "no record can pay, so this silo would send noise only; `securefedcollm budget show` "
            "says what is spent"
        )
    return shown


def confirm(yes: bool) -> None:
    if yes or typer.confirm("Answer their questions?", default=False, err=True):
        return
    raise ConfigError("not agreed; nothing was answered", hint="--yes agrees without asking")
