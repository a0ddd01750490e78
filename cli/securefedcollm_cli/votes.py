"""``securefedcollm ask`` where the silos' records vote on the question."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import MOST_MESSAGE, decode_json, printable
from securefedcollm_cli.progress import Bars

if TYPE_CHECKING:
    from securefedcollm.simulation.ask_records import Vote
    from securefedcollm.study import Study


class How(NamedTuple):
    """The options of the same names; ``asker``: ``--as``."""

    asker: str | None
    out: Path | None
    home: Path | None
    data: Path | None
    as_json: bool


def ask_voters(
    question: str,
    choices: Sequence[str] | None,
    study: Study,
    records: Sequence[str] | None,
    how: How,
) -> None:
    """Ask, and show what the records say."""
    from securefedcollm.simulation.ask_records import ask_records, ask_records_from

    as_json = how.as_json
    words, listed = _parsed(question, choices)
    if how.home is not None:
        vote = ask_records_from(how.home, words, listed, study)
    else:
        with Bars(quiet=as_json) as bars:
            vote = ask_records(
                words,
                listed,
                study,
                records=named_files(records, "--records") if records else None,
                asker=how.asker or "server",
                out=how.out,
                data=how.data,
                progress=bars.report,
            )
    if as_json:
        typer.echo(json.dumps(_plain(vote), indent=2))
    else:
        _render(vote)


def named_files(options: Sequence[str], where: str) -> dict[str, Path]:
    """The files of ``NAME=FILE`` options, by name.

    Raises:
        ConfigError: one is not of this form, or a name is there twice.
    """
    found: dict[str, Path] = {}
    for option in options:
        name, _, file = option.partition("=")
        if not name or not file or name in found:
            kind = "INDEX" if where == "--shelf" else "FILE"
            raise ConfigError(
                f"{option!r} is not NAME={kind}, or a silo that was given before",
                where=where,
                hint=f"e.g. {where} silo-1=silo-1.{kind.lower()}",
            )
        found[name] = Path(file)
    return found


def _parsed(given: str, choices: Sequence[str] | None) -> tuple[str, list[str]]:
    """The question and its choices: from JSON, from options, or from the terminal."""
    if given.lstrip().startswith("{"):
        return _from_json(given, choices)
    listed = list(choices or ())
    if not listed and sys.stdin.isatty():
        while text := typer.prompt("choice (empty: no more)", default="", err=True):
            listed.append(str(text))
    if not listed:
        raise ConfigError(
            "nothing to choose from",
            where="--choice",
            hint='give --choice for each, or JSON: {"question": "…", "choices": ["…", "…"]}',
        )
    return given, listed


def _from_json(given: str, choices: Sequence[str] | None) -> tuple[str, list[str]]:
    try:
        plain: Any = decode_json(given)
        words, listed = plain["question"], plain["choices"]
        fits = isinstance(words, str) and isinstance(listed, list)
        fits = fits and all(isinstance(one, str) for one in listed)
    except (ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits or choices:
        raise ConfigError(
            "is no question with choices" if not choices else "has choices of its own",
            where="QUESTION",
            hint='{"question": "…", "choices": ["…", "…"]}, without --choice',
        )
    return words, listed


def _plain(vote: Vote) -> dict[str, Any]:
    return {
        "choice": vote.choice,
        "votes": {choice: round(votes, 3) for choice, votes in vote.votes.items()},
        "sigma": round(vote.sigma, 4),
        "doubt": float(f"{vote.doubt:.3g}"),
        "counted": list(vote.counted),
        "failed": dict(vote.failed),
        "questions": vote.questions,
        "epsilon": vote.epsilon,
        "delta": vote.delta,
        "bytes_sent": vote.sent,
        "bytes_received": vote.received,
        "seconds": round(vote.seconds, 3),
        "directory": str(vote.directory),
        "left_out": dict(vote.left_out),
    }


def _render(vote: Vote) -> None:
    ranked = sorted(vote.votes.items(), key=lambda pair: -pair[1])
    for choice, votes in ranked:
        typer.echo(f"{votes:>8.1f}  {printable(choice, MOST_MESSAGE)}")
    typer.echo(
        f"each ± {1.96 * vote.sigma:.1f} (95 %) by noise; between two equal choices noise makes "
        f"such a lead with probability {vote.doubt:.2g}"
    )
    for silo, why in vote.failed.items():
        typer.secho(f"{printable(silo)} did not answer: {printable(why)}", fg="yellow")
    for silo, count in vote.left_out.items():
        typer.secho(
            f"{count:,} records of {printable(silo)} have no budget left for answers, or no words, "
            "and cast no vote: securefedcollm budget set",
            fg="yellow",
        )
    total = len(vote.counted) + len(vote.failed)
    typer.echo(
        f"{len(vote.counted)} of {total} silos voted; {vote.sent:,} bytes up, "
        f"{vote.received:,} down, {vote.seconds:.2f} s"
    )
    typer.echo(
        f"a record can answer {vote.questions} questions within ε = {vote.epsilon:g} at "
        f"δ = {vote.delta:g}; evidence in {printable(vote.directory, MOST_MESSAGE)}"
    )
