"""The file beside a model that says how a picture or a recording becomes its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from securefedcollm.errors import ConfigError
from securefedcollm.foreign import printable
from securefedcollm.tuning.recipe import quiet_transformers

FILE: Final = "preprocessor_config.json"
LARGEST: Final = 1e6
"""Scales and means are below it, and scales above its inverse."""
_T = TypeVar("_T")


def processor_in_file(
    load: Callable[[], tuple[dict[str, Any], Any]],
    read: Callable[[Mapping[str, Any]], _T],
    *,
    source: str,
    scaled: str,
    hint: str,
) -> _T:
    """What ``read`` makes of the file that ``load`` finds.

    Adversary: whoever supplies the file.

    Args:
        scaled: what the file says the scale of, for a message.
        hint: how to mend a file that asks for something else.

    Raises:
        ConfigError: there is none, or it asks for what is not known here.
    """
    try:
        with quiet_transformers():
            found, _ = load()
    except Exception as error:  # a broken file makes the library raise anything
        raise ConfigError(
            f"its {FILE} cannot be read ({type(error).__name__})",
            where=source,
            hint=f"add the file that the model was trained with: it says how {scaled} are scaled",
        ) from error
    try:
        return read(found)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"its {FILE} asks for what is not known here: {printable(error, 120)}",
            where=source,
            hint=hint,
        ) from error


def asks(found: Mapping[str, Any], step: str, usual: bool) -> bool:
    """Whether a file asks for a step: true or false, as 1, 0 or null too.

    Raises:
        ValueError: it says anything else, such as "no", which Python takes for true.
    """
    value = found.get(step, usual)
    if value not in (True, False, None):
        raise ValueError(step)
    return bool(value)
