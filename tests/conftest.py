"""What every test finds as the first one found it."""

from __future__ import annotations

import logging

import pytest
from hypothesis import settings

pytest_plugins = ["tests.support.bundles"]
pytest.register_assert_rewrite("tests.support")

settings.register_profile("house", deadline=None)  # no test asserts how long something takes
settings.load_profile("house")


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
