"""The study: everything that the participants must agree on, as one typed value.

A study is written as YAML (:mod:`securefedcollm.study.load`), checked as a whole
(:mod:`securefedcollm.study.checks`) and identified by a digest (:func:`digest`). It holds what all
participants may know. It never holds a path of private data, a key or a password.

Defaults are the values that a consortium of hospitals would want; a field without a default is one
that nobody can choose for them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Final, Literal

import msgspec
import rfc8785
from msgspec import Meta

from securefedcollm.primitives import sha256
from securefedcollm.study.ring import CkksRing, CkksSet, derive

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}(?!\n)$")]
Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Hex32 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]
SchemeName = Literal["masking", "ckks", "ckks-authority"]
"""The protocols that a sum can be made with."""


MAX_ABS: Final = 100.0
"""Default of ``adapter.max_abs``: a hundred times what tuning makes."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A mapping in the YAML file. Unknown keys are refused."""


class Model(_Section, frozen=True):
    """Where a base model comes from.

    ``source`` is ``builtin:NAME`` (made on first use), ``path:DIR`` (a transformers directory with
    safetensors weights, relative to ``--data``) or ``hub:ORG/NAME`` (then ``revision`` is the full
    commit hash). ``sha256`` pins weights, configuration, tokenizer and chat template, as
    ``securefedcollm model digest`` prints it; a participant whose files differ refuses to run.
    """

    source: str
    revision: Annotated[str, Meta(pattern=r"^[0-9a-f]{40}(?!\n)$")] | None = None
    sha256: Hex32 | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class Models(_Section, frozen=True):
    """The model that every silo tunes (``slm``), and the server's large one (``llm``).

    Without ``llm`` the study tunes one model: plain FedAvg, private as the study says. The server
    then has no phase of its own and needs no public questions.
    """

    slm: Model
    llm: Model | None = None


class Data(_Section, frozen=True):
    """The task's records: what is public to all, and how ``simulate`` deals out the rest.

    ``builtin: hospitals`` generates the embedded world, with ``per_silo`` records in each hospital
    (3,000 if it is not given). Otherwise ``train`` and ``test`` are files
    (JSONL, CSV or Parquet) under ``--data``; the first ``public`` shuffled training questions are
    public, ``public_labelled`` of them with answers; ``simulate`` gives ``per_silo`` of the rest to
    each silo. Where every participant has its own file, as with real roles or ``simulate --silo
    NAME=FILE``, all of these keys are left out. Without ``models.llm`` nothing learns from public
    questions, and ``public`` may be left out. ``max_test`` takes the first rows of the test file,
    in its order: shuffle a sorted file first.

    ``partition`` is how ``simulate`` deals the records out: ``iid``, or ``dirichlet``, where a
    group's records (subjects of questions, labels of a classification, disease families of the
    hospitals) follow a Dirichlet(``alpha``) draw over the silos: the smaller, the more one silo
    owns a group. Left out, files are dealt ``iid`` and every hospital has its own families.
    ``skew`` is the size of the largest silo over that of the smallest; ``per_silo`` is the mean.
    """

    builtin: Literal["hospitals"] | None = None
    train: str | None = None
    test: str | None = None
    public: Count | None = None
    public_labelled: Annotated[int, Meta(ge=0)] = 0
    per_silo: Count | None = None
    max_test: Count | None = None
    partition: Literal["iid", "dirichlet"] | None = None
    alpha: Positive = 0.5
    skew: Annotated[float, Meta(ge=1, le=1000)] = 1.0


class Task(_Section, frozen=True):
    """What is learnt.

    ``multiple_choice``: rows of ``question``, ``choices``, ``answer``. ``classification``: rows of
    ``text`` and ``label``, one of ``labels``; the model scores the labels as words, without a layer
    of its own for them. ``instruction``: rows of ``instruction`` and ``response``, tuned on the
    response, in the tokenizer's chat template if it has one. ``text``: rows of ``text``, tuned on
    every token.

    ``score`` turns the log-likelihoods of choices or labels into scores: as they are, per character
    (``length``), less the log-likelihood after a neutral prompt (``pmi``), or that per character
    (``pmi-length``). The prediction is softmax(score / ``score_temperature``). A sum over the
    tokens of long choices makes for predictions that are much too sure at 1, and per character for
    ones that are hardly sure at all: cross-entropy (``local.loss: choices``) then teaches that
    first.
    ``max_tokens`` bounds prompt and answer: a longer prompt loses its beginning, a longer text its
    end.

    ``columns``: what the files call these columns, e.g. ``{text: note, label: department}``.
    ``template``: the prompt of a question or text, which stands where ``{}`` is; left out,
    ``Question: {}\\nAnswer:`` and ``Text: {}\\nLabel:``.
    """

    data: Data = Data()
    kind: Literal["multiple_choice", "classification", "instruction", "text"] = "multiple_choice"
    labels: list[str] = []
    score: Literal["plain", "length", "pmi", "pmi-length"] = "plain"
    score_temperature: Positive = 1.0
    max_tokens: Count = 256
    columns: dict[str, str] = {}
    template: str | None = None


