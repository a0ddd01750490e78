"""``securefedcollm index …`` and ``securefedcollm ask``: questions to documents and to records."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import MOST_MESSAGE, printable
from securefedcollm_cli.options import Columns, DataDir, Json, Overrides
from securefedcollm_cli.progress import Bars
from securefedcollm_cli.trained import Revision, choose_model
from securefedcollm_cli.votes import How, ask_voters, named_files

if TYPE_CHECKING:
    from securefedcollm.api.questions import Answer
    from securefedcollm.tuning.cited import Written

app = typer.Typer(no_args_is_help=True, help="Make a silo's shelf of documents, at the silo.")

StudyOption = Annotated[
    Path,
    typer.Option(
        "--study",
        metavar="CONFIG",
        help="The study, with a section `retrieval`: a YAML file, or the name of one that comes "
        "with securefedcollm.",
    ),
]


_ROLES: Final[dict[str, Literal["llm", "slm"]]] = {"llm": "llm", "slm": "slm"}

_MOST_QUESTION: Final = 1 << 20
"""Bytes of a question from standard input; an encoder reads 512 tokens."""


@app.command()
def build(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES",
            help="Documents: .txt, .md, .jsonl, .csv, .parquet; or builtin:SILO, the house rules "
            "of a hospital of the embedded world.",
        ),
    ],
    study: StudyOption,
    out: Annotated[Path, typer.Option("--out", metavar="INDEX", help="Where to put the index.")],
    overrides: Overrides = None,
    data: DataDir = None,
    column: Columns = None,
    as_json: Json = False,
) -> None:
    """Cut documents into passages, embed them, and write one index file.

    A paragraph of a text file is a passage, and so is the column `text` of a row. Members of the
    consortium may read every passage: put no records on a shelf. Prints the index's fingerprint,
    which evidence will name.
    """
    from securefedcollm.api.questions import build_index
    from securefedcollm_cli.options import task_of

    columns = task_of("text", None, column).columns if column else {}
    with Bars(quiet=as_json) as bars:
        made = build_index(
            _study(study, overrides), files, out, data=data, columns=columns, progress=bars.report
        )
    facts = {
        "index": str(made.path),
        "passages": made.passages,
        "bytes": made.path.stat().st_size,
        "fingerprint": made.fingerprint,
        "encoder": made.encoder,
    }
    _show(facts, as_json)


@app.command()
def reduce(
    study: StudyOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to put the map.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Public text, one text a line; or rows of questions (repeatable) [the study's "
            "public rows].",
        ),
    ] = None,
    overrides: Overrides = None,
    data: DataDir = None,
    as_json: Json = False,
) -> None:
    """Make the public map from the encoder's dimension to `retrieval.dimension`, from public text.

    It is needed where participants are on several machines. Give the file to all of them, and name
    it in the study: `retrieval.reduction: {source: "path:FILE", sha256: …}`.
    """
    from securefedcollm.api.questions import make_reduction

    with Bars(quiet=as_json) as bars:
        agreed = _study(study, overrides)
        digest = make_reduction(agreed, out, text=text or (), data=data, progress=bars.report)
    _show({"reduction": str(out), "sha256": digest}, as_json)


def ask(
    study: StudyOption,
    question: Annotated[
        str | None,
        typer.Argument(
            help="`-` reads the question from standard input; left out, a terminal is asked for "
            "it. A question that stands here can be read by every user of this machine while the "
            "command runs, and stays in the shell's history. A question to records may be JSON: "
            '{"question": "…", "choices": ["…", "…"]}.'
        ),
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(
            "--choice",
            metavar="TEXT",
            help="With records: an answer to choose from (repeat) [from the JSON, or asked for at "
            "a terminal].",
        ),
    ] = None,
    records: Annotated[
        list[str] | None,
        typer.Option(
            "--records",
            metavar="NAME=FILE",
            help="With records: a silo and the file of its records (repeat for each silo) [what "
            "the study deals out in a simulation].",
        ),
    ] = None,
    shelf: Annotated[
        list[str] | None,
        typer.Option(
            "--shelf",
            metavar="NAME=INDEX",
            help="A silo and its index (repeat for each silo): every role on this machine.",
        ),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(
            "--home",
            metavar="DIR",
            help="Ask over the network in the name of the member whose directory this is. Its "
            "`shelf serve` (at the server: `shelf relay`) must be running.",
        ),
    ] = None,
    asker: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Who asks, with --shelf: a silo [server]."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The run's directory, with everybody's evidence; also that of a finished "
            "simulation of this study [runs/STUDY].",
        ),
    ] = None,
    overrides: Overrides = None,
    data: DataDir = None,
    generate: Annotated[
        str | None,
        typer.Option(
            "--generate",
            metavar="MODEL",
            help="Also write an answer with the passages: llm or slm, the run's own (with its "
            "adapter, if there is one), or a model: builtin:, hub:, path: or a directory.",
        ),
    ] = None,
    revision: Revision = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Largest number of tokens of that answer.")
    ] = 120,
    as_json: Json = False,
) -> None:
    """Ask all silos' documents a question that no silo can read, or let their records vote.

    With --home a member of a signed study asks over the network. Else every role is on this
    machine, to try it out: with --shelf for documents; records are those that the study deals out.

    With `retrieval.mode: documents` no silo can read the question. Shows the best passages with
    their silo and id. Each silo counts the question, and answers one asker no more than
    `retrieval.questions`. With `mode: answers` the silos know the question, and their records vote
    on its choices. Shows the sum of all votes, with noise. A silo's records pay for it beforehand,
    and one that cannot pay casts no vote.
    `securefedcollm audit bundle DIR` packs the evidence.
    """
    from securefedcollm.api.questions import ask as ask_all

    agreed = _study(study, overrides)
    if agreed.retrieval is not None and agreed.retrieval.mode == "answers":
        for given, name in ((shelf, "--shelf"), (generate, "--generate")):
            if given:
                raise ConfigError(
                    "records are asked, and nobody reads them", where=name, hint="leave it out"
                )
        _check_here(home, {"--records": records, "--as": asker, "--out": out})
        how = How(asker, out, home, data, as_json)
        ask_voters(_question(question), choice, agreed, records, how)
        return
    for given, name in ((choice, "--choice"), (records, "--records")):
        if given:
            raise ConfigError(
                "this study asks documents",
                where=name,
                hint="leave it out, or choose retrieval.mode: answers",
            )
    _check_how(home, shelf, asker, out)
    words = _question(question)
    with Bars(quiet=as_json) as bars:
        answer = ask_all(
            words,
            agreed,
            shelves=named_files(shelf or (), "--shelf"),
            asker=asker or "server",
            home=home,
            out=out,
            data=data,
            progress=bars.report,
        )
        written = None
        if generate is not None and answer.passages:
            written = _write(words, answer, (generate, revision), max_tokens, data, bars)
    if as_json:
        typer.echo(json.dumps(_plain(answer, written), indent=2))
    else:
        _render(answer, written)
    if not answer.answered:
        raise typer.Exit(1)


def _check_how(
    home: Path | None, shelf: Sequence[str] | None, asker: str | None, out: Path | None
) -> None:
    """Over the network, or all roles here: not both."""
    _check_here(home, {"--shelf": shelf, "--as": asker, "--out": out})
    if home is None and not shelf:
        raise ConfigError(
            "whom to ask?",
            where="--home",
            hint="--home DIR asks over the network; --shelf NAME=INDEX plays every role here",
        )


def _check_here(home: Path | None, options: Mapping[str, object]) -> None:
    for option, given in options.items():
        if home is not None and given:
            raise ConfigError(
                "is for all roles on one machine",
                where=option,
                hint="with --home the silos have their own shelves or records, and this member's "
                "evidence is in its home",
            )


def _question(given: str | None) -> str:
    """The question: the argument, standard input or an answer at the terminal.

    Adversary: another user of this machine, to whom the arguments of every process are shown; and
    whoever reads the shell's history later.
    """
    if given not in {None, "-"}:
        return str(given)
    if sys.stdin.isatty():
        return str(typer.prompt("question", err=True))
    if given is None:
        raise ConfigError(
            "no question", where="QUESTION", hint="write `-` to read it from standard input"
        )
    content = typer.get_binary_stream("stdin").read(_MOST_QUESTION + 1)
    if len(content) > _MOST_QUESTION:
        raise ConfigError("is too long", where="QUESTION", hint="ask one question")
    try:
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text", where="QUESTION", hint="save it as UTF-8") from None


def _write(
    question: str,
    answer: Answer,
    model: tuple[str, str | None],
    max_tokens: int,
    data: Path | None,
    bars: Bars,
) -> Written:
    """An answer with the passages, by the run's model or a named one (source and revision)."""
    from securefedcollm.tuning.cited import write_answer

    source, revision = model
    place = data or Path()
    if source in {"llm", "slm"}:
        run, role = answer.directory, _ROLES[source]
        base = not (run / "adapters" / role).exists()
        chosen = choose_model(run, role, None, None, None, place, "cpu", bars, base=base)
    else:
        chosen = choose_model(None, None, source, revision, None, place, "cpu", bars)
    texts = [hit.text for hit in answer.passages]
    return write_answer(
        chosen.loaded, question, texts, adapter=chosen.adapter, max_tokens=max_tokens
    )


