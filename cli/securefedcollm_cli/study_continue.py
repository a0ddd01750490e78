"""``securefedcollm study continue``: write the study that goes on from a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from securefedcollm_cli.options import Overrides


def continue_(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The finished run: a simulation's directory, or the server's."
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="NEW.yaml",
            help="The next study's own keys, as a whole study file [those of the run's study, "
            "under the next name].",
        ),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The file to write [stdout].")
    ] = None,
    orthogonal: Annotated[
        bool,
        typer.Option(
            "--orthogonal",
            help="Keep the new adapter out of what the earlier ones read (ffa-lora; "
            "continue.orthogonal).",
        ),
    ] = False,
    best: Annotated[
        bool,
        typer.Option("--best", help="Start from the best round's adapters, if the study kept one."),
    ] = False,
    called: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="DIR",
            help="What the participants will call the run's directory, relative to their --data "
            "or --models [RUN as given; its last name, if that is absolute].",
        ),
    ] = None,
) -> None:
    """Write the study that starts from what a finished run released.

    The new study names the earlier run's adapters and evidence by their digests, so whoever signs
    it knows what it starts from, and nobody can put another file in their place. Each participant
    needs the earlier adapters as files: `adapters/slm` (the server `adapters/llm` too) of the run,
    or of its own directory of the earlier study.

    `audit verify NEW-BUNDLE --earlier OLD-BUNDLE` follows the chain offline.
    """
    from securefedcollm.federation.continuing import continued, next_tree, with_chain
    from securefedcollm.federation.files import write_durably
    from securefedcollm.study import dump_study, load_study, study_from_tree

    place = called or (run.name if run.is_absolute() else run.as_posix())
    before, chain = continued(run, place, best=best)
    if config is None:
        tree = next_tree(before, chain, orthogonal)
    else:
        tree = with_chain(load_study(config).tree, chain, orthogonal)
    study = load_study(tree, overrides) if overrides else study_from_tree(tree)
    text = dump_study(study)
    if out is None:
        typer.echo(text, nl=False)
        return
    write_durably(out, text.encode())
    typer.echo(f"wrote {out}: {study.study} goes on from {before.study}")
