"""A malicious silo, or a malicious server that carries the frames, against private questions.

What nobody can see is not played: a silo that scores its passages too low hides them, and one that
keeps an index for each asker and signs the same fingerprint for all of them gives its word falsely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np

from securefedcollm.errors import CryptoError, SecureFedCoLLMError
from securefedcollm.federation.questions.inquiry import Fetch, Fetched, judge
from securefedcollm.primitives import verify
from securefedcollm.retrieval.messages import Scores, transcript
from securefedcollm_audits.protocol.outcome import Outcome, observed
from securefedcollm_audits.protocol.retrieval_cohort import (
    QUESTIONS,
    SMALL,
    Change,
    Pair,
    Talk,
    embed,
    embedding,
    index_of,
    refused,
    resigned,
    talk,
    text_of,
)

TOPIC = text_of("clinic", 3)
"""A question that the silo's shelf answers."""
OTHER = "what no passage is about"
KINDS = ("question", "scores", "selection", "blocks")


def _asked(pair: Pair, honest: Pair, text: str = TOPIC) -> tuple[list[str], dict[str, str]]:
    """Whose passage comes first, in order, and who is named: the attacker and an honest silo are
    asked the same."""
    fetched = Fetched()
    for each in (pair, honest):
        found = talk(each.ask(text), each.answer())
        assert found.scores is not None
        assert found.passages is not None
        best = -np.sort(-found.scores)[: SMALL.fetched]
        fetched.fetches[each.silo] = Fetch(found.passages, tuple(best.tolist()))
    judged = judge(fetched, embedding(text), embed, SMALL.fetched)
    return [hit.silo for hit in judged.hits], judged.suspect


def high_scores() -> Outcome:
    """Give unfitting passages the embedding of what is asked, so that they are read first."""
    fake = index_of("liar")
    fake.entries[:] = np.rint(embedding(TOPIC) * 2**12).astype(np.int16)
    liar, honest = Pair(silo="liar", index=fake), Pair()
    order, suspect = _asked(liar, honest)
    return observed(
        "scores that are too high",
        "the first place for a passage that does not fit",
        f"the asker embeds it again: the silo {suspect.get('liar', 'is not named')}",
        held=order[0] == "clinic" and set(suspect) == {"liar"},
    )


def swapped_documents() -> Outcome:
    """Serve other passages than those that the index, with its fingerprint, was made of."""
    honest, index = Pair(), index_of("clinic")
    shown = index.fingerprint
    index.blocks = np.roll(index.blocks, 1, axis=0)
    pair = Pair(index=index)
    pair.shelf.fingerprint = shown  # what its log will say
    other = Pair(silo="other", index=index_of("other"))
    suspect = _asked(pair, other)[1]
    assert not _asked(honest, other)[1]
    return observed(
        "documents swapped behind the fingerprint",
        "another passage, read as the one that was scored",
        f"the asker embeds it again: the silo {suspect.get('clinic', 'is not named')}",
        held=set(suspect) == {"clinic"},
    )


def two_answers() -> Outcome:
    """Answer the same question twice, differently, and write only one of the answers down."""
    pair = Pair()
    asker = pair.ask(TOPIC)
    question = asker.ask()
    mine = pair.answer()
    logged = mine.handle(question)
    pair.quota = type(pair.quota)(QUESTIONS)  # it forgets that it has counted the question
    shown = pair.answer()
    sent = shown.handle(question)
    asker.take_scores(sent)
    second = _fails(lambda: asker.take_scores(logged))
    slip, header = asker.receipts[-1], pair.header().digest
    signed = _signed(pair, Scores, slip.signed, slip.signature)
    differs = transcript(header, Scores, slip.signed) != mine.transcript
    return observed(
        "two answers to one question",
        "an answer that it can deny",
        f"the asker keeps what the silo signed over this question, and takes one ({second})",
        held=signed and differs and "out of order" in second,
    )


def _signed(pair: Pair, kind: type[Scores], signed: bytes, signature: bytes) -> bool:
    try:
        verify(pair.keys[pair.silo].public, kind.CONTEXT, signed, signature)
    except CryptoError:
        return False
    return True


