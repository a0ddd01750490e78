"""Whole questions: what comes out, what a silo sees, and what either side refuses."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.messages import sign
from securefedcollm.errors import (
    BudgetExceeded,
    DataError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from securefedcollm.primitives import SigningKey
from securefedcollm.retrieval import (
    Asker,
    AskerStep,
    CountingQuota,
    PreparedShelf,
    Shelf,
    ShelfStep,
    Terms,
)
from securefedcollm.retrieval import messages as m
from securefedcollm.retrieval.terms import PRIME
from tests.support.shelves import SMALL, Consortium, Conversation, index_of, passage, unit


@pytest.fixture(scope="module")
def consortium() -> Consortium:
    return Consortium()


def shape(frames: list[bytes]) -> list[tuple[str, list[int]]]:
    """All of a view but the bits: the kind of each frame and the length of each of its fields."""
    found = []
    for frame in frames:
        kind, *fields = msgspec.msgpack.decode(frame)
        found.append((kind, [len(field) for field in fields]))
    return found


def test_a_question_finds_what_plain_search_finds_and_fetches_it_exactly():
    terms = Terms(documents=2048, dimension=96, block_bytes=96, fetched=10)
    consortium = Consortium(terms, count=2000)
    vectors, queries = unit(2000, 96), unit(51, 96, seed=1)
    found = 0
    for query in queries[:-1]:
        asker, shelf = consortium.asker(query), consortium.shelf()
        scores = asker.take_scores(shelf.handle(asker.ask()))
        assert np.abs(scores[:2000] - vectors @ query).max() < 2e-3
        assert np.abs(scores[2000:]).max() < 2e-3
        best = np.argsort(-(vectors @ query))[:10]
        found += len({*best} & {*np.argsort(-scores)[:10]})
    assert found >= 0.99 * 500
    talk = Conversation(consortium, queries[-1])
    assert talk.passages == tuple(passage(at) for at in np.argsort(-talk.scores)[:10])


def test_every_passage_of_a_shelf_can_be_fetched(consortium):
    for start in range(0, 30, 3):
        wanted = [start + 2, start, start + 1]
        talk = Conversation(consortium, consortium.question(), wanted)
        assert talk.passages == tuple(map(passage, wanted))
    assert Conversation(consortium, consortium.question(), [39, 1]).passages == (None, passage(1))
    assert Conversation(consortium, consortium.question(), []).passages == ()


def test_the_silos_view_of_two_questions_has_one_shape(consortium):
    wanted: tuple[list[int], ...] = ([0, 1, 2], [29], [], [5, 3])
    talks = [Conversation(consortium, consortium.question(i), w) for i, w in enumerate(wanted)]
    shapes = [shape(talk.view) for talk in talks]
    assert all(each == shapes[0] for each in shapes)
    assert [kind for kind, _ in shapes[0]] == ["question", "scores", "selection", "blocks"]
    # No field but what the header fixes is ever there twice, unless within one question.
    fields = [{*msgspec.msgpack.decode(f)[2:]} for talk in talks for f in talk.view]
    numbers = [{msgspec.msgpack.decode(f)[3] for f in talk.view[::2]} for talk in talks]
    assert all(len(number) == 1 for number in numbers)
    unique = set.union(*fields) - set.union(*numbers)
    assert len(unique) == sum(len(found - set.union(*numbers)) for found in fields)
    # Documents that a silo has, beyond the padding, do not show either.
    fewer = Consortium(SMALL, count=3)
    assert shape(Conversation(fewer, fewer.question(), [1]).view) == shapes[0]


def test_the_shape_would_differ_without_a_fixed_k():
    """The control: as many blocks as are wanted, instead of k."""
    views = []
    for wanted in ([0, 1, 2], [29]):
        terms = msgspec.structs.replace(SMALL, fetched=len(wanted))
        consortium = Consortium(terms)
        views.append(shape(Conversation(consortium, consortium.question(), wanted).view))
    assert views[0][:2] == views[1][:2]
    assert views[0][2] != views[1][2]
    assert views[0][3] != views[1][3]


def test_the_shape_would_differ_without_padding():
    """The control: each shelf has terms for as many documents as it has. Padding hides the number
    from whoever carries the frames."""
    views = []
    for count in (30, 4097):
        terms = msgspec.structs.replace(SMALL, documents=count)
        consortium = Consortium(terms, count=30)
        views.append(shape(Conversation(consortium, consortium.question(), [1]).view))
    assert views[0] != views[1]


def test_a_limit_on_questions_holds_across_restarts():
    written: list[tuple[str, bytes]] = []

    class Kept(CountingQuota):
        def persist(self, asker: str, number: bytes) -> None:
            written.append((asker, number))

    consortium = Consortium()
    consortium.quota = Kept(2)
    frames = [consortium.asker(consortium.question()).ask() for _ in range(3)]
    shelves = [consortium.shelf() for _ in frames]
    shelves[0].handle(frames[0])
    assert consortium.quota.left("ann") == 1
    shelves[1].handle(frames[1])
    with pytest.raises(BudgetExceeded, match="ann has asked all of its 2"):
        shelves[2].handle(frames[2])
    assert [asker for asker, _ in written] == ["ann", "ann"]
    consortium.quota = CountingQuota(2, {"ann": {number for _, number in written}})
    with pytest.raises(BudgetExceeded):
        consortium.shelf().handle(frames[2])
    assert consortium.quota.left("bob") == 2


def test_a_question_is_counted_before_anything_is_answered():
    class Broken(CountingQuota):
        def persist(self, asker: str, number: bytes) -> None:
            raise OSError("disk full")

    consortium = Consortium()
    consortium.quota = Broken(5)
    shelf = consortium.shelf()
    with pytest.raises(OSError, match="disk full"):
        shelf.handle(consortium.asker(consortium.question()).ask())
    assert shelf.step is ShelfStep.FAILED
    assert consortium.quota.left("ann") == 5


def test_no_question_is_answered_twice(consortium):
    """Adversary: an asker or a relay that averages answers."""
    frame = consortium.asker(consortium.question()).ask()
    consortium.shelf().handle(frame)
    with pytest.raises(RemoteProtocolError, match="this very question before"):
        consortium.shelf().handle(frame)


def test_answers_have_the_noise_that_they_should(consortium):
    """Flooding of 2^−13 and, from rounding the second polynomials, √(N/18) / 2^18."""
    query = consortium.question()
    scores = [Conversation(consortium, query, []).scores for _ in range(16)]
    noise = np.sqrt(np.mean(np.var(scores, axis=0, ddof=1)))  # 600 degrees of freedom
    expected = np.hypot(2.0**-13, np.sqrt(4096 / 18) / 2**18)
    assert noise == pytest.approx(expected, rel=0.2)


def test_second_polynomials_are_fresh_in_every_answer(consortium):
    """Adversary: an asker that repeats its polynomials under a new number, to find what they are
    masked with."""
    frame = consortium.asker(consortium.question()).ask()
    contents = []
    for number in (b"1" * 16, b"2" * 16):
        asked = altered(consortium, frame, m.Question, number=number)
        scores = msgspec.msgpack.decode(consortium.shelf().handle(asked), type=m.Scores)
        contents.append(np.frombuffer(scores.content, np.uint8))
    assert np.mean(contents[0] == contents[1]) < 0.02


def test_both_sides_have_one_transcript(consortium):
    talks = [Conversation(consortium, consortium.question()) for _ in range(2)]
    asker, shelf = talks[0].sides
    assert asker.transcript == shelf.transcript != talks[1].sides[0].transcript


def test_k_blocks_a_question_and_no_more(consortium):
    asker, shelf = consortium.asker(consortium.question()), consortium.shelf()
    asker.take_scores(shelf.handle(asker.ask()))
    with pytest.raises(LocalProtocolError, match="up to 3 different"):
        asker.select([0, 1, 2, 3])
    with pytest.raises(LocalProtocolError, match="up to 3 different"):
        asker.select([0, 0])
    with pytest.raises(LocalProtocolError, match="up to 3 different"):
        asker.select([40])
    selection = asker.select([0])
    shelf.handle(selection)
    assert shelf.step is ShelfStep.DONE
    with pytest.raises(RemoteProtocolError, match="although its question is done"):
        shelf.handle(selection)
    assert shelf.step is ShelfStep.FAILED


def altered(consortium: Consortium, frame: bytes, kind: type[m.Encryption], **change: object):
    """A hostile asker's frame: changed and signed by itself."""
    message = msgspec.msgpack.decode(frame, type=kind)
    return sign(msgspec.structs.replace(message, **change), consortium.asker_key).encode()