def _study(file: Path, overrides: Sequence[str] | None) -> Any:
    from securefedcollm.study import load_study

    return load_study(file, overrides or [])


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        typer.echo(printable(f"{key:<12} {value}", MOST_MESSAGE))


def _plain(answer: Answer, written: Written | None) -> dict[str, Any]:
    text = {} if written is None else {"answer": written._asdict()}
    return text | {
        "passages": [
            {"silo": hit.silo, "id": hit.id, "score": round(hit.score, 4), "text": hit.text}
            for hit in answer.passages
        ],
        "answered": answer.answered,
        "failed": dict(answer.failed),
        "suspect": dict(answer.suspect),
        "spent": dict(answer.spent),
        "limit": answer.limit,
        "bytes_sent": answer.sent,
        "bytes_received": answer.received,
        "seconds": round(answer.seconds, 3),
        "directory": str(answer.directory),
    }


def _render(answer: Answer, written: Written | None) -> None:
    """Adversary: a silo whose passage or id holds escape sequences or line breaks."""
    if written is not None:
        typer.echo(printable(written.text, MOST_MESSAGE))
        for number in written.named or written.given:
            hit = answer.passages[number - 1]
            how = "cites" if written.named else "was given"
            typer.echo(f"    {how} [{number}] {printable(hit.silo)}: {printable(hit.id)}")
        typer.echo("")
    for place, hit in enumerate(answer.passages, start=1):
        typer.echo(f"{place:>2}  {hit.score:.3f}  {printable(hit.silo)}: {printable(hit.id)}")
        typer.echo(f"    {printable(hit.text, MOST_MESSAGE)}")
    for silo, why in answer.failed.items():
        typer.secho(f"nothing from {printable(silo)}: {printable(why)}", fg="yellow")
    for silo, why in answer.suspect.items():
        typer.secho(f"do not trust {printable(silo)}: it {printable(why)}", fg="red")
    total = len(answer.answered) + len(answer.failed)
    typer.echo(
        f"{len(answer.answered)} of {total} silos answered; {answer.sent:,} bytes up, "
        f"{answer.received:,} down, {answer.seconds:.2f} s"
    )
    most = max(answer.spent.values(), default=0)
    typer.echo(f"{most} of {answer.limit} questions are spent; evidence in {answer.directory}")
