"""The space of a study's embeddings: its encoder and its public reduction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from securefedcollm.errors import ConfigError, DataError
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.questions.agreed import documents_of as documents_of
from securefedcollm.federation.questions.agreed import plan_of as plan_of
from securefedcollm.federation.questions.agreed import terms_of as terms_of
from securefedcollm.retrieval import Reduction
from securefedcollm.retrieval.reduction import HEAD_BYTES, Vectors, dimensions_of, file_bytes
from securefedcollm.retrieval.terms import space_digest
from securefedcollm.study import Study
from securefedcollm.tuning.data import read_text
from securefedcollm.tuning.embed import TextEncoder
from securefedcollm.tuning.models import load_model, local_path
from securefedcollm.tuning.recipe import Progress, silent

_MOST_TEXTS: Final = 4000
"""Public texts that a reduction is made from."""


@dataclass(frozen=True)
class Space:
    """Text → unit vector of the study's ``retrieval.dimension``."""

    encoder: TextEncoder
    reduction: Reduction

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for both: ``Terms.space``."""
        return space_digest(self.encoder.digest, self.encoder.layer, self.reduction.digest)

    def embed(self, texts: Sequence[str], progress: Progress = silent) -> Vectors:
        """Unit vectors, float64 [n, d].

        Raises:
            DataError: a text has no tokens.
        """
        return self.reduction.apply(self.encoder.embed(texts, progress))


def load_encoder(study: Study, data: Path | None, progress: Progress = silent) -> TextEncoder:
    """The study's encoder, its digest checked if the study pins it.

    Args:
        data: directory of the study's ``path:`` models and files.

    Raises:
        ConfigError: it cannot be loaded, or is another than the pinned one.
    """
    spec = plan_of(study).encoder
    loaded = load_model(
        spec.source,
        revision=spec.revision,
        sha256=spec.sha256,
        base_dir=data or Path(),
        progress=progress,
        part="body",
    )
    return TextEncoder(loaded, spec.layer, "retrieval.encoder")


def space_of(study: Study, data: Path | None = None, progress: Progress = silent) -> Space:
    """The study's encoder and reduction. Every participant makes the same one.

    Args:
        data: directory of the study's ``path:`` models and files.

    Raises:
        ConfigError: one of them cannot be loaded, or is another than the pinned one.
        DataError: the public rows give no such reduction.
    """
    encoder = load_encoder(study, data, progress)
    spec = plan_of(study).reduction
    if spec is not None:
        name = spec.source.removeprefix("path:").strip()
        path = local_path(data or Path(), name, "retrieval.reduction.source")
        sizes = encoder.width, plan_of(study).dimension
        return Space(encoder, read_reduction(path, spec.sha256, sizes))
    return Space(encoder, fit_reduction(study, encoder, data=data, progress=progress))


def read_reduction(
    path: Path, pinned: str | None = None, sizes: tuple[int, int] | None = None
) -> Reduction:
    """A file that ``index reduce`` made.

    Adversary: whoever wrote the file. A few bytes on disk may state any size, so no more is read
    than a map of these sizes has.

    Args:
        pinned: its digest, 64 hexadecimal digits.
        sizes: the encoder's numbers, and the study's ``retrieval.dimension``; None: any.

    Raises:
        ConfigError: there is no such file, it is of other sizes, or another than the pinned one.
        DataError: it is damaged.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            stated = dimensions_of(head, where)
            if sizes is not None:
                _check_sizes(stated, sizes, where)
            rest = file.read(file_bytes(*stated) - HEAD_BYTES + 1)
            found = Reduction.decode(head + rest, where)
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})",
            where=where,
            hint="a path: starts at --data; `securefedcollm index reduce` makes the file",
        ) from None
    # Adversary: whoever hands one participant another file than the study was signed for.
    if pinned is not None and found.digest.hex() != pinned:
        raise ConfigError(
            f"it has the digest {found.digest.hex()[:16]}…, the study pins {pinned[:16]}…",
            where=where,
            hint="get the agreed file, or agree on this one",
        )
    return found


def _check_sizes(stated: tuple[int, int], sizes: tuple[int, int], file: str) -> None:
    (before, after), (width, dimension) = stated, sizes
    if before != width:
        raise ConfigError(
            f"{file} maps {before} numbers, and the encoder gives {width}",
            where="retrieval.reduction",
            hint="make the map anew with this encoder: `securefedcollm index reduce`",
        )
    if after != dimension:
        raise ConfigError(
            f"is {dimension}, and {file} maps to {after} numbers",
            where="retrieval.dimension",
            hint=f"write {after}, or make the map anew: `securefedcollm index reduce`",
        )


def fit_reduction(
    study: Study,
    encoder: TextEncoder,
    files: Sequence[Path] = (),
    *,
    data: Path | None = None,
    progress: Progress = silent,
) -> Reduction:
    """A reduction made from public text.

    Args:
        files: the text, as ``model heal --text`` reads it, a line for each text; none: the prompts
            of the study's public rows.
        data: directory of the study's files.

    Raises:
        DataError: a file cannot be read, or there is too little text.
    """
    if files:
        lines = (line for file in files for part in read_text(file) for line in part.split("\n"))
        texts = [line for line in lines if line.strip()]
    else:
        rows = deal(study, data).public
        texts = [row.prompt or row.choices[0] for row in rows]
    try:
        return Reduction.fit(encoder.embed(_spread(texts), progress), plan_of(study).dimension)
    except DataError as error:
        raise DataError(
            error.problem, where="retrieval.reduction, from public text", hint=error.hint
        ) from None


def _spread(texts: Sequence[str]) -> Sequence[str]:
    """At most so many of them, evenly."""
    step = -(-len(texts) // _MOST_TEXTS)
    return texts[:: max(1, step)]