def rows_of(consortium: Consortium, fill: int, short: int = 0) -> bytes:
    product = consortium.header.terms.scoring
    residues = np.full((product.groups + 1, 4096), fill, dtype=np.uint64)
    return polynomials.pack(residues, product.ring)[: product.query_bytes - short]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"rows": rows_of(c, PRIME)}, "below the modulus"),
        (lambda c: {"rows": rows_of(c, 0, short=1)}, "another length"),
        (lambda c: {"rows": b""}, "another length"),
        (lambda c: {"rows": rows_of(c, 0) + b"\0"}, "another length"),
        (lambda c: {"before": bytes(32)}, "another question, silo, run or study"),
    ],
)
def test_a_hostile_question_is_refused(consortium, change: Callable[..., dict], message):
    frame = consortium.asker(consortium.question()).ask()
    shelf = consortium.shelf()
    with pytest.raises(RemoteProtocolError, match=message) as refused:
        shelf.handle(altered(consortium, frame, m.Question, **change(consortium)))
    assert refused.value.peer == "ann"
    with pytest.raises(RemoteProtocolError, match="question is failed"):
        shelf.handle(frame)


def test_any_residues_below_q_are_answered_with_the_same_shape(consortium):
    """What a silo cannot tell from a question: polynomials that are no ciphertexts."""
    frame = consortium.asker(consortium.question()).ask()
    honest = consortium.shelf().handle(frame)
    for fill in (0, 1, PRIME - 1):
        number = fill.to_bytes(16, "big")
        hostile = altered(
            consortium, frame, m.Question, rows=rows_of(consortium, fill), number=number
        )
        assert shape([consortium.shelf().handle(hostile)]) == shape([honest])


