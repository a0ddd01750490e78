"""A small model out of a large one: leave layers out, then heal the copy by distillation.

The paper's third pair is made this way (Sheared-LLaMA from LLaMA-2), and two models of one family
share the tokenizer. The layers of the least block influence go (ShortGPT, Men et al., arXiv
2403.03853): on SmolLM2-135M without 12 of its 30 layers this left a perplexity within 4 % of a
greedy search by perplexity, which took 80 times as long. Healing is knowledge distillation on plain
text: the copy learns to predict what the whole model predicts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from securefedcollm.errors import ConfigError, DataError, TrainingError
from securefedcollm.tuning.head import output_logits
from securefedcollm.tuning.layers import decoder_layers
from securefedcollm.tuning.questions import shuffled_batches
from securefedcollm.tuning.recipe import (
    Progress,
    inference_mode,
    make_optimizer,
    silent,
    training_mode,
)
from securefedcollm.tuning.token_loss import Target, Teacher, chunked_loss

_HEAD_CHUNK = 64  # positions whose logits exist at a time: 64 × 49k × 4 B = 12 MB each


def token_windows(texts: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """Texts → int64 [N, length]: joined by the end-of-text token, cut, the short rest dropped.

    Raises:
        DataError: there is less than one window of text.
    """
    stream: list[int] = []
    for text in texts:
        stream.extend(tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    count = len(stream) // length
    if count == 0:
        raise DataError(
            f"{len(stream)} tokens of text do not fill one window of {length}",
            where="--text",
            hint="give more text",
        )
    return torch.tensor(stream[: count * length]).reshape(count, length)


def begun(windows: Tensor, tokenizer: Any) -> Tensor:
    """Windows int64 [N, L] → [N, L + 1] with the token that the tokenizer begins every text with.

    Unchanged if there is none. Some models, such as Gemma, fail without it.
    """
    first = tokenizer("a")["input_ids"][0]
    return F.pad(windows, (1, 0), value=first) if first == tokenizer.bos_token_id else windows


def perplexity(model: Any, windows: Tensor, batch_size: int = 4) -> float:
    """exp of the mean next-token cross-entropy over windows int64 [N, L]."""
    total = 0.0
    with inference_mode(model):
        for batch in torch.split(windows, batch_size):
            hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
            gold = batch[:, 1:].reshape(-1)
            flat = hidden.reshape(-1, hidden.shape[-1])
            parts = torch.split(flat, _HEAD_CHUNK), torch.split(gold, _HEAD_CHUNK)
            for part, wanted in zip(*parts, strict=True):
                logits = output_logits(model)(part)
                total += F.cross_entropy(logits, wanted, reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def block_influence(model: Any, windows: Tensor, batch_size: int = 4) -> list[float]:
    """How much each decoder layer turns the hidden state: 1 − mean cosine(input, output)."""
    layers = decoder_layers(model)
    sums = [0.0] * len(layers)

    def measure(index: int, before: Tensor, after: Tensor) -> None:
        turned = 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)
        sums[index] += turned.sum().item()

    hooks = [
        layer.register_forward_hook(
            lambda _, args, out, i=i: measure(i, args[0], out[0] if isinstance(out, tuple) else out)
        )
        for i, layer in enumerate(layers)
    ]
    try:
        with inference_mode(model):
            for batch in torch.split(windows, batch_size):
                model.base_model(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [value / windows.numel() for value in sums]


def choose_layers(model: Any, windows: Tensor, keep: int) -> list[int]:
    """The ``keep`` decoder layers of the greatest influence on ``windows`` (int64 [N, L]).

    Raises:
        ConfigError: ``keep`` is not between 1 and one less than the number of layers.
    """
    depth = len(decoder_layers(model))
    if not 1 <= keep < depth:
        raise ConfigError(
            f"{keep} of {depth} layers cannot be kept",
            where="--layers",
            hint=f"give a number from 1 to {depth - 1}",
        )
    influence = block_influence(model, windows)
    return sorted(sorted(range(depth), key=influence.__getitem__)[depth - keep :])


def pruned(model: Any, kept: Sequence[int]) -> Any:
    """A new model of the same family that has copies of the layers ``kept``, in their order."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    place = {f"{prefix}.{old}.": f"{prefix}.{new}." for new, old in enumerate(kept)}
    state = {}
    for name, tensor in model.state_dict().items():
        own = ".".join(name.split(".")[: prefix.count(".") + 2]) + "."
        if own in place:
            state[place[own] + name[len(own) :]] = tensor
        elif not name.startswith(prefix + "."):
            state[name] = tensor
    with torch.random.fork_rng(devices=[]):
        smaller = type(model)(config).to(model.dtype)
    smaller.load_state_dict(state)
    return smaller.eval()


def heal(
    student: Any,
    teacher: Any,
    windows: Tensor,
    *,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress = silent,
) -> list[float]:
    """Distil ``teacher`` into the decoder layers of ``student``, in place.

    Minimises KL(teacher‖student) over the whole vocabulary at every position of the text, with
    Adam, a linear warm-up over a tenth of the steps and a linear decay to zero. Embeddings and
    output layer stay the teacher's.

    Args:
        windows: int64 [N, L] of plain text, disjoint from every question of the study.

    Returns:
        the loss of every step, nats per token.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    student.requires_grad_(False)
    weights = list(decoder_layers(student).parameters())
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = make_optimizer("adam", weights, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _warm(s, steps))
    batches = shuffled_batches(len(windows), batch_size, torch.Generator().manual_seed(seed))
    losses = []
    with training_mode(student, seed=seed):
        for step in range(steps):
            batch = windows[next(batches)]
            losses.append(_kd_backward(student, teacher, batch))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the healing loss of step {step} is not finite",
                    hint="lower --learning-rate",
                )
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress(step + 1, steps, f"healing, KL {losses[-1]:.2f}")
    student.requires_grad_(True)
    return losses


def _warm(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    return min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))


def _kd_backward(student: Any, teacher: Any, batch: Tensor) -> float:
    """Gradients of the mean KL per token into ``student``; returns the mean."""
    with torch.no_grad():
        wanted = teacher.base_model(input_ids=batch, use_cache=False).last_hidden_state
    hidden = student.base_model(input_ids=batch, use_cache=False).last_hidden_state.flatten(0, 1)
    wanted = wanted.flatten(0, 1)
    head = output_logits(teacher)

    def says(where: slice) -> Target:
        with torch.no_grad():
            return Target(F.log_softmax(head(wanted[where]), dim=-1))

    teaching = Teacher(targets=says, scale=1 / batch.numel())
    loss = chunked_loss(hidden, output_logits(student), teacher=teaching)
    torch.autograd.backward(loss)
    return loss.item()
