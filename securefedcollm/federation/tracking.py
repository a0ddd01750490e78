"""A run's numbers for TensorBoard or MLflow, after every round.

Adversary: whoever reads the tracking server, or keeps it. People who are not participants often
share it, and no ε covers what they see beyond the released models. Nothing of a silo goes there: no
loss, norm or number of its records, nor its name or its part of the traffic. So
:func:`public_numbers` copies the few numbers that it knows; all else in a record stays here.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import printable
from securefedcollm.primitives import sha256
from securefedcollm.study import Study

_messages = logging.getLogger(__name__)

Kind = Literal["tensorboard", "mlflow"]
Record = Mapping[str, Any]
Follow = Callable[[Sequence[Record]], None]
"""Takes the records of all finished rounds, and sends those that the tracker lacks."""

ROUND: Final = "round"
"""The number that is sent last: a tracker that holds it holds the whole round."""
_MODELS: Final = ("slm", "llm")
_MEASURED: Final = {"evaluation": "accuracy", "perplexity": "perplexity"}
"""Numbers by model and group of test questions: their name in a record, and in a tracker."""
_NAMED: Final = {
    "validation": [f"{model}/{metric}" for model in _MODELS for metric in ("loss", "accuracy")],
    "distillation": [f"{when}_loss_{model}" for when in ("first", "last") for model in _MODELS],
    "central": ["first_loss", "last_loss"],
    "private": ["accuracy", "margin"],  # noised, of all silos together
    "seconds": ["server"],  # how long silos train follows from their records
}
_BYTES: Final = ("bytes_up", "bytes_down")
_LONGEST: Final = 100
_LOST_PATIENCE: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""An absent tracking server delays a round by seconds: the next round tries again."""


class Tracker(Protocol):
    """One run in a tracking tool."""

    def newest(self) -> int:
        """The newest round that it holds, from 1; 0: none."""

    def write(self, round_: int, numbers: Mapping[str, float]) -> None:
        """Add a round."""

    def close(self, finished: bool) -> None:
        """Call it after the last round, or where the run stopped."""


def public_numbers(study: Study, record: Record) -> dict[str, float]:
    """The numbers of a round's record that are nobody's own: scores of the released models on the
    server's questions, the server's losses on public ones and its seconds, bytes of all parties
    together; and the ε that the study agreed on."""
    found: dict[str, float] = {}
    for key, metric in _MEASURED.items():
        for place, value in _dict(record, key).items():
            model, slash, group = str(place).partition("/")
            if slash and model in _MODELS:
                found[f"{metric}/{model} {_plain(group)}".strip()] = value
    for key, names in _NAMED.items():
        values = _dict(record, key)
        found |= {
            f"{key}/{name.replace('/', ' ')}": values[name] for name in names if name in values
        }
    for key in _BYTES:
        counts = [count for count in _dict(record, key).values() if _is_number(count)]
        found |= {f"{key}/all": sum(counts)} if counts else {}
    if study.privacy is not None:
        found["privacy/epsilon_agreed"] = study.privacy.epsilon
        found["privacy/delta_agreed"] = study.privacy.delta
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def _dict(record: Record, key: str) -> dict[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(group: str) -> str:
    """A group's name in letters that every tracker takes, different for different groups.

    Adversary: whoever wrote the test questions: a name may look like a path, or never end.
    """
    plain = re.sub(r"[^A-Za-z0-9_. -]", "_", group.strip()[:_LONGEST])
    if plain == group:
        return plain
    return f"{plain}-{sha256(group.encode(errors='surrogatepass')).hex()[:8]}"


def require_tracker(kind: Kind | None) -> None:
    """Raises: ConfigError saying how to install it, if its package is not there."""
    if kind is None:
        return
    found = importlib.util.find_spec(kind)
    if found is None or found.origin is None:  # a directory of that name is no package
        raise ConfigError(
            f"the package {kind} is not installed",
            where="--track",
            hint=f"pip install 'securefedcollm[{kind}]'",
        )


@contextmanager
def tracking(kind: Kind | None, study: Study, run: Path, run_id: str) -> Iterator[Follow]:
    """A function that the run calls with its history when it begins and after every round.

    A tracker that fails never ends the run: one line says so, and later rounds try again, with
    everything that is missing.

    Args:
        kind: None: nothing is tracked.
        run: the run's directory.
        run_id: tells the run from all others.
    """
    makers: dict[Kind, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run / "tensorboard"),
        "mlflow": lambda: MLflow(study.study, run_id, run / "mlruns"),
    }
    with following(makers[kind] if kind else None, study) as follow:
        yield follow


