"""What other parties wrote, on its real ways to a terminal, a log and a page.

Adversary: a silo towards the server's operator, the server towards a silo's, a study's author and a
bundle's maker towards everybody.
"""

from __future__ import annotations

import json
import logging
import re
from functools import partial
from pathlib import Path

import msgspec
import pytest
from securefedcollm_cli.main import app, report
from securefedcollm_cli.progress import Bars
from securefedcollm_cli.role_words import print_round
from typer.testing import CliRunner

from securefedcollm.errors import SecureFedCoLLMError
from securefedcollm.experiment.compare import Comparison, Difference, Run
from securefedcollm.experiment.compare_page import write_plot
from securefedcollm.experiment.page import markdown, plot
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.messages import Refused, encode
from securefedcollm.foreign import log_to_stderr
from securefedcollm.privacy.events import Gaussian
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.report import read_report
from securefedcollm.privacy.report_html import to_html
from securefedcollm.study import load_study
from tests.support.arithmetic import NAMES
from tests.support.forge import doctor
from tests.support.hostile import SEEN, WORDS, assert_harmless, raw_in
from tests.support.runs import RecordedRun, make_silo, recorded_study

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def printed_logs():
    """A function: from now on this process logs to stderr, as the command line sets it up."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def start():
        root.handlers.clear()  # pytest's, which would be closed, and complain for pages
        log_to_stderr(logging.INFO, "%(levelname)s %(name)s: %(message)s")

    yield start
    root.handlers[:], root.level = before


class Rude:
    """An engine whose last silo refuses, or fails, in words of its own."""

    def __init__(self, engine, answer):
        self.engine, self.answer = engine, answer

    def exchange(self, frames, timeout):
        rest = {name: frame for name, frame in frames.items() if name != NAMES[3]}
        mine = {NAMES[3]: self.answer} if NAMES[3] in frames else {}
        return self.engine.exchange(rest, timeout) | mine


@pytest.mark.parametrize(
    "answer",
    [
        encode(Refused("Refused", WORDS, WORDS)),
        encode(Refused("Refused", "x" * 10**6, "")),
        Failure(WORDS),
        msgspec.msgpack.encode([WORDS]),  # no such message: the decoder quotes its tag
    ],
)
def test_the_server_prints_a_silos_refusal_and_goes_on(tmp_path, capsys, printed_logs, answer):
    printed_logs()
    with Bars() as bars:
        RecordedRun(
            tmp_path,
            recorded_study(rounds=2),
            wrap=lambda e: Rude(e, answer),
            on_round=partial(print_round, 2, bars, False),
        ).go()
    err = capsys.readouterr().err
    assert_harmless(err)
    assert "round 2/2, 3 silos, silo-4 lost" in err.replace("\n", " ")
    assert len(err) < 20_000
    if b"gone" in (answer if isinstance(answer, bytes) else b"gone"):
        assert SEEN[0] in err
    state = (tmp_path / "server" / "state.json").read_text()
    assert max(len(r["dropouts"]["silo-4"]) for r in json.loads(state)["history"]) < 1000


def test_a_run_that_fails_of_refusals_says_so_in_one_line(tmp_path, capsys):
    class AllRude(Rude):
        def exchange(self, frames, timeout):
            return dict.fromkeys(frames, self.answer)

    answer = encode(Refused("Refused", WORDS, ""))
    run = RecordedRun(tmp_path, recorded_study(), wrap=lambda e: AllRude(e, answer))
    with pytest.raises(SecureFedCoLLMError) as caught:
        run.go()
    report(caught.value)
    err = capsys.readouterr().err
    assert_harmless(err)
    assert err.count("\n") == 1
    assert all(f"{name}: gone [/red]" in err for name in NAMES)


def test_a_silo_prints_what_the_server_sent(tmp_path, capsys, printed_logs):
    printed_logs()
    silo = make_silo(NAMES[0], lambda *_: None, study=recorded_study(), directory=tmp_path)
    reply = silo.step(msgspec.msgpack.encode([WORDS]))
    assert_harmless(str(msgspec.msgpack.decode(reply)))  # nor does it come back to bite the server
    err = capsys.readouterr().err
    assert_harmless(err)
    assert SEEN[1] in err


def run(*words):
    """stdout and stderr; an error as the command line would print it."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    error = result.exception
    assert error is None or isinstance(error, SystemExit | SecureFedCoLLMError), error
    told = f"{error} {error.hint}" if isinstance(error, SecureFedCoLLMError) else ""
    return result.output + told


