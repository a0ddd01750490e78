"""The architecture of a model without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.models import (
    AUTO,
    CLASSIFIERS,
    HOSPITAL,
    PREPARED,
    Kind,
    check_builtin,
    default_cache,
    local_path,
)
from securefedcollm.tuning.recipe import quiet_transformers


def meta_model(
    source: str,
    *,
    revision: str | None = None,
    base_dir: Path = Path(),
    part: Kind = "causal",
) -> Any:
    """The architecture of a model on torch's meta device; arguments as of :func:`load_model`.

    Only its ``config.json`` is read (of a hub model: downloaded).

    Raises:
        ConfigError: there is no such file, or it is no model's of that kind.
    """
    import transformers

    kind, _, name = source.partition(":")
    if kind == "builtin":
        check_builtin(name, part)
    if kind == "builtin" and name in CLASSIFIERS:
        from securefedcollm.tuning import class_builtin

        config = class_builtin.architecture(name)
    elif kind == "builtin" and name in HOSPITAL:
        from securefedcollm.tuning.builtin import RECIPES, architecture

        config = architecture(RECIPES[HOSPITAL[name]])
    else:
        place: str | Path = name
        options: dict[str, Any] = {"revision": revision}
        if kind != "hub":
            place = local_path(base_dir, name, source)
            if kind == "builtin":
                place = default_cache() / "models" / name
            options = {"local_files_only": True}
        try:
            with quiet_transformers():
                config = transformers.AutoConfig.from_pretrained(
                    place, trust_remote_code=False, **options
                )
        except Exception as error:  # a broken file makes the library raise anything
            raise ConfigError(
                f"its config.json cannot be read ({type(error).__name__})",
                where=source,
                hint=f"run `{PREPARED[name]}` once"
                if name in PREPARED
                else "a path: model needs --data DIR; a hub model the network, once",
            ) from error
    try:
        with quiet_transformers(), torch.device("meta"):
            return getattr(transformers, AUTO[part]).from_config(config)
    except Exception as error:
        raise ConfigError(
            f"cannot be built ({type(error).__name__})",
            where=source,
            hint="it needs the config.json of a causal language model that transformers knows",
        ) from error