class Adapter(_Section, frozen=True):
    """The low-rank adapter (PEFT) that is tuned; base weights stay frozen.

    ``ffa-lora`` trains B only, with A fixed by the study's seed: exact under a sum. ``rolora``
    trains B and A in alternate rounds: exact in each round. ``lora`` trains both, as the FedCoLLM
    paper does: the mean of products is not the product of means, so the average is inexact.

    ``dropout`` is the adapter's own; with privacy for a record or subject there is none.
    ``max_abs``: the largest absolute value of the global adapter; a silo refuses one outside before
    it touches data. Tuning makes values of about 1; far larger ones are made to look at rounding.
    """

    method: Literal["ffa-lora", "rolora", "lora"] = "ffa-lora"
    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    top_layers: Count | None = None
    layout: Hex32 | None = None
    max_abs: Positive = MAX_ABS


class Silos(_Section, frozen=True):
    """Who takes part. ``minimum`` survivors are needed for a sum to be opened at all.

    ``colluders`` is the number c of silos that may work with the server without breaking any
    guarantee of this study.
    """

    count: Annotated[int, Meta(ge=3, le=128)]
    minimum: Annotated[int, Meta(ge=2)] | None = None
    colluders: Annotated[int, Meta(ge=0)] = 1


class Local(_Section, frozen=True):
    """Tuning inside a silo, per round. With DP-SGD ``batch_size`` is the expected Poisson batch.

    In joint DP-SGD (``privacy.noise: distributed`` with ``unit: record``) a step is taken by all
    silos together: ``sampling_rate`` is the probability with which each of their records takes part
    in a step, ``batch_size`` the expected batch of all silos, and ``batch_size / sampling_rate``
    therefore the number of records that the participants think they have in all.

    ``reply_slot``: seconds. A silo trains, then waits for the end of the slot of that length which
    it is in, counted from the request, and only then answers: how long training took, which depends
    on the records, no longer shows. Choose more than a round (in joint DP-SGD: a step) takes; what
    takes longer ends in a later slot. Left out, silos answer at once.
    """

    steps: Count
    batch_size: Count
    learning_rate: Positive
    optimizer: Literal["adam", "sgd"] = "adam"
    loss: Literal["answer", "choices"] = "answer"
    max_grad_norm: Positive | None = None
    micro_batch: Count = 64
    sampling_rate: Annotated[float, Meta(gt=0, le=1)] | None = None
    reply_slot: Annotated[float, Meta(gt=0, le=86_400)] | None = None


class Adaptive(_Section, frozen=True):
    """A clip norm that follows the updates, for many silos (Andrew et al. 2021).

    Every round the silos also count, under the same noise, how many updates were not clipped, and
    the next round's clip norm C becomes C·exp(-``learning_rate``·(share not clipped -
    ``quantile``)). ``count_noise``: noise on the count relative to the study's noise multiplier;
    10 costs the updates half a percent more noise.
    """

    quantile: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    learning_rate: Positive = 0.2
    count_noise: Annotated[float, Meta(gt=1)] = 10.0


class Privacy(_Section, frozen=True):
    """The differential-privacy claim of the whole study, all rounds together.

    ``unit: record`` with ``noise: local`` is DP-SGD inside each silo: (ε, δ) for one record against
    everybody. ``unit: subject`` is the same for all records with one value of the column
    ``subject`` (a patient, a client), in one silo; ``local.batch_size`` then counts subjects.
    ``unit: silo`` with ``noise: distributed`` clips a silo's whole update and adds a share of
    discrete Gaussian noise to it: (ε, δ) for one silo's whole data set against the server and
    ``silos.colluders`` other silos. ``unit: record`` or ``subject`` with ``noise: distributed`` is
    joint DP-SGD: every optimiser step is one secure sum of clipped gradients and noise shares, and
    one unit is protected against the same adversary by the noise of all silos. Neighbouring data
    sets differ by adding or removing one unit. ``clip_norm`` bounds what one unit contributes: per
    step, or per round for a silo; there ``adaptive`` makes it the first round's only.
    """

    epsilon: Positive
    delta: Annotated[float, Meta(gt=0, lt=1)]
    unit: Literal["record", "subject", "silo"] = "record"
    subject: Annotated[str, Meta(min_length=1)] | None = None
    noise: Literal["local", "distributed"] = "local"
    clip_norm: Positive = 1.0
    adaptive: Adaptive | None = None


