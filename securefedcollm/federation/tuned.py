"""A base model with the study's adapter: what every role and every control tunes or asks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.federation.continuing import base_of, name_of, released, seed_of
from securefedcollm.federation.export import beside_adapter, rule_of
from securefedcollm.federation.workload import Progress, Vector, silent
from securefedcollm.primitives import sha256
from securefedcollm.study import Study
from securefedcollm.study.config import Model, Task
from securefedcollm.study.continuing import ModelName
from securefedcollm.tuning.adapters import (
    AdapterLayout,
    attach,
    full_layout,
    layout_of,
    load_vector,
    save_adapter,
)
from securefedcollm.tuning.classifiers import HEAD_FILE, head_bytes, set_head
from securefedcollm.tuning.evaluate import Evaluation, evaluate
from securefedcollm.tuning.folding import Released, fold, keep_apart
from securefedcollm.tuning.formats import Asking
from securefedcollm.tuning.frozen import with_prefix, with_prior
from securefedcollm.tuning.head import (
    check_positions,
    check_vocabulary,
    device_of,
    sees,
    text_config,
)
from securefedcollm.tuning.layers import checkpointed
from securefedcollm.tuning.models import Kind, LoadedModel, find_device, hearing, load_model
from securefedcollm.tuning.packing import check_model
from securefedcollm.tuning.prompts import attach_prompt, check_virtual
from securefedcollm.tuning.quantised import check_quantization, quantise
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import EncodedQuestions, Scoring, encode
from securefedcollm.tuning.whole import WholeModel, load_weights, tokenizer_files

T = TypeVar("T")


class _Memory:
    """Results by what they depend on; the least recently used goes first."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._found: OrderedDict[Hashable, Any] = OrderedDict()

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key in self._found:
            self._found.move_to_end(key)
        else:
            self._found[key] = make()
            if len(self._found) > self._entries:
                self._found.popitem(last=False)
        found: T = self._found[key]
        return found


_memory: ContextVar[_Memory | None] = ContextVar("memory", default=None)


@contextmanager
def remembering(entries: int) -> Iterator[None]:
    """Within it, :func:`once` keeps the last ``entries`` results, in memory only.

    For one process that runs many rows of a comparison: they share base models, the frozen layers'
    states, and the silos' first round where it has no noise.
    """
    token = _memory.set(_Memory(entries))
    try:
        yield
    finally:
        _memory.reset(token)


def once(key: Hashable, make: Callable[[], T]) -> T:
    """``make()``, or what it gave before for an equal ``key`` (see :func:`remembering`)."""
    memory = _memory.get()
    return make() if memory is None else memory.once(key, make)


def part_of(kind: str) -> Kind:
    """The kind of model that a kind of task needs."""
    parts: dict[str, Kind] = {"image_classification": "image", "audio_classification": "audio"}
    return parts.get(kind, "causal")


def asking_of(task: Task, model: Model) -> Asking:
    """How the records are put to one of the study's models."""
    return Asking(task.rows, model.ask, task.template)


def scoring_of(task: Task, model: Model) -> Scoring:
    """How choices of one of the study's models are scored."""
    return Scoring(rule_of(task, model), model.temperature or task.score_temperature)


