"""The section of a study that says how members ask each other's documents, or records.

``docs/retrieval.md`` explains both protocols and what their numbers reveal.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from securefedcollm.study.kinds import Hex32, Section, says


class Encoder(Section, frozen=True):
    """The model that turns a text into a vector: the mean of its hidden states over the text."""

    source: Annotated[
        str,
        says(
            "Where the model comes from, as in `models.slm.source`. A causal language model or an "
            "encoder."
        ),
    ]
    revision: Annotated[
        Annotated[str, Meta(pattern=r"^[0-9a-f]{40}(?!\n)$")] | None,
        says("The full commit hash of a hub model.", needed="the source is a hub model"),
    ] = None
    sha256: Annotated[
        Hex32 | None,
        says(
            "Pins weights, configuration and tokenizer, as `securefedcollm model digest --encoder` "
            "prints it.",
            needed="the study has a roster",
        ),
    ] = None
    layer: Annotated[
        Annotated[int, Meta(ge=0, le=1000)] | None,
        says(
            "The layer whose output is averaged; 0 is the token embeddings. If left out, the last, "
            "as encoders are made for. Of a small causal model lower layers often find more."
        ),
    ] = None


class Reduction(Section, frozen=True):
    """A file with the linear map to fewer dimensions (`securefedcollm index reduce`)."""

    source: Annotated[str, says("`path:FILE`, relative to --data.")]
    sha256: Annotated[Hex32, says("Its digest, as `securefedcollm index reduce` prints it.")]


class Retrieval(Section, frozen=True):
    """Private questions to the documents of other members, or to their records.

    With `mode: documents` no silo learns the question. The asker learns the best passages and a
    score of every passage, so documents on a shelf must be ones that members may read: never
    records. With `mode: answers` the silos learn the question, and their records answer it: only a
    noised sum of votes leaves. All records of a silo pay for that once, beforehand.
    """

    encoder: Annotated[Encoder, says("The model that embeds passages and questions.")]
    dimension: Annotated[
        Annotated[int, Meta(ge=1, le=4096)],
        says(
            "Numbers in an embedding after the reduction. About this many questions tell an asker "
            "every embedding on a shelf."
        ),
    ]
    questions: Annotated[
        Annotated[int, Meta(ge=0, le=10**6)],
        says(
            "With `documents`, the most questions of one asker that a shelf answers. All runs and "
            "studies that ask the shelf count together. With `answers`, the number of questions "
            "that one record can answer before its budget is spent; the noise follows from it."
        ),
    ]
    mode: Annotated[
        Literal["documents", "answers"],
        says(
            "`documents`: members may read the passages, and the question is secret. `answers`: "
            "records vote on the asker's choices, and nobody reads them; the silos know the "
            "question."
        ),
    ] = "documents"
    threshold: Annotated[
        Annotated[float, Meta(ge=-1, le=1)] | None,
        says(
            "With `answers`: a record is retrieved if its cosine similarity to the question is at "
            "least this. Then it has given one of its `questions` answers.",
            needed="the mode is `answers`",
        ),
    ] = None
    reader: Annotated[
        Literal["labels", "model"],
        says(
            "With `answers`, what a silo sends. `labels`: each retrieved record votes for the "
            "choice that is its own answer. `model`: the silo's SLM reads the `fetched` best of "
            "the retrieved records and answers once."
        ),
    ] = "labels"
    votes: Annotated[
        Annotated[int, Meta(ge=1, le=4096)],
        says("With `reader: labels`: the most votes of one silo that count for one choice."),
    ] = 256
    epsilon: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        says(
            "With `answers`: what all answers together may cost one record, at `privacy.delta`. If "
            "left out, `privacy.epsilon`. The record's budget, which its owner pins, also pays for "
            "tuning."
        ),
    ] = None
    documents: Annotated[
        Annotated[int, Meta(ge=1, le=2**20)],
        says("Passages on a shelf, at most. Every silo pads its shelf to this number."),
    ] = 2048
    block_bytes: Annotated[
        Annotated[int, Meta(ge=48, le=12_288)],
        says(
            "Bytes of one passage in UTF-8, with its id. A multiple of 3. Longer texts are split."
        ),
    ] = 768
    fetched: Annotated[
        Annotated[int, Meta(ge=1, le=14)],
        says(
            "With `documents`: passages that every question fetches from every silo, wanted or "
            "not. With `reader: model`: the most records that the SLM reads."
        ),
    ] = 10
    reduction: Annotated[
        Reduction | None,
        says(
            "The map to `dimension` numbers. If left out, each participant computes it from the "
            "study's public rows. That suits one machine: another may round differently.",
            needed="the study has a roster",
        ),
    ] = None