class Aggregation(_Section, frozen=True):
    """How the server learns the sum and nothing else.

    ``clip_norm`` bounds the L2 norm of a silo's whole update: one that passes it is scaled down,
    and its silo warned. ``value_bits`` is the least precision of one coordinate inside that bound.
    ``threshold`` silos must take part in unmasking; the default is the smallest that a lying server
    cannot split: ⌊(count + colluders) / 2⌋ + 1.

    ``masking``: pairwise masks; survives dropouts at every step. ``ckks``: threshold homomorphic
    encryption; whoever takes part must stay until the sum is open, or the others repeat. ``ckks:
    precise`` gives exact sums at 20 bytes a value; ``compact`` has an error that ``study check``
    prints, at 13 bytes, and much less flooding noise. ``key_model: threshold``: keys are made by
    all and held by nobody. ``authority``: a participant with the role ``authority`` holds it and
    opens one sum a round, of ``silos.minimum`` silos or more; silos may drop out at every step.
    Together with the server it could open single updates.
    """

    clip_norm: Positive = 1.0
    scheme: Literal["masking", "ckks"] = "masking"
    ckks: CkksSet = "precise"
    key_model: Literal["threshold", "authority"] = "threshold"
    value_bits: Annotated[int, Meta(ge=8)] = 16
    threshold: Annotated[int, Meta(ge=2)] | None = None


class Distillation(_Section, frozen=True):
    """The server's phase on the public set, after every sum.

    ``entropy-pooled``: both models learn a mixture of their own predictions, weighted by which of
    them is surer (``sharpness``: how much that counts). ``dual-min-ce``: both learn the prediction
    of the better one, prompt by prompt (FedMKT). ``mutual-kl``: the paper's losses (arXiv
    2411.11707, eq. 3 and 4). ``none``: each is tuned on the labelled public questions alone.
    λ is ``weight``; ``direction`` D(teacher, own) is KL, its reverse, or Jensen–Shannon.

    ``over``: what the predictions are about. ``choices``: the choices of a question. ``answer``:
    every token of the answer, over the whole vocabulary. ``all``: the tokens of the prompt as well.
    ``top_k`` keeps only so many tokens of every frozen target (of ``entropy-pooled`` and
    ``dual-min-ce``), for a vocabulary or model too large to keep more.
    """

    loss: Literal["entropy-pooled", "dual-min-ce", "mutual-kl", "none"] = "entropy-pooled"
    over: Literal["choices", "answer", "all"] = "choices"
    top_k: Count | None = None
    steps: Count = 40
    batch_labelled: Annotated[int, Meta(ge=0)] = 32
    batch_unlabelled: Annotated[int, Meta(ge=0)] = 128
    learning_rate_slm: Positive = 2e-3
    learning_rate_llm: Positive = 4e-3
    weight: Positive = 1.0
    temperature: Positive = 1.0
    direction: Literal["forward", "reverse", "js"] = "forward"
    sharpness: Positive = 3.0


class Participant(_Section, frozen=True):
    """One line of the roster: an organisation's name, its role and its Ed25519 public key (hex)."""

    name: Name
    role: Literal["server", "silo", "authority"]
    key: Hex32


_LATER: Final[dict[tuple[str, str], Any]] = {
    ("adapter", "max_abs"): MAX_ABS,
    ("local", "reply_slot"): None,
    ("task", "columns"): {},
    ("task", "template"): None,
}
"""Keys that version 1 did not always have, with their defaults."""