def test_a_bundle_with_such_words_is_verified_reported_and_compared(
    audited_bundle,
    tmp_path,
):
    def sneer(forger):
        forger.what("silo-2", "audited")["setting"] = WORDS
        forger.what("silo-2", "audited")["audit"] = WORDS[:64]
        for entry in forger.logs["silo-1"]:
            if "unit" in entry["what"]:
                entry["what"]["unit"] = WORDS[:64]

    forged = doctor(audited_bundle, tmp_path / "forged.zip", sneer)
    pages = [tmp_path / "page.html"]
    said = [
        run("audit", "verify", forged),
        run("audit", "compare", forged, forged),
        run("audit", "report", forged, "--html", pages[0]),
        run("audit", "report", forged, "--json"),
        run("audit", "verify", forged, "--json"),
    ]
    for text in said:
        assert_harmless(text)
    said.append(pages[0].read_text())
    assert raw_in(said[5]) == []
    assert r"\u202e" in said[5]
    assert r"\x1b[2J" in said[5]
    assert "[/red]" in said[0]


def test_a_bundle_of_a_name_that_acts(record_bundle, tmp_path):
    copy = tmp_path / "e\x1b[2J[red]\u202e.zip"
    copy.write_bytes(record_bundle.read_bytes())
    for words in (["verify"], ["verify", "--json"], ["report", "--html", tmp_path / "page.html"]):
        assert_harmless(run("audit", words[0], copy, *words[1:]))


def test_status_of_a_study_with_such_keys(tmp_path):
    study = tmp_path / "studies" / "mine"
    study.mkdir(parents=True)
    for words, shown in ((WORDS, "U+001B"), ("a\u200b[/red]\u2028", r"a\u200b[/red]\u2028")):
        (study / "study.yaml").write_text(f"{QUICKSTART.read_text()}\n{json.dumps(words)}: 1\n")
        said = run("status", "--home", tmp_path)
        assert_harmless(said)
        assert shown in said


def test_a_study_with_invisible_words_is_shown_as_data(tmp_path):
    source = "path:a\u200bb\u2028c [/red]\xa0"
    setting = f"models.slm.source={json.dumps(source)}"
    for command in ("check", "show"):
        said = run("study", command, QUICKSTART, "--set", setting)
        assert_harmless(said)
        assert "error" not in said
    shown = tmp_path / "shown.yaml"
    shown.write_text(said)
    assert load_study(shown).digest == load_study(QUICKSTART, [setting]).digest


def test_budget_show_of_a_ledger_whose_owner_acts(tmp_path):
    """Adversary: whoever hands an auditor a ledger."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path, WORDS) as ledger:
        ledger.reserve("[/red]\x1b[2J", "record", "run", 0, 0, [Gaussian(2.0)], (8.0, 1e-5))
    said = run("budget", "show", "--ledger", path)
    assert_harmless(said)
    assert "error" not in said
    assert r"\x1b[2J" in said


SCRIPT = f"<script>alert(1)</script> | ![x](http://evil.example) &amp; '\" {WORDS}"


def assert_inert(page):
    """A page or picture on which SCRIPT is to be read, and nothing else comes of it."""
    assert raw_in(page) == []
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | " in page
    assert "&amp;amp; &#39;&#34; gone" in page
    assert r"\u202edesrever\u2028" in page


def test_a_budget_report_of_a_ledger_whose_owner_acts(tmp_path):
    """Adversary: as above, and a study's author who names the column of subjects."""
    path = tmp_path / f"{SCRIPT[:8]}.sqlite"
    with Ledger(path, SCRIPT) as ledger:
        ledger.reserve(SCRIPT, f"subject:{SCRIPT}", SCRIPT, 0, 0, [Gaussian(2.0)], (8.0, 1e-5))
    page = to_html(read_report(path))
    assert_inert(page)
    assert page.count("&lt;script&gt;alert") == 4  # title, head, and the account's unit twice


def test_a_comparison_of_a_run_whose_name_acts(tmp_path):
    """Adversary: a run's maker, by its directory, its groups of questions, and its study."""
    course = [{"accuracy": {f"slm/{SCRIPT}": 0.5}}] * 2
    run = Run(SCRIPT, "d", "s", "00", "1", 2, None, 0, 0, None, course)
    found = Comparison([run, run], [Difference(SCRIPT, [None, SCRIPT])])
    for name in ("runs.svg", "runs.html"):
        write_plot(found, tmp_path / name)
        assert_inert((tmp_path / name).read_text())


def test_an_experiment_whose_groups_act():
    """Adversary: whoever wrote the test questions."""
    number = {"mean": 0.5, "low": 0.4, "high": 0.6}
    row = {"model": "slm", "method": "FedCoLLM", "less": "FedAvg", "main": True}
    row |= {"accuracy": {SCRIPT: number}, "gold_log_prob": {SCRIPT: number}}
    table = {"study": "s", "questions": 1, "seeds": [1], "groups": [SCRIPT], "notes": []}
    table |= {"rows": [row], "differences": [row]}
    assert_inert(plot(table))
    page = markdown(table)
    assert_harmless(page)
    assert re.search(r"(?<!\\)([<&]|\]\()", page) is None
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