@dataclass(frozen=True)
class Tuned:
    """A base model with a fresh adapter, and what identifies both."""

    model: Any  # peft.PeftModel, or WholeModel
    tokenizer: Any
    base_digest: bytes
    study: Study
    spec: Model
    """Which of the study's models it is."""

    @property
    def frozen_digest(self) -> bytes:
        """What the frozen weights' results depend on: the base, and what it is rounded to."""
        kind = self.spec.quantization
        if kind == "none":
            return self.base_digest
        return sha256(b"securefedcollm/quantised/v1\0", self.base_digest, kind.encode())

    @property
    def scoring(self) -> Scoring:
        """How this study scores choices of this model."""
        return scoring_of(self.study.task, self.spec)

    @classmethod
    def load(
        cls,
        study: Study,
        spec: Model,
        *,
        data: Path | None,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> Tuned:
        """Load the base that ``spec`` names onto ``device`` and attach the study's adapter.

        Raises:
            ConfigError: the model is missing, unsafe or not the pinned one; the adapter does not
                fit it; an earlier run's adapter is not the one that the study names; there is no
                such device; or it, or the model, cannot be quantised or checkpointed as the study
                says.
        """
        place = find_device(device)
        name = name_of(study, spec)
        rounded = (spec.quantization, f"models.{name}.quantization")
        check_quantization(*rounded, place)
        earlier = released(study, name, data)

        def load() -> LoadedModel:
            loaded = load_model(
                spec.source,
                revision=spec.revision,
                sha256=spec.sha256,
                dtype=spec.dtype,
                base_dir=data or Path(),
                progress=progress,
                part=part_of(study.task.kind),
            )
            fold(loaded.model, earlier, spec.source)
            quantise(loaded.model, *rounded)
            return hearing(loaded, study.task.max_seconds)

        chain = tuple((one.sha256, one.scale) for one in earlier)
        loaded = once(("model", spec, data, chain, study.task.max_seconds), load)
        check_model(loaded.model, spec.source)
        model = adapted(_modules_of_its_own(loaded.model), study, spec, earlier)
        check_positions(model, study.task.max_tokens, spec.source)
        check_virtual(model, spec.source)
        if spec.checkpointing:
            checkpointed(model, f"models.{name}.checkpointing")
        base = base_of(study, name, bytes.fromhex(loaded.digest))
        return cls(model.to(place), loaded.tokenizer, base, study, spec)

    def encode(
        self,
        questions: Sequence[Question],
        *,
        cuts: bool = False,
        private: bool = False,
        public: bool = False,
        progress: Progress = silent,
    ) -> EncodedQuestions:
        """Tensors of ``questions`` for this model, with the results of its frozen part on them.

        That is the base's prior if the score needs it, and the hidden states below the adapted
        layers if only the top ones are adapted.

        Args:
            private: the questions are records that are protected one by one: the frozen part's
                results on one must not depend on another, to the last bit.
            public: they are the server's, public or for testing: the frozen layers' states of
                them may be kept on disk (:mod:`securefedcollm.tuning.kept_states`).
        """
        task, top = self.study.task, self.study.top_layers(self.spec)

        def make() -> EncodedQuestions:
            asked, form = asking_of(task, self.spec).put(questions, self.tokenizer)
            encoded = encode(asked, self.tokenizer, task.max_tokens, form, cuts=cuts)
            check_vocabulary(self.model, self.tokenizer, encoded.tokens, encoded.targets)
            most = self.study.local.micro_batch if private else None
            if self.scoring.needs_prior:
                with self.model.disable_adapter():
                    encoded = with_prior(self.model, questions, encoded, self.tokenizer, most)
            if top is not None:
                depth = text_config(self.model).num_hidden_layers
                encoded = with_prefix(
                    self.model,
                    encoded,
                    depth - top,
                    most,
                    public=self.frozen_digest if public else None,
                    progress=progress,
                )
            return encoded

        asked = (self.spec.ask, task.kind, task.score, task.max_tokens, task.max_seconds)
        how = (self.frozen_digest, *asked, top, cuts, private)
        return once(("encoded", *how, str(device_of(self.model)), tuple(questions)), make)

    def answers(self, test: EncodedQuestions) -> Evaluation:
        """This model's answers to every test question."""
        return evaluate(
            self.model,
            test,
            scoring=self.scoring,
            batch_size=max(64, self.study.local.micro_batch),  # without gradients more fit
        )

    def save(self, directory: Path, beside: Mapping[str, bytes] | None = None) -> None:
        """Write the adapter, and what somebody needs to use it, in place of ``directory``.

        Args:
            beside: further files, name → content.

        Raises:
            StateError: it cannot be written.
        """
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        files = beside_adapter(self.study, self.spec, self.base_digest, chat=chat)
        if sees(self.model):
            files[HEAD_FILE] = head_bytes(self.model)
        if isinstance(self.model, WholeModel):  # a directory that transformers loads by itself
            files |= tokenizer_files(self.tokenizer)
        save_adapter(self.model, directory, {**files, **(beside or {})})

    def load_adapter(self, directory: Path) -> None:
        """Load the adapter that :meth:`save` wrote into ``directory``, bit for bit.

        Raises:
            StateError: it is damaged or another study's.
        """
        from safetensors.numpy import load_file

        if isinstance(self.model, WholeModel):
            self._load_whole(directory)
            return
        path = directory / "adapter_model.safetensors"
        try:
            tensors = load_file(path)
        except Exception as error:
            raise StateError(
                f"{path}: the saved adapter cannot be read ({error})",
                hint="start again with --overwrite",
            ) from None
        layout = full_layout(self.model)
        load_vector(self.model, layout, _in_order(tensors, layout, path))

    def _load_whole(self, directory: Path) -> None:
        try:
            load_weights(self.model.get_base_model(), directory)
        except ConfigError as error:
            raise StateError(
                f"{directory}: the saved model cannot be taken up ({error.message})",
                hint="start again with --overwrite",
            ) from None

    def broadcast_layout(self) -> AdapterLayout:
        """The layout that travels from server to silos: all that is ever trained."""
        if self.study.adapter.method == "ffa-lora":
            return layout_of(self.model, "ffa-lora")
        return full_layout(self.model)

    def update_layout(self, round_: int) -> AdapterLayout:
        """The layout that a silo trains and uploads in this round."""
        return layout_of(self.model, self.study.adapter.method, round_)

    def layout_digest(self, round_: int) -> bytes:
        """Names both layouts of the round; a study may pin it as ``adapter.layout`` (round 1).

        Raises:
            ConfigError: the study pins another layout.
        """
        both = (self.broadcast_layout().digest, self.update_layout(round_).digest)
        digest = sha256(b"securefedcollm/layout/v1\0", *(bytes.fromhex(d) for d in both))
        pinned = self.study.adapter.layout
        if pinned is not None and round_ == 0 and digest.hex() != pinned:
            raise ConfigError(
                f"this model's adapter has the layout {digest.hex()[:16]}…, the study pins "
                f"{pinned[:16]}…",
                where="adapter.layout",
                hint="use the models that the participants agreed on",
            )
        return digest


def adapted(base: Any, study: Study, spec: Model, earlier: Sequence[Released] = ()) -> Any:
    """``base`` with the study's adapter, fresh, as a ``PeftModel``; or as a :class:`WholeModel`.

    Args:
        spec: which of the study's models ``base`` is.
        earlier: the adapters folded into ``base``; the study may keep a new one apart from them.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    adapter, seed = study.adapter, seed_of(study)
    if sees(base):
        set_head(base, study.task.labels, study.seed)  # the same in a whole chain
        # The library's notes on names in files keep .twins from seeing that two models are alike.
        vars(base).pop("_weight_conversions", None)
    if adapter.method == "full":
        return WholeModel(base)
    if adapter.method == "prompt" or adapter.method == "prefix":
        return attach_prompt(base, method=adapter.method, tokens=adapter.tokens, seed=seed)
    model = attach(
        base,
        method=adapter.method,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        targets=adapter.targets,
        top_layers=study.top_layers(spec),
        seed=seed,
    )
    if study.continues is not None and study.continues.orthogonal:
        keep_apart(model, earlier, "continue.orthogonal")
    return model


def fold_earlier(study: Study, name: ModelName, loaded: LoadedModel, data: Path | None) -> None:
    """Fold what ``study`` starts from into one of its base models, in place.

    Raises:
        ConfigError: an earlier run's adapter is missing, or is not the one that the study names.
    """
    fold(loaded.model, released(study, name, data), name)


def _modules_of_its_own(base: Any) -> Any:
    """The same weights in other modules: PEFT puts its layers into the modules that it gets."""
    return copy.deepcopy(base, {id(p): p for p in [*base.parameters(), *base.buffers()]})


def accuracies(tuned: Tuned, test: EncodedQuestions) -> dict[str, float]:
    """Accuracy in [0, 1] by question group."""
    scores = tuned.answers(test).by_group()
    return {group: score.accuracy for group, score in scores.items()}


def _in_order(tensors: dict[str, Any], layout: AdapterLayout, path: Path) -> Vector:
    missing = [name for name in layout.names if name not in tensors]
    if missing or len(tensors) != len(layout.names):
        raise StateError(
            f"{path}: not this study's adapter (lacks {missing[:1] or 'nothing'})",
            hint="start again with --overwrite",
        )
    parts = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if tensors[name].shape != shape:
            raise StateError(
                f"{path}: {name} has shape {tensors[name].shape}, the model needs {shape}",
                hint="start again with --overwrite",
            )
        parts.append(tensors[name].reshape(-1))
    return np.concatenate(parts).astype(np.float32)
