"""What every test finds as the first one found it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["tests.support.bundles"]
pytest.register_assert_rewrite("tests.support")

settings.register_profile("house", deadline=None)  # no test asserts how long something takes
settings.load_profile("house")


LONG = ("tuning", "cli", "federation")
"""Where the longest files are."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: workers take whole files, and end together if the last ones are short."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        room = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        return LONG.index(room) if room in LONG else len(LONG)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> None:
    """A command of the CLI sets up logging for its process, and FLARE does, and disables ours."""
    root = logging.getLogger()
    root.handlers[:] = [h for h in root.handlers if type(h).__module__.startswith("_pytest")]
    root.setLevel(logging.WARNING)
    logging.disable(logging.NOTSET)
    for name, logger in root.manager.loggerDict.items():
        if name.startswith("securefedcollm") and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