def test_questions_to_others_or_by_others_are_refused(consortium):
    frame = consortium.asker(consortium.question()).ask()
    neighbour = Consortium()
    with pytest.raises(RemoteProtocolError, match="another question, silo, run or study"):
        neighbour.shelf().handle(frame)
    message = msgspec.msgpack.decode(frame, type=m.Question)
    forged = sign(message, SigningKey.generate()).encode()
    with pytest.raises(RemoteProtocolError, match="bad signature"):
        consortium.shelf().handle(forged)
    before = consortium.quota.left("ann")
    consortium.shelf().handle(frame)
    assert consortium.quota.left("ann") == before - 1  # refused frames were not counted


def test_a_question_of_another_run_is_refused(consortium):
    """Adversary: a relay that carries a frame to the same parties in another run."""
    frame = consortium.asker(consortium.question()).ask()
    header = msgspec.structs.replace(consortium.header, run=b"another run's id")
    shelf = Shelf(
        consortium.prepared,
        header=header,
        asker="ann",
        key=consortium.silo_key,
        quota=consortium.quota,
    )
    with pytest.raises(RemoteProtocolError, match="another question, silo, run or study"):
        shelf.handle(frame)
    consortium.shelf().handle(frame)


def test_a_selection_belongs_to_its_question(consortium):
    askers = [consortium.asker(consortium.question(seed)) for seed in (1, 2)]
    shelves = [consortium.shelf() for _ in askers]
    for asker, shelf in zip(askers, shelves, strict=True):
        asker.take_scores(shelf.handle(asker.ask()))
    selections = [asker.select([1]) for asker in askers]
    with pytest.raises(RemoteProtocolError, match="another question"):
        shelves[0].handle(selections[1])
    number = altered(consortium, selections[1], m.Selection, number=bytes(16))
    with pytest.raises(RemoteProtocolError, match="selects for another question"):
        shelves[1].handle(number)


def test_answers_to_others_or_by_others_are_refused(consortium):
    askers = [consortium.asker(consortium.question(seed)) for seed in (1, 2)]
    answers = [consortium.shelf().handle(asker.ask()) for asker in askers]
    with pytest.raises(RemoteProtocolError, match="sent an answer to another question"):
        askers[0].take_scores(answers[1])
    message = msgspec.msgpack.decode(answers[1], type=m.Scores)
    forged = sign(message, SigningKey.generate()).encode()
    with pytest.raises(RemoteProtocolError, match="bad answer") as refused:
        askers[1].take_scores(forged)
    assert refused.value.peer == "clinic"
    assert askers[1].step is AskerStep.FAILED
    with pytest.raises(LocalProtocolError, match="out of order"):
        askers[1].select([1])