class Study(_Section, frozen=True, dict=True):
    """A whole study. Compare by :func:`digest`, not by file content."""

    study: Name
    rounds: Annotated[int, Meta(ge=1, le=10_000)]
    task: Task
    models: Models
    silos: Silos
    local: Local
    version: Literal[1] = 1
    seed: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    adapter: Adapter = Adapter()
    privacy: Privacy | None = None
    aggregation: Aggregation = Aggregation()
    distillation: Distillation = Distillation()
    roster: list[Participant] = []

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the RFC 8785 (JCS) form: 32 bytes, the same for every spelling of it."""
        return sha256(b"securefedcollm/study/v1\0", rfc8785.dumps(self.tree))

    @property
    def tree(self) -> dict[str, Any]:
        """The study as plain dictionaries, every default written out but those of later keys.

        A key that version 1 did not always have is left out at its default: older studies keep
        their digest, their signatures and their place in evidence.
        """
        tree: dict[str, Any] = msgspec.to_builtins(self)
        for (section, key), default in _LATER.items():
            if tree[section][key] == default:
                del tree[section][key]
        return tree

    @property
    def threshold(self) -> int:
        """Shamir threshold t, given or derived."""
        given = self.aggregation.threshold
        return given or (self.silos.count + self.silos.colluders) // 2 + 1

    @property
    def minimum(self) -> int:
        """Least number of survivors of a round, given or the threshold."""
        return self.silos.minimum or self.threshold

    @property
    def quorum(self) -> int:
        """Fewest silos with which a sum is ever opened."""
        return max(self.minimum, self.threshold)

    @property
    def generative(self) -> bool:
        """Whether the task has nothing to choose from: responses, texts."""
        return self.task.kind in {"instruction", "text"}

    @property
    def needs_responses(self) -> bool:
        """Whether a public instruction without its response is of no use."""
        plan = self.distillation
        distils = plan.over == "answer" and plan.batch_unlabelled > 0
        return self.task.kind == "instruction" and distils

    @property
    def scheme(self) -> SchemeName:
        """The protocol that follows from ``aggregation.scheme`` and ``aggregation.key_model``."""
        plan = self.aggregation
        return "ckks-authority" if plan.key_model == "authority" else plan.scheme

    @property
    def joint(self) -> bool:
        """Whether every optimiser step is a secure sum of its own (joint DP-SGD)."""
        privacy = self.privacy
        return privacy is not None and privacy.unit != "silo" and privacy.noise == "distributed"

    @property
    def sums(self) -> int:
        """Secure sums in the whole run: one a round, or one an optimiser step in joint DP-SGD."""
        return self.rounds * (self.local.steps if self.joint else 1)

    @property
    def subject(self) -> str | None:
        """The column whose values are the privacy units; None where the unit is another."""
        return self.privacy.subject if self.privacy else None

    @property
    def field(self) -> Field:
        """The packed field of one coordinate, derived from ``value_bits`` and the silo count.

        CKKS packs nothing, so there the bound is not filled up: the room goes to flooding noise.
        """
        plan = self.aggregation
        return Field.fit(plan.value_bits, self.silos.count, fill=plan.scheme == "masking")

    @property
    def ring(self) -> CkksRing | None:
        """The CKKS ring, if the scheme is CKKS.

        Raises:
            ConfigError: no ring holds the sum.
        """
        if self.aggregation.scheme != "ckks":
            return None
        return derive(
            self.aggregation.ckks,
            silos=self.silos.count,
            bound=self.field.bound,
            holders=1 if self.scheme == "ckks-authority" else self.silos.count,
        )


class Field(msgspec.Struct, frozen=True):
    """One coordinate's place in a 64-bit word of the masked vector.

    ``per_word`` fields of ``bits`` bits share a word. Each silo's integer lies in [−bound, bound]
    and is stored with the offset ``bound``, so ``silos`` of them never carry into the next field.
    """

    bits: int
    per_word: int
    bound: int

    @classmethod
    def fit(cls, value_bits: int, silos: int, *, fill: bool = True) -> Field:
        """The densest packing with at least ``value_bits`` of precision, its bound filled up.

        ``bound`` also stays below 2^31 so that a sum of squares is exact in int64.
        """
        least = 2 ** (value_bits - 1) - 1
        needed = (2 * least * silos).bit_length()
        if needed > 64:
            return cls(bits=0, per_word=0, bound=0)
        per_word = 64 // needed
        bits = 64 // per_word
        room = (2**bits - 1) // (2 * silos)
        bound = min(room, 2**31 - 1) if fill else least
        return cls(bits=bits, per_word=per_word, bound=bound)


PLACEMENTS: Final = frozenset(
    {
        ("record", "local"),
        ("record", "distributed"),
        ("subject", "local"),
        ("subject", "distributed"),
        ("silo", "distributed"),
    }
)
"""(unit, noise) pairs that a study can ask for."""


BUILTIN_SUBJECT: Final = "patient"
"""The subject column of ``task.data.builtin: hospitals``."""


def digest(study: Study) -> bytes:
    """What identifies a study: :attr:`Study.digest`."""
    return study.digest