def _fails(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except SecureFedCoLLMError as error:
        return error.message
    return "nothing was refused"


def tagged_asker(steps: Callable[[Pair, str, Change], Talk] | None = None) -> Outcome:
    """Answer with scores and blocks of the silo's own making, other ones for each question, and
    watch whether the asker's frames tell what it is looking for."""
    play = steps or _played
    probes: dict[str, Callable[[Pair], Change]] = {
        "nothing": lambda pair: lambda kind, frame: frame,
        "scores of another shelf": lambda pair: _other_scores(pair),
    }
    seen = {
        (probe, text): play(pair := Pair(), text, probes[probe](pair)).crossed[::2]
        for probe in probes
        for text in (TOPIC, OTHER)
    }
    views = {tuple(view) for view in seen.values()}
    return observed(
        "an asker tagged by what it is sent",
        f"{len(views)} kinds of question told apart by number or length of frames",
        "the asker's frames are the same whatever it asked and was sent: "
        + ", ".join(f"{kind} {size:,} bytes" for kind, size in next(iter(seen.values()))),
        held=len(views) == 1,
    )


def _played(pair: Pair, text: str, change: Change) -> Talk:
    return talk(pair.ask(text), pair.answer(), change)


def _other_scores(pair: Pair) -> Change:
    """The silo's own frames, with the content of another shelf's answer to another question."""
    other = Pair(index=index_of("another"))
    content = msgspec.msgpack.decode(
        talk(other.ask(OTHER), other.answer()).frames["scores"], type=Scores
    ).content

    def change(kind: str, frame: bytes) -> bytes:
        if kind != "scores":
            return frame
        return resigned(frame, Scores, pair.keys[pair.silo], content=content)

    return change


# ---- the server, which carries the frames ----


def carried_view(steps: Callable[[Pair, str, Change], Talk] | None = None) -> Outcome:
    """Look for what is asked in number, order, length or bytes of the frames."""
    play = steps or _played
    keep: Change = lambda kind, frame: frame  # noqa: E731
    one, two, again = (play(Pair(), text, keep) for text in (TOPIC, OTHER, TOPIC))
    same = one.crossed == two.crossed
    alike = [
        kind
        for kind in ("question", "selection")
        if _common(one.frames[kind], again.frames.get(kind, b"")) > 0.02
    ]
    learnt = [*(["which of two questions it was"] if not same else []), *alike]
    return Outcome(
        "the frames of two questions",
        tuple(learnt),
        f"{len(one.crossed)} frames of {sum(size for _, size in one.crossed):,} bytes, whatever is "
        "asked; the same question again shares no byte but by chance",
        held=not learnt,
    )


def _common(one: bytes, two: bytes) -> float:
    """Share of polynomials' bytes that are the same in both."""
    size = min(len(one), len(two))
    a, b = (np.frombuffer(frame[200:size], dtype=np.uint8) for frame in (one, two))
    return float(np.mean(a == b)) if size > 200 else 0.0


@dataclass
class _Damage:
    """What got through of altered frames, and what was counted for it."""

    tries: int = 0
    through: int = 0
    words: str = ""


def altered_frames() -> Outcome:
    """Change a bit anywhere in each of the four frames, cut it, or add to it."""
    damage = _Damage()
    for kind in KINDS:
        size = dict(talk((pair := Pair()).ask(TOPIC), pair.answer()).crossed)[kind]
        for at in (0, 5, 60, 110, 200, size // 2, size - 1):
            _try(damage, kind, partial(_flipped, at=at))
        _try(damage, kind, lambda frame: frame[:-1])
        _try(damage, kind, lambda frame: frame + b"\0")
    return observed(
        "altered frames",
        f"{damage.through} of {damage.tries} altered frames got through",
        f"{damage.tries} altered frames, none taken: {damage.words}",
        held=not damage.through,
    )


def _flipped(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]


def _try(damage: _Damage, kind: str, change: Callable[[bytes], bytes]) -> None:
    pair = Pair()
    found = talk(
        pair.ask(TOPIC), pair.answer(), lambda at, frame: change(frame) if at == kind else frame
    )
    damage.tries += 1
    damage.words = found.stopped
    damage.through += found.passages is not None
    if kind == "question":  # nothing that the asker did not sign may use up its questions
        damage.through += pair.counted() > 0


def replayed_frames() -> Outcome:
    """Bring a question once more, after the silo's restart too, or to another silo; a selection to
    a silo that waits for a question; and the asker an older question's answers."""
    pair, other = Pair(), Pair(silo="other", index=index_of("other"))
    first = talk(pair.ask(TOPIC), pair.answer())
    frames = first.frames
    ended = {
        "the same question": refused(lambda: pair.answer().handle(frames["question"]), pair),
        "at another silo": refused(lambda: other.answer().handle(frames["question"]), other),
        "a selection": refused(lambda: pair.answer().handle(frames["selection"]), pair),
    }
    for kind in ("scores", "blocks"):
        again = talk(pair.ask(TOPIC), pair.answer(), partial(_instead, kind, frames[kind]))
        got = again.scores if kind == "scores" else again.passages
        ended[f"older {kind}"] = again.stopped if got is None else ""
    through = tuple(name for name, words in ended.items() if not words)
    right = pair.counted() == 3 and other.counted() == 0
    return Outcome(
        "replayed frames",
        through,
        f"each frame is signed over all before it: {ended['older scores']}",
        held=not through and right,
    )


def _instead(kind: str, other: bytes | None, at: str, frame: bytes) -> bytes | None:
    """Another frame, or none, in place of those of a kind."""
    return other if at == kind else frame


def exchanged_askers() -> Outcome:
    """Say that ann's question is bob's, and give bob's answers to ann."""
    pair = Pair()
    ann, bob = pair.ask(TOPIC), pair.ask(TOPIC, "bob")
    question = ann.ask()
    why = refused(lambda: pair.answer("bob").handle(question), pair)
    theirs = pair.answer("bob").handle(bob.ask())
    taken = _fails(lambda: ann.take_scores(theirs))
    spent = pair.counted("bob")
    return observed(
        "askers exchanged",
        "an answer to a question that its asker did not sign",
        f"the header names both ends: {why}; {taken}",
        held=bool(why) and "nothing" not in taken and spent == 1 and pair.counted() == 0,
    )


def dropped_frames() -> Outcome:
    """Lose each of the four frames in turn."""
    pair, words = Pair(), ""
    for kind in KINDS:
        lost = talk(pair.ask(TOPIC), pair.answer(), partial(_instead, kind, None))
        words = lost.stopped
        if lost.passages is not None:
            return Outcome("lost frames", ("passages without an answer",), words, held=False)
    whole = talk(pair.ask(TOPIC), pair.answer())
    # The first was lost on its way to the silo, which counted the three others and this one.
    return observed(
        "lost frames",
        "a question that is answered without being counted, or never again",
        f"a question that reached the silo counts, and the next is answered ({words})",
        held=whole.passages is not None and pair.counted() == 4,
    )


SILO_CASES = (high_scores, swapped_documents, two_answers, tagged_asker)
SERVER_CASES = (carried_view, altered_frames, replayed_frames, exchanged_askers, dropped_frames)
