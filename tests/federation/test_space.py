"""The space of a study's embeddings: pinned, of the agreed sizes, each text by itself."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from securefedcollm.errors import (
    ConfigError,
    DataError,
)
from securefedcollm.federation.questions.space import (
    Space,
    fit_reduction,
    load_encoder,
    read_reduction,
    space_of,
)
from securefedcollm.retrieval import Reduction
from tests.support.asking import SHELF, Members
from tests.support.small import small_study

NUMBER = bytes(16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return Members(tmp_path_factory.mktemp("members"))


@pytest.fixture
def members(made: Members, tmp_path: Path) -> Members:
    return made.afresh(tmp_path / "shelves")


def test_a_reduction_from_a_file_is_pinned(members, tmp_path):
    encoder = load_encoder(members.study, members.data)
    text = tmp_path / "public.txt"
    text.write_text("\n".join(f"w{i} w{i + 1}\n" for i in range(40)))
    made = fit_reduction(members.study, encoder, [text])
    file = members.data / "map.reduction"
    file.write_bytes(made.encode())
    named = {"source": "path:map.reduction", "sha256": made.digest.hex()}
    study = small_study(members.data, retrieval=SHELF | {"reduction": named})
    assert space_of(study, members.data).digest == Space(encoder, made).digest
    assert Space(encoder, made).digest != members.space.digest
    with pytest.raises(ConfigError, match="the study pins 00000000"):
        read_reduction(file, "0" * 64)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_reduction(tmp_path / "absent")


def test_a_reduction_of_another_size_is_named_before_it_is_used(members):
    encoder = load_encoder(members.study, members.data)
    assert encoder.width == encoder.embed(["w1"]).shape[1] == 64
    rng = np.random.default_rng(0)
    for shape, where, what in (
        ((64, 5), "retrieval.dimension", "is 6, and .*map.other maps to 5 numbers"),
        ((63, 6), "retrieval.reduction", ".*map.other maps 63 numbers, and the encoder gives 64"),
    ):
        made = Reduction(rng.normal(size=shape[0]), rng.normal(size=shape))
        (members.data / "map.other").write_bytes(made.encode())
        named = {"source": "path:map.other", "sha256": made.digest.hex()}
        study = small_study(members.data, retrieval=SHELF | {"reduction": named})
        with pytest.raises(ConfigError, match=f"{where}: {what}"):
            space_of(study, members.data)


def test_no_more_of_a_reduction_is_read_than_the_study_has(tmp_path):
    """A file of 134 MB that takes 4 kB; its first bytes state another size, or the study's."""
    for stated, what in (((4096, 4096), "maps 4096 numbers"), ((64, 6), "is cut, too long")):
        file = tmp_path / "hole"
        with file.open("wb") as out:
            out.write(b"SFCRDCT1" + struct.pack("<II", *stated))
            out.truncate(16 + 8 * 4096 * 4097 + 32)
        tracemalloc.start()
        try:
            with pytest.raises(ConfigError, match=what):
                read_reduction(file, None, (64, 6))
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_an_encoder_is_pinned(members):
    encoder = {"source": "path:slm", "layer": 0, "sha256": members.space.encoder.digest}
    study = small_study(members.data, retrieval=SHELF | {"encoder": encoder})
    assert space_of(study, members.data).digest == members.space.digest
    study = small_study(members.data, retrieval=SHELF | {"encoder": encoder | {"sha256": "0" * 64}})
    with pytest.raises(ConfigError, match="the study pins 00000000"):
        space_of(study, members.data)


def test_the_reduction_needs_enough_public_text(members):
    study = small_study(members.data, retrieval=SHELF | {"dimension": 8})
    with pytest.raises(DataError, match="8 texts of 64 numbers give no 8 directions"):
        space_of(study, members.data)


def test_a_text_that_is_not_unicode_is_refused(members):
    with pytest.raises(DataError, match="text 2: is not valid Unicode"):
        members.space.embed(["w1", "\udcff enters ward"])


def test_embeddings_do_not_depend_on_their_company(members):
    texts = ["w1", "w2 w3 " * 20, "w4 w5"]
    together = members.space.embed(texts)
    alone = np.concatenate([members.space.embed([text]) for text in texts])
    assert np.abs(together - alone).max() < 1e-5
