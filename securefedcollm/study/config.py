"""The study: everything that the participants must agree on, as one typed value.

A study is written as YAML (:mod:`securefedcollm.study.load`), checked as a whole
(:mod:`securefedcollm.study.checks`) and identified by a digest (:func:`digest`). It holds what all
participants may know. It never holds a path of private data, a key or a password.

Defaults are the values that a consortium of hospitals would want. A field has no default if nobody
can choose its value for them.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import rfc8785
from msgspec import Meta

from securefedcollm.aggregation.ckks.parameters import CkksRing, derive
from securefedcollm.aggregation.masking.packing import Field
from securefedcollm.aggregation.steps import SchemeName
from securefedcollm.primitives import sha256
from securefedcollm.study.continuing import Continue
from securefedcollm.study.kinds import Count, Hex32, Name, Positive, Section, says
from securefedcollm.study.learning import (
    MAX_ABS,
    Adapter,
    Data,
    Model,
    Models,
    Task,
)
from securefedcollm.study.protection import (
    Adaptive,
    Aggregation,
    Participant,
    Privacy,
    Silos,
    Validation,
)
from securefedcollm.study.retrieval import Encoder, Reduction, Retrieval
from securefedcollm.study.server import Central, Distillation, Keep, Outer, Server
from securefedcollm.study.tuning import Local

if TYPE_CHECKING:  # what they need takes a while to import
    from securefedcollm.aggregation.masking.graph.bounds import Bounds
    from securefedcollm.aggregation.masking.graph.choice import Graph

__all__ = [
    "BUILTIN_SUBJECT",
    "MAX_ABS",
    "PLACEMENTS",
    "Adapter",
    "Adaptive",
    "Aggregation",
    "Central",
    "Continue",
    "Count",
    "Data",
    "Distillation",
    "Encoder",
    "Field",
    "Hex32",
    "Keep",
    "Local",
    "Model",
    "Models",
    "Name",
    "Outer",
    "Participant",
    "Positive",
    "Privacy",
    "Reduction",
    "Retrieval",
    "SchemeName",
    "Server",
    "Silos",
    "Study",
    "Task",
    "Validation",
    "digest",
]

_LATER: Final[dict[tuple[str, ...], Any]] = {
    ("adapter", "max_abs"): MAX_ABS,
    ("adapter", "virtual_tokens"): None,
    ("aggregation", "graph"): None,
    ("aggregation", "weights"): None,
    ("continue",): None,
    ("distillation", "change"): 0.5,
    ("distillation", "order"): "together",
    ("distillation", "retain"): 0.0,
    ("distillation", "schedule"): "constant",
    ("distillation", "warmup"): 0.0,
    ("distillation", "weight_decay"): 0.0,
    ("distillation", "weighting"): "none",
    ("keep",): None,
    ("local", "augmentation"): None,
    ("local", "epochs"): None,
    ("local", "reply_slot"): None,
    ("local", "schedule"): "constant",
    ("local", "warmup"): 0.0,
    ("local", "weight_decay"): 0.0,
    ("models", "llm", "ask"): "cloze",
    ("models", "llm", "checkpointing"): False,
    ("models", "llm", "quantization"): "none",
    ("models", "llm", "temperature"): None,
    ("models", "llm", "top_layers"): None,
    ("models", "slm", "ask"): "cloze",
    ("models", "slm", "checkpointing"): False,
    ("models", "slm", "quantization"): "none",
    ("models", "slm", "temperature"): None,
    ("models", "slm", "top_layers"): None,
    ("privacy", "excess_noise"): "keep",
    ("retrieval", "epsilon"): None,
    ("retrieval", "reader"): "labels",
    ("retrieval", "threshold"): None,
    ("retrieval", "votes"): 256,
    ("retrieval",): None,  # after its own keys
    ("server",): None,
    ("task", "columns"): {},
    ("task", "data", "part"): None,
    ("task", "max_seconds"): 10.0,
    ("task", "template"): None,
    ("validation",): None,
}
"""Keys that were added to version 1 later, with their defaults."""


class Study(Section, frozen=True, dict=True):
    """A whole study. Compare by :func:`digest`, not by file content."""

    study: Annotated[Name, says("The study's name: lower-case letters, digits, . _ and -.")]
    rounds: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)],
        says(
            "Number of rounds. In each, the silos tune and the server sums; with an LLM it "
            "also distils."
        ),
    ]
    task: Annotated[Task, says("What the models learn, and from which records.")]
    models: Annotated[Models, says("The base models; their weights stay frozen.")]
    silos: Annotated[Silos, says("Who takes part.")]
    local: Annotated[Local, says("Tuning inside a silo, per round.")]
    version: Annotated[Literal[1], says("Version of the study's format.")] = 1
    seed: Annotated[
        Annotated[int, Meta(ge=0, lt=2**53)],
        says(
            "Seed of everything that may be public, such as shuffling and the matrix A of "
            "ffa-lora. Never of noise."
        ),
    ] = 0
    adapter: Annotated[Adapter, says("The low-rank adapter that is tuned.")] = Adapter()
    privacy: Annotated[
        Privacy | None,
        says(
            "The differential-privacy claim of the whole study, all rounds together. If left "
            "out, or `none`, there is no differential privacy, and the global adapter may "
            "reveal records."
        ),
    ] = None
    aggregation: Annotated[
        Aggregation, says("How the server learns the sum of updates and nothing else.")
    ] = Aggregation()
    server: Annotated[
        Server | None,
        says(
            "What the server does between two sums, before it distils: an outer optimiser on the "
            "opened mean, tuning on public rows. If left out, it adds the mean as it is."
        ),
    ] = None
    distillation: Annotated[
        Distillation, says("The server's phase on the public set, after every sum; with an LLM.")
    ] = Distillation()
    keep: Annotated[
        Keep | None,
        says(
            "Which round's adapters are kept in addition to the last round's, and when a run "
            "ends early. If left out, a run has all rounds and keeps only the last round's "
            "adapters."
        ),
    ] = None
    continues: Annotated[
        Continue | None,
        says(
            "The earlier runs that this study starts from. If left out, it starts from the base "
            "models. `securefedcollm study continue RUN` writes it."
        ),
    ] = msgspec.field(default=None, name="continue")
    validation: Annotated[
        Validation | None,
        says(
            "A noised accuracy of every round's model on records that the silos set aside. If left "
            "out, nobody but a silo itself learns how well the model does on private records."
        ),
    ] = None
    retrieval: Annotated[
        Retrieval | None,
        says(
            "Private questions to the silos' documents or records (`securefedcollm ask`). If left "
            "out, nobody can ask."
        ),
    ] = None
    roster: Annotated[
        list[Participant],
        says("The participants and their keys.", needed="real roles take part (not simulate)"),
    ] = msgspec.field(default_factory=list)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the RFC 8785 (JCS) form: 32 bytes, the same for every spelling of it."""
        return sha256(b"securefedcollm/study/v1\0", rfc8785.dumps(self.tree))

    @property
    def tree(self) -> dict[str, Any]:
        """The study as plain dictionaries, with every default written out except those of later
        keys.

        A key that was added later is left out at its default. So older studies keep their digest,
        their signatures and their place in evidence.
        """
        tree: dict[str, Any] = msgspec.to_builtins(self)
        for (*sections, key), default in _LATER.items():
            place = tree
            for section in sections:
                place = place[section] or {}  # a study without an LLM
            if key in place and place[key] == default:
                del place[key]
        return tree

    @property
    def threshold(self) -> int:
        """Shamir threshold t, given or derived."""
        given = self.aggregation.threshold
        return given or (self.silos.count + self.silos.colluders) // 2 + 1

    @property
    def minimum(self) -> int:
        """Least number of survivors of a round, given or derived: the threshold, or nine tenths of
        the silos on a graph."""
        tenth = self.silos.count // 10 if self.aggregation.graph else self.silos.count
        return self.silos.minimum or max(self.threshold, self.silos.count - tenth)

    @property
    def quorum(self) -> int:
        """Fewest silos with which a sum may be opened."""
        return max(self.minimum, self.threshold)

    @cached_property
    def graph(self) -> Graph | None:
        """The random graph of the masks; None if every silo shares with every other.

        Raises:
            ConfigError: none keeps the bounds.
        """
        plan = self.aggregation.graph
        if plan is None:
            return None
        from securefedcollm.aggregation.masking.graph.bounds import derive

        silos = self.silos
        return derive(silos.count, silos.colluders, self.quorum, plan.neighbours)

    @property
    def silo_keys(self) -> dict[str, bytes]:
        """Silo → Ed25519 public key, 32 bytes, of those that the study names."""
        return {p.name: bytes.fromhex(p.key) for p in self.roster if p.role == "silo"}

    @cached_property
    def graph_bounds(self) -> Bounds | None:
        """What can go wrong with the graph, and with what probability in an attempt."""
        if self.graph is None:
            return None
        from securefedcollm.aggregation.masking.graph.bounds import bounds

        return bounds(self.silos.count, self.silos.colluders, self.quorum, self.graph)

    def noise_shares(self, survivors: int | None = None) -> int:
        """Shares of noise that a silo counts in a sum of ``survivors``; the fewest of any, if None.

        On a graph always the fewest. Adversary: a server that tells one silo of more survivors than
        a threshold agreed to, and leaves a few out of the sum besides (:attr:`graph_bounds`). A
        silo sees too few signatures to rule the first out by itself.
        """
        if self.graph_bounds:
            return self.quorum - self.graph_bounds.hidden
        return self.quorum if survivors is None else survivors

    def top_layers(self, model: Model) -> int | None:
        """How many last layers of one of the study's models get an adapter; None: all."""
        return model.top_layers or self.adapter.top_layers

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
        """The protocol that follows from ``aggregation.scheme``, ``key_model`` and ``graph``."""
        plan = self.aggregation
        if plan.graph is not None:
            return "masking-graph"
        return "ckks-authority" if plan.key_model == "authority" else plan.scheme

    @property
    def masked(self) -> bool:
        """Whether pairwise masks protect the sums."""
        return self.aggregation.scheme == "masking"

    @property
    def joint(self) -> bool:
        """Whether every optimiser step is a secure sum of its own (joint DP-SGD)."""
        privacy = self.privacy
        return privacy is not None and privacy.unit != "silo" and privacy.noise == "distributed"

    @property
    def remembers(self) -> bool:
        """Whether the server has an optimiser whose memory lasts from one sum to the next."""
        return self.joint or (self.server is not None and self.server.outer is not None)

    @property
    def needs_public(self) -> bool:
        """Whether the server learns from public rows: by distillation, or by steps of its own."""
        central = self.server is not None and self.server.central is not None
        return central or self.models.llm is not None

    @property
    def tuning_sums(self) -> int:
        """Secure sums of tuning in a round: one, or one an optimiser step in joint DP-SGD."""
        return self.local.steps if self.joint else 1

    @property
    def sums(self) -> int:
        """Secure sums in the whole run: those of tuning, and one a round for its validation."""
        return self.rounds * (self.tuning_sums + (self.validation is not None))

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


BUILTIN_SUBJECT: Final = {"hospitals": "patient", "digits": "digit", "wards": "speaker"}
"""The subject column of each ``task.data.builtin``."""


def digest(study: Study) -> bytes:
    """What identifies a study: :attr:`Study.digest`."""
    return study.digest
