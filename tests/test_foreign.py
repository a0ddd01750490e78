"""Foreign text is data: one line, all of it visible, bounded; in errors and logs too."""

from __future__ import annotations

import io
import logging
import pickle
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from securefedcollm.errors import ConfigError, RemoteProtocolError
from securefedcollm.foreign import (
    MOST,
    MOST_MESSAGE,
    PrintableFormatter,
    as_text,
    decode_json,
    nested_deeper,
    printable,
    stream_safe,
    visible,
)
from tests.support.hostile import SEEN, WORDS, assert_harmless


def test_what_would_act_is_shown_instead():
    shown = printable(WORDS)
    assert_harmless(shown)
    assert all(seen in shown for seen in SEEN)
    assert printable("\ud800 \U000e0041 \xa0 é 漢 𝔘 ε") == r"\ud800 \U000e0041 \xa0 é 漢 𝔘 ε"


@given(st.text(st.sampled_from("a \u0301\u0316\u0344\u1eba\u0f77\uac01\uff9e\u0f73"), max_size=200))
def test_a_stream_safe_text_has_no_long_run_of_accents_in_any_form(text):
    """Runs counted in the whole text's own NFKD."""
    run = longest = 0
    for character in unicodedata.normalize("NFKD", text):
        run = run + 1 if unicodedata.combining(character) else 0
        longest = max(longest, run)
    assert stream_safe(text) == (longest <= 30)


def test_a_run_of_thirty_accents_is_the_longest():
    """U+0344 is two of them."""
    assert stream_safe("e" + "\u0301" * 30 + "e" + "\u0301" * 30)
    assert not stream_safe("e" + "\u0301" * 31)
    assert stream_safe("\u0344" * 15)
    assert not stream_safe("\u0344" * 16)


@given(st.text(st.characters(), max_size=400), st.integers(2, 500))
def test_any_text_becomes_one_bounded_printable_line(text, most):
    shown = printable(text, most)
    assert shown.isprintable()
    assert len(shown) <= most
    assert printable(shown, most) == shown
    if text.isprintable() and len(text) <= most:
        assert shown == text
    assert all(line.isprintable() for line in visible(text).split("\n"))


def test_a_gigabyte_of_words_is_cut_before_it_is_looked_at():
    assert len(printable("\x1b" * (1 << 28))) == MOST


@given(st.text(alphabet="[]/\\redbold=#@:\x1b\n", max_size=60))
def test_markup_stays_what_it_is(text):
    out = io.StringIO()
    Console(file=out, width=10_000).print(as_text(text), end="", highlight=False)
    assert out.getvalue() == printable(text)


def test_an_error_is_printable_whoever_raises_it():
    for error in (
        ConfigError(WORDS, where=WORDS, hint=WORDS),
        RemoteProtocolError(WORDS, peer=WORDS),
        pickle.loads(pickle.dumps(ConfigError(WORDS))),
    ):
        for text in (str(error), error.message, error.hint):
            assert_harmless(text)
            assert "\n" not in text
        assert SEEN[1] in str(error)
    assert len(str(ConfigError("x" * 10**6))) == MOST_MESSAGE


def test_a_log_record_cannot_forge_another():
    record = logging.LogRecord("x", logging.INFO, "", 1, "said: %s", (WORDS,), None)
    text = PrintableFormatter("%(levelname)s %(message)s").format(record)
    assert_harmless(text)
    assert text.startswith("INFO said: gone [/red]")
    assert text.count("\n    ERROR securefedcollm: forged") == 1  # indented: no record of its own


@pytest.mark.parametrize(
    ("raw", "deeper"),
    [
        (b"[" * 65, True),
        (b"[" * 64 + b"]" * 64, False),
        (b"[]" * 1000, False),
        (b'{"a":"' + b"[" * 1000 + b'"}', False),
        (b'{"a":"\\"' + b"[" * 1000 + b'"}', False),
        (b'{"a":"\\\\"' + b',"b":[' * 100, True),
    ],
)
def test_depth_is_seen_before_parsing(raw, deeper):
    assert nested_deeper(raw) is deeper


def test_the_look_at_depth_is_linear():
    """Adversary: a string that does not end, whose every quote could be tried as a beginning."""
    # Quadratic, it would take hours.
    assert not nested_deeper(b'"' + b'\\"' * (1 << 20) + b"[" * 100)


@pytest.mark.parametrize("raw", [b"[" * 10**6, b'{"a":1,"a":2}', b"\xff", b"nope", "[" * 10**5])
def test_json_of_others_fails_as_a_value_error_alone(raw):
    with pytest.raises(ValueError, match=r"."):
        decode_json(raw)
