"""``shelf serve``, ``shelf relay`` and ``ask --home``: what a person agrees to, types and reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from securefedcollm_cli import shelf
from securefedcollm_cli.main import app
from typer.testing import CliRunner, Result

from securefedcollm.errors import ConfigError, StateError, TransportError
from tests.support.network import Signed


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    made = Signed(tmp_path_factory.mktemp("signed"))
    for kit in ("silo-1/kit", "server/kit", "server/lead"):  # never started here
        (made.homes["server"].parent / kit / "startup").mkdir(parents=True)
    return made


def serve(signed: Signed, *more: str, **options: str) -> Result:
    index, home = signed.members.indexes["silo-1"], signed.homes["silo-1"]
    words = ["shelf", "serve", str(signed.file), "--index", str(index), "--home", str(home)]
    return CliRunner().invoke(app, [*words, *more], **options)


def test_an_operator_sees_what_questions_reveal_and_may_decline(signed):
    result = serve(signed, input="n\n")
    assert isinstance(result.exception, ConfigError)
    assert "not agreed; nothing was answered" in str(result.exception)
    for said in (
        "signed by all",
        "hub carries the questions, and may ask itself",
        "2 passages of 4",
        "may ask   server, silo-2, silo-3",
        "3 questions of each, in all runs and studies together",
        "nobody has asked this shelf yet",
        "a score of every passage, and 2 whole passages",
        "2 of them may collude, and have 6 questions; 6 tell all embeddings (dimension 6)",
        "WARNING   6 questions tell all embeddings on this shelf",
    ):
        assert said in result.stderr
    said = json.loads(
        serve(signed, "--json", "--questions", "1", input="n\n").stdout.split("\n")[0]
    )
    assert (said["event"], said["questions"], said["dimension"]) == ("terms", 1, 6)
    assert (said["together"], said["telling"]) == (2, 6)
    logs = list(signed.homes["silo-1"].rglob("evidence.sqlite"))
    assert logs == []  # nothing began


def test_members_that_collude_pool_their_questions(signed):
    """Three questions of one member would not tell all; those of two do."""
    assert "WARNING" in serve(signed, "--questions", "3", input="n\n").stderr
    assert "WARNING" not in serve(signed, "--questions", "2", input="n\n").stderr


def test_terms_that_no_frame_holds_are_refused_before_anybody_agrees(signed, monkeypatch):
    monkeypatch.setattr("securefedcollm.federation.roles.asking.MAX_FRAME", 100_000)
    result = serve(signed)
    assert isinstance(result.exception, ConfigError)
    assert "retrieval.documents: 4 members with shelves of this size" in str(result.exception)
    assert "may ask" not in result.stderr


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--questions", "4"], "--questions: 4 is above the 3 questions of the study"),
        (["--index", "absent"], "cannot read absent"),
    ],
)
def test_what_cannot_be_served_is_said_before_anybody_agrees(signed, more, what):
    result = serve(signed, *more)
    assert isinstance(result.exception, ConfigError | StateError)
    assert what in str(result.exception)


def test_a_study_without_the_section_is_refused(tmp_path):
    made = Signed(tmp_path / "place")
    plain = made.study.tree
    del plain["retrieval"]
    from securefedcollm.study import study_from_tree
    from tests.support.members import write_signed

    file = write_signed(study_from_tree(plain), made.homes, tmp_path / "plain.yaml")
    home = made.homes["silo-1"]
    (home / "kit" / "startup").mkdir(parents=True)
    result = CliRunner().invoke(app, ["shelf", "serve", str(file), "--home", str(home), "--yes"])
    assert "retrieval: this study has no questions to documents" in str(result.exception)


def test_the_process_serves_with_the_shelf_and_a_door(signed, monkeypatch):
    seen = {}

    def stopped(port, member, kit, limit, bars):
        stock = port._matter.stock
        seen.update(stock=stock, door=(member.run / ".asking").read_text(), limit=limit)

    monkeypatch.setattr(shelf, "serve", stopped)
    result = serve(signed, "--yes")
    assert result.exit_code == 0, result.output
    assert seen["stock"].quota._most == 3
    assert not Path(seen["door"]).exists()  # it went with the process
    assert seen["limit"] > 100_000


class Gone:
    """A relay over FLARE's server, to which nobody is connected at first, and which then ends."""

    silos = ("silo-1",)
    running = True

    def begin_job(self, wanted):
        raise TransportError("nobody is connected")

    def run_until(self, stop):
        assert not stop()
        self.running = False
        assert stop()

    def require_running(self):
        if not self.running:
            raise TransportError("FLARE's process has ended")


def test_the_server_waits_for_members_and_says_so_once():
    said: list[str] = []
    both = Gone()
    with pytest.raises(TransportError, match="has ended"):
        shelf._carry(both, both, SimpleNamespace(say=said.append))
    assert said == ["nobody is connected"]


ASK = ["ask", "w1", "--study", "retrieval"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "--home: whom to ask?"),
        (["--home", "h", "--shelf", "silo-1=x"], "--shelf: is for all roles on one machine"),
        (["--home", "h", "--as", "silo-1"], "--as: is for all roles on one machine"),
        (["--home", "h", "--out", "d"], "--out: is for all roles on one machine"),
    ],
)
def test_one_asks_over_the_network_or_on_one_machine(words, what):
    result = CliRunner().invoke(app, [*ASK, *words])
    assert isinstance(result.exception, ConfigError)
    assert what in str(result.exception)


def test_without_a_process_there_is_nobody_to_ask(signed):
    home, data = signed.homes["silo-2"], signed.members.data
    line = ["ask", "w1", "--study", str(signed.file), "--data", str(data), "--home", str(home)]
    result = CliRunner().invoke(app, line)
    assert "no process of this member is there to ask" in str(result.exception)
    assert "shelf serve" in result.exception.hint
