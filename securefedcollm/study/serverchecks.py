"""What the server's parts need of the rest of a study. Every refusal names the key and the fix."""

from __future__ import annotations

from securefedcollm.errors import ConfigError
from securefedcollm.study.config import Study
from securefedcollm.study.server import Outer


def check_server(study: Study) -> None:
    """Refuse parts of the server's phase that the study has no place for.

    Raises:
        ConfigError: for the first one found, with its key path and a hint.
    """
    server = study.server
    if server is None:
        return
    if server.outer is None and server.central is None:
        raise ConfigError(
            "no part of it is given",
            where="server",
            hint="give outer or central, or remove the section",
        )
    if server.outer is not None:
        _check_outer(study, server.outer)
    if server.central is not None:
        _check_central(study)


def _check_outer(study: Study, outer: Outer) -> None:
    if study.joint:
        raise ConfigError(
            "in joint DP-SGD what is opened is a gradient, and local.optimizer takes its step at "
            "the server",
            where="server.outer",
            hint="remove it and choose local.optimizer, or set privacy.noise: local",
        )
    if outer.optimizer == "nesterov" and not outer.momentum:
        raise ConfigError(
            "without momentum there is nothing to look ahead along",
            where="server.outer.momentum",
            hint="raise it above 0, or choose optimizer: sgd",
        )
    plain = Outer(optimizer=outer.optimizer, learning_rate=outer.learning_rate)
    for key in ("beta2", "tau"):
        if outer.optimizer != "adam" and getattr(outer, key) != getattr(plain, key):
            raise ConfigError(
                f"optimizer: {outer.optimizer} has none",
                where=f"server.outer.{key}",
                hint="remove it, or choose optimizer: adam",
            )


def _check_central(study: Study) -> None:
    data, keep = study.task.data, study.keep
    if study.task.kind == "own":
        raise ConfigError(
            "the silos train with their own code, which the server does not have",
            where="server.central",
            hint="remove it; server.outer works with own training",
        )
    if data.train is None:
        return  # the built-in world has answers, and of the server's own file only it can know
    if not data.public_labelled:
        raise ConfigError(
            "no public row has its answer, so there is nothing to tune on",
            where="server.central",
            hint="raise task.data.public_labelled, or remove it",
        )
    if keep is not None and keep.metric != "private" and keep.rows >= data.public_labelled:
        raise ConfigError(
            "all public rows with answers are kept apart, and none is left to tune on",
            where="keep.rows",
            hint="lower it, or raise task.data.public_labelled",
        )
