"""What the tests of the recipes train."""

from __future__ import annotations

import pytest

from tests.support.models import Toy, make_toy


@pytest.fixture(scope="session")
def toy() -> Toy:
    """A tiny Llama over twenty words, and questions about nothing."""
    return make_toy()