@contextmanager
def following(make: Callable[[], Tracker] | None, study: Study) -> Iterator[Follow]:
    """:func:`tracking` with a tracker that ``make`` opens when there is a round to send."""
    tracker: Tracker | None = None
    sent, warned = 0, False

    def warn(error: Exception) -> None:
        nonlocal warned
        if not warned:
            _messages.warning("tracking fails, the run goes on: %s", _without_passwords(error))
        warned = True

    def leave(finished: bool) -> None:
        nonlocal tracker
        left, tracker = tracker, None
        try:
            if left is not None:
                left.close(finished)
        except Exception as error:
            warn(error)

    def follow(history: Sequence[Record]) -> None:
        nonlocal tracker, sent
        if make is None or not history:
            return
        try:
            if tracker is None:
                tracker = make()
                sent = tracker.newest()
            for number, record in enumerate(history[sent:], start=sent + 1):
                tracker.write(number, {**public_numbers(study, record), ROUND: float(number)})
                sent = number
        except Exception as error:
            warn(error)
            leave(False)  # when it is opened again, it is asked what did arrive

    finished = False
    try:
        yield follow
        finished = True
    finally:
        leave(finished)


def _without_passwords(error: Exception) -> str:
    """Adversary: whoever reads the log; the address of a tracking server may hold a password."""
    return re.sub(r"//[^/\s@]*@", "//", printable(f"{type(error).__name__}: {error}"))


class TensorBoard:
    """Event files in the run's directory."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._newest = _newest_event(directory)
        # A new write of the next round hides what a killed run wrote of it.
        self._writer = SummaryWriter(str(directory), purge_step=self._newest + 1)

    def newest(self) -> int:
        return self._newest

    def write(self, round_: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, round_)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


def _newest_event(directory: Path) -> int:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not directory.exists():
        return 0
    events = EventAccumulator(str(directory)).Reload()
    if ROUND not in events.Tags()["scalars"]:
        return 0
    return int(events.Scalars(ROUND)[-1].step)


class MLflow:
    """A run on the server that ``MLFLOW_TRACKING_URI`` names, or in the run's directory.

    A tag identifies it, so that a resumed run finds it. The calls tell the server nothing about
    this machine: no user, path or commit; MLflow's own telemetry is off.
    """

    def __init__(self, study: str, run_id: str, local: Path) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when it is imported
        for name, value in _LOST_PATIENCE.items():
            os.environ.setdefault(name, value)
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = local.resolve().as_uri()
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=address)
        experiment = self._client.get_experiment_by_name(study)
        place = experiment.experiment_id if experiment else self._client.create_experiment(study)
        tag = "securefedcollm.run"
        found = self._client.search_runs([place], f"tags.`{tag}` = '{run_id}'")
        self._newest = 0
        if found:
            self._run = found[0].info.run_id
            self._newest = int(found[0].data.metrics.get(ROUND, 0))
            self._client.update_run(self._run, status="RUNNING")
        else:
            name = f"{study}-{run_id[:8]}"
            made = self._client.create_run(place, run_name=name, tags={tag: run_id})
            self._run = made.info.run_id

    def newest(self) -> int:
        return self._newest

    def write(self, round_: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [Metric(name, value, now, round_) for name, value in numbers.items()]
        most = 1000  # that the server takes at once
        for start in range(0, len(found), most):
            self._client.log_batch(self._run, metrics=found[start : start + most])

    def close(self, finished: bool) -> None:
        if finished:
            self._client.set_terminated(self._run)