def test_a_hostile_silo_gets_the_same_selection_whatever_it_scores(consortium):
    """Scores beyond their range are clipped; garbage in blocks is refused after the last frame."""
    asker = consortium.asker(consortium.question())
    honest = consortium.shelf()
    scores = msgspec.msgpack.decode(honest.handle(asker.ask()), type=m.Scores)
    garbage = np.random.default_rng(0).bytes(len(scores.content))
    lie = sign(msgspec.structs.replace(scores, content=garbage), consortium.silo_key)
    found = asker.take_scores(lie.encode())
    assert found.shape == (40,)
    assert np.abs(found).max() <= 1
    selected = asker.select([3])
    talk = Conversation(consortium, consortium.question(), [3])
    assert shape([selected]) == shape([talk.view[2]])
    before = msgspec.msgpack.decode(selected, type=m.Selection)
    content = np.random.default_rng(1).bytes(SMALL.fetching.answer_bytes)
    blocks = m.Blocks(m.digest(consortium.header, before), bytes(64), content)
    with pytest.raises(RemoteProtocolError, match="no passage"):
        asker.take_blocks(sign(blocks, consortium.silo_key).encode())


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_frame_with_other_bytes_is_refused_and_nothing_else_happens(consortium, data):
    asker, shelf = consortium.asker(consortium.question()), consortium.shelf()
    sides: list[Callable[[bytes], object]] = [
        shelf.handle,
        asker.take_scores,
        shelf.handle,
        asker.take_blocks,
    ]
    frame = asker.ask()
    target = data.draw(st.integers(0, 3))
    for at, side in enumerate(sides):
        if at == target:
            break
        made = side(frame)
        frame = made if isinstance(made, bytes) else asker.select([1])
    place = data.draw(st.integers(0, min(len(frame), 400) - 1) | st.integers(0, len(frame) - 1))
    changed = data.draw(
        st.sampled_from([frame[:place], frame + b"\0", frame[place:]])
        | st.integers(1, 255).map(
            lambda x: frame[:place] + bytes([frame[place] ^ x]) + frame[place + 1 :]
        )
        | st.binary(max_size=80)
    )
    if changed != frame:
        with pytest.raises(ProtocolError):
            sides[target](changed)


def test_a_frame_that_is_too_long_is_refused_unread(consortium):
    with pytest.raises(RemoteProtocolError, match="more than"):
        consortium.shelf().handle(bytes(10**7))


def test_sides_that_are_set_up_wrongly_say_so(consortium):
    stranger = SigningKey.generate()
    header, other = consortium.header, msgspec.structs.replace(SMALL, space=b"x" * 32)
    with pytest.raises(LocalProtocolError, match="another asker"):
        Asker(header=header, silo="clinic", key=stranger, query=consortium.question())
    with pytest.raises(LocalProtocolError, match="9 numbers, not 8"):
        consortium.asker(np.ones(9))
    with pytest.raises(DataError, match="zero"):
        consortium.asker(np.zeros(8))
    with pytest.raises(LocalProtocolError, match="another silo or other terms"):
        Shelf(
            consortium.prepared,
            header=msgspec.structs.replace(header, terms=other),
            asker="ann",
            key=consortium.silo_key,
            quota=consortium.quota,
        )
    with pytest.raises(LocalProtocolError, match="another encoder"):
        PreparedShelf(consortium.index, other)
    with pytest.raises(LocalProtocolError, match="does not fit"):
        PreparedShelf(index_of(SMALL, 41), SMALL)
    with pytest.raises(LocalProtocolError, match="not negative"):
        CountingQuota(-1)


def test_nothing_secret_is_shown_or_copied(consortium):
    query = consortium.question()
    asker, shelf = consortium.asker(query), consortium.shelf()
    frame = asker.ask()
    question = msgspec.msgpack.decode(frame, type=m.Question)
    assert repr(asker) == "Asker(scores)"
    assert repr(shelf) == "Shelf(question)"
    assert repr(question) == f"Question({len(question.rows)} bytes)"
    answer = msgspec.msgpack.decode(shelf.handle(frame), type=m.Scores)
    assert repr(answer) == f"Scores({len(answer.content)} bytes)"
    assert repr(consortium.index) == "Index(30 passages, d=8)"
    assert "Rule" not in repr(consortium.prepared)
    with pytest.raises(TypeError):
        pickle.dumps(asker)


def test_the_example_of_the_page_runs_as_it_stands():
    page = Path(__file__).parents[2] / "docs" / "retrieval.md"
    *_, example = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    names: dict = {}
    exec(example, names)
    assert names["found"][0] == names["passages"][1]


def test_the_terms_of_the_benchmark_keep_their_sizes():
    """At 2,048 documents and d = 96: the limits that the design set."""
    scoring = Terms(documents=2048, dimension=96).scoring
    assert scoring.query_bytes < 9e6
    assert scoring.answer_bytes < 100e3
