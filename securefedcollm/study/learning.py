"""The sections that say what a silo learns: models, data, task, adapter."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, field

from securefedcollm.errors import ConfigError
from securefedcollm.study.kinds import Count, Fraction, Hex32, Positive, Section, says

MAX_ABS: Final = 100.0
"""Default of ``adapter.max_abs``: a hundred times what tuning makes."""


class Model(Section, frozen=True):
    """Where a base model comes from."""

    source: Annotated[
        str,
        says(
            "Where the model comes from: `builtin:NAME` (made on first use), `path:DIR` (a "
            "transformers directory with safetensors weights, relative to --data) or "
            "`hub:ORG/NAME`. With `task.kind: own` it is `own:NAME`, a name alone."
        ),
    ]
    revision: Annotated[
        Annotated[str, Meta(pattern=r"^[0-9a-f]{40}(?!\n)$")] | None,
        says("The full commit hash of a hub model.", needed="the source is a hub model"),
    ] = None
    sha256: Annotated[
        Hex32 | None,
        says(
            "Pins weights, configuration, tokenizer and chat template, as `securefedcollm model "
            "digest` prints it. A participant whose files differ refuses to run."
        ),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        says("Number format of the frozen weights; bfloat16 halves the memory."),
    ] = "float32"
    quantization: Annotated[
        Literal["none", "int8", "nf4"],
        says(
            "Rounds the frozen weights of linear layers to 8 bits (`int8`) or about 4 (`nf4`, as "
            "in QLoRA) after the files are read. It saves memory, and costs time and some "
            "accuracy. Products are computed in `dtype`. Every participant that loads the model "
            "needs the package bitsandbytes."
        ),
    ] = "none"
    checkpointing: Annotated[
        bool,
        says(
            "Distillation and tuning keep only the input of each layer, and compute the rest again "
            "for the gradients: less memory, about a third more time, the same result. Gradients "
            "of single records do not use it."
        ),
    ] = False
    ask: Annotated[
        Literal["cloze", "letters"],
        says(
            "How a question with choices is put to this model. `cloze`: each choice is scored as "
            "the text that follows the question, which suits small base models. `letters`: the "
            "choices are listed, and the model names a letter, in its chat template if it has one, "
            "which suits larger instruct models. The two models may be asked differently; `model "
            "calibrate` measures both."
        ),
    ] = "cloze"
    temperature: Annotated[
        Positive | None,
        says(
            "`task.score_temperature` for this model alone, as `model calibrate` finds it. If left "
            "out, that."
        ),
    ] = None
    top_layers: Annotated[
        Count | None,
        says(
            "`adapter.top_layers` for this model alone. A large teacher may learn in few layers, "
            "and a small student in all: their number. If left out, `adapter.top_layers`."
        ),
    ] = None


class Models(Section, frozen=True):
    """The model that every silo tunes, and the server's large one.

    Without ``llm`` the study tunes one model: plain FedAvg, private as the study says. The server
    then has no phase of its own and needs no public questions.
    """

    slm: Annotated[Model, says("The model that every silo tunes.")]
    llm: Annotated[
        Model | None,
        says(
            "The server's large model, which teaches the small one and learns from it. Without it "
            "the study tunes one model (plain FedAvg)."
        ),
    ] = None


class Data(Section, frozen=True):
    """The task's records: which are public, and how ``simulate`` deals out the rest.

    Leave out all of these keys where every participant has its own file, as with real roles or
    ``simulate --silo NAME=FILE``.
    """

    builtin: Annotated[
        Literal["hospitals", "digits", "wards"] | None,
        says(
            "Generates an embedded world; no files are needed. `hospitals`: questions about "
            "medicine. `digits`: pictures of handwritten digits, with `task.kind: "
            "image_classification`. `wards`: recordings of spoken words, with `task.kind: "
            "audio_classification`."
        ),
    ] = None
    train: Annotated[
        str | None,
        says(
            "The file with the training records (JSONL, CSV, Parquet or npz) under --data.",
            needed="simulate deals out files",
        ),
    ] = None
    test: Annotated[
        str | None,
        says("The file with the test records under --data.", needed="simulate deals out files"),
    ] = None
    public: Annotated[
        Count | None,
        says(
            "Training records that are public: the first ones after shuffling. The server's phase "
            "learns from them.",
            needed="simulate deals out files and there is an LLM",
        ),
    ] = None
    public_labelled: Annotated[
        Annotated[int, Meta(ge=0)],
        says("Public records that keep their answers; at most `public`."),
    ] = 0
    per_silo: Annotated[
        Count | None,
        says(
            "Records that each silo gets (their mean, with `skew`). The default of the embedded "
            "hospitals is 3,000, that of the digits and wards 1,000.",
            needed="simulate deals out files",
        ),
    ] = None
    max_test: Annotated[
        Count | None,
        says(
            "Takes only the first rows of the test file, in its order: shuffle a sorted file first."
        ),
    ] = None
    partition: Annotated[
        Literal["iid", "dirichlet"] | None,
        says(
            "How records are dealt to the silos: `iid`, or `dirichlet`, where each group's "
            "records (subjects of questions, labels, disease families) follow a Dirichlet draw "
            "over the silos. If left out, files are dealt `iid`, each hospital has its own "
            "families, each site of the digits its own scanner, and each ward its own voices."
        ),
    ] = None
    part: Annotated[
        Annotated[str, Meta(pattern=r"^[1-8]/[1-8](?!\n)$")] | None,
        says(
            "Of the embedded world only: the part of its disease families that the silos' records "
            "are about, such as `2/3` for the second third. Test questions about house rules are "
            "then in a group for each part. If left out, records are about all families."
        ),
    ] = None
    alpha: Annotated[
        Positive,
        says(
            "Concentration of the Dirichlet draw. The smaller it is, the more of a group one "
            "silo has."
        ),
    ] = 0.5
    skew: Annotated[
        Annotated[float, Meta(ge=1, le=1000)],
        says("Size of the largest silo divided by that of the smallest."),
    ] = 1.0

    @property
    def part_of(self) -> tuple[int, int] | None:
        """``part`` as (number from 0, how many there are)."""
        if self.part is None:
            return None
        number, _, parts = self.part.partition("/")
        return int(number) - 1, int(parts)


RowKind = Literal[
    "multiple_choice",
    "classification",
    "instruction",
    "text",
    "image_classification",
    "audio_classification",
]
"""The kinds of record that this project reads and trains on."""
SIGNALS: Final = frozenset({"image_classification", "audio_classification"})
"""Those whose models are classifiers of what is seen or heard."""


class Task(Section, frozen=True):
    """What the models learn."""

    data: Annotated[Data, says("Which records there are.")] = Data()
    kind: Annotated[
        Literal[RowKind, "own"],
        says(
            "What a record is. `multiple_choice`: question, choices, answer. `classification`: "
            "text and label; the model scores the labels as words. `instruction`: instruction "
            "and response, tuned on the response, in the tokenizer's chat template if it has "
            "one. `text`: text, tuned on every token. `image_classification`: picture and label; "
            "the models are classifiers, and distributions over the labels are what they "
            "exchange. `audio_classification`: recording and label, likewise. `own`: the silos "
            "train with their own code, on their own data (from Python)."
        ),
    ] = "multiple_choice"
    labels: Annotated[
        list[str],
        says(
            "The labels of a classification, as words.",
            needed="`kind` is classification, image_classification or audio_classification",
        ),
    ] = field(default_factory=list)
    score: Annotated[
        Literal["plain", "length", "pmi", "pmi-length"],
        says(
            "How the log-likelihood of a choice or label becomes its score: as it is "
            "(`plain`), per character (`length`), minus the log-likelihood after a neutral "
            "prompt (`pmi`), or `pmi` per character (`pmi-length`)."
        ),
    ] = "plain"
    score_temperature: Annotated[
        Positive,
        says(
            "The prediction is softmax(score / this). At 1 a sum over the tokens of long "
            "choices is much too confident, and a score per character is hardly confident at "
            "all."
        ),
    ] = 1.0
    max_tokens: Annotated[
        Count,
        says(
            "Largest number of tokens of prompt and answer together. A longer prompt loses its "
            "beginning, a longer text its end."
        ),
    ] = 256
    max_seconds: Annotated[
        Annotated[float, Meta(ge=0.1, le=60)],
        says(
            "Of recordings: the most seconds that count. A longer one loses its end, and a shorter "
            "one is followed by silence up to this length, or up to the model's own (AST, Whisper)."
        ),
    ] = 10.0
    columns: Annotated[
        dict[str, str],
        says("What the files call these columns, e.g. `{text: note, label: department}`."),
    ] = field(default_factory=dict)
    template: Annotated[
        str | None,
        says(
            "The prompt around a question or text, which replaces {}. If left out: `Question: "
            "{}\\nAnswer:` or `Text: {}\\nLabel:`."
        ),
    ] = None

    @property
    def senses(self) -> bool:
        """Whether the models see or hear, and read no text."""
        return self.kind in SIGNALS

    @property
    def rows(self) -> RowKind:
        """:attr:`kind`, for code that reads records.

        Raises:
            ConfigError: own training reads its own records.
        """
        if self.kind == "own":
            raise ConfigError(
                "the silos of this study train with their own code",
                where="task.kind",
                hint="run it from Python with securefedcollm.simulate_own: see docs/training.md",
            )
        return self.kind


VIRTUAL_TOKENS: Final = 16
"""Default of ``adapter.virtual_tokens``."""
VIRTUAL: Final = frozenset({"prompt", "prefix"})
"""The methods whose adapter is virtual tokens, and no low-rank matrices."""


class Adapter(Section, frozen=True):
    """What is tuned: an adapter (PEFT), low-rank or of virtual tokens, on a frozen base; or all."""

    method: Annotated[
        Literal["ffa-lora", "rolora", "lora", "prompt", "prefix", "full"],
        says(
            "`ffa-lora` trains B only, with A fixed by the seed: exact under a sum. `rolora` "
            "trains B and A in alternate rounds: exact in each round. `lora` trains both, as the "
            "FedCoLLM paper does: the mean of products is not the product of means, so it is "
            "inexact. `prompt` trains vectors before the input's tokens, `prefix` keys and values "
            "before those of every layer: exact, and fewer values. `full` trains all weights of "
            "the small model: exact, and as many values as it has."
        ),
    ] = "ffa-lora"
    rank: Annotated[Count, says("Rank of a low-rank adapter's matrices.")] = 8
    alpha: Annotated[Positive, says("A low-rank adapter's output is scaled by alpha / rank.")] = (
        16.0
    )
    dropout: Annotated[
        Fraction,
        says("A low-rank adapter's own dropout; 0 with privacy for a record or subject."),
    ] = 0.0
    targets: Annotated[
        Literal["all-linear"] | list[str],
        says(
            "The layers that get a low-rank adapter: `all-linear`, or names such as "
            "[q_proj, v_proj]."
        ),
    ] = "all-linear"
    top_layers: Annotated[
        Count | None,
        says("Number of last layers that get a low-rank adapter. If left out, all layers do."),
    ] = None
    virtual_tokens: Annotated[
        Count | None,
        says(
            "Number of virtual tokens of a `prompt` or `prefix`. If left out, 16. Other methods "
            "have none."
        ),
    ] = None
    layout: Annotated[
        Hex32 | None, says("Pins names and shapes of the adapter's values (a digest).")
    ] = None
    max_abs: Annotated[
        Positive,
        says(
            "Largest absolute value in the global adapter; of `full`, the largest change of a "
            "weight. A silo refuses an adapter with a larger value before it touches data. Tuning "
            "gives values of about 1; an attacker would use far larger ones to read rounding "
            "errors."
        ),
    ] = MAX_ABS

    @property
    def tokens(self) -> int:
        """Virtual tokens before every input: 0 for low-rank adapters."""
        return (self.virtual_tokens or VIRTUAL_TOKENS) if self.method in VIRTUAL else 0

    @property
    def summary(self) -> str:
        """Method and size in a few words."""
        if self.method == "full":
            return "full, all weights"
        if self.method in VIRTUAL:
            return f"{self.method}, {self.tokens} virtual tokens"
        return f"{self.method}, rank {self.rank}, α {self.alpha:g}"
