"""All participants tune one model: its digest is in every header, and in every later round's."""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.errors import ConfigError
from securefedcollm.tuning.models import load_model
from tests.support.arithmetic import NAMES, ArithmeticServer, ArithmeticSilo, make_study
from tests.support.inputs import make_inputs
from tests.support.rounds import Dies, Killed, Run, expected_theta
from tests.support.runs import RecordedRun, kinds, recorded_study, server_log, silo_log

OTHER = b"o" * 32


def given(monkeypatch, name, digest):
    """Let the silo ``name`` have a base model with another digest."""
    usual = ArithmeticSilo.base_digest
    mine = property(lambda silo: digest if silo.name == name else usual)
    monkeypatch.setattr(ArithmeticSilo, "base_digest", mine)


@pytest.mark.parametrize("whole", [True, False])
def test_a_silo_with_another_chat_template_is_refused_by_the_header(tmp_path, monkeypatch, whole):
    """Adversary: whoever hands silo-2 other files. The control is a header that names the weights
    alone: with it silo-2 is in the sum."""
    make_inputs(tmp_path)
    one = load_model("path:slm", base_dir=tmp_path)
    (tmp_path / "slm" / "chat_template.jinja").write_text("{{ messages[0]['content'] }} red")
    two = load_model("path:slm", base_dir=tmp_path)
    digests = [bytes.fromhex(m.digest if whole else m.parts["weights"]) for m in (one, two)]
    monkeypatch.setattr(ArithmeticServer, "base_digest", digests[0])
    monkeypatch.setattr(ArithmeticSilo, "base_digest", digests[0])
    given(monkeypatch, "silo-2", digests[1])

    study = make_study(rounds=1)
    run = Run(tmp_path / "run", study)
    survivors = tuple(name for name in NAMES if not whole or name != "silo-2")
    np.testing.assert_array_equal(run.go(), expected_theta(study, survivors))
    assert run.store.state.history[0]["survivors"] == list(survivors)


def killed_in_round_2(directory, study):
    with pytest.raises(Killed):
        RecordedRun(directory, study, wrap=lambda e: Dies(e, 10, before=True)).go()


def test_a_run_is_not_resumed_with_another_base_model(tmp_path, monkeypatch):
    """A swapped file, or a version whose digest covered the weights alone. Nothing is lost: with
    the model of before, the run goes on."""
    study = recorded_study()
    killed_in_round_2(tmp_path, study)
    state = (tmp_path / "server" / "state.json").read_bytes()
    before = server_log(tmp_path, study).leaves
    with monkeypatch.context() as patch:
        patch.setattr(ArithmeticServer, "base_digest", OTHER)
        patch.setattr(ArithmeticSilo, "base_digest", OTHER)
        with pytest.raises(ConfigError, match="but this run's earlier rounds had 6262") as caught:
            RecordedRun(tmp_path, study, resume=True).go()
    assert "covered the weights alone" in caught.value.hint
    assert (tmp_path / "server" / "state.json").read_bytes() == state
    assert server_log(tmp_path, study).leaves == before
    assert (RecordedRun(tmp_path, study, resume=True).go() == expected_theta(study)).all()


def test_a_silo_does_not_go_on_with_another_base_model(tmp_path, monkeypatch, caplog):
    """As above, at one silo: its own log says why, the server learns nothing."""
    study = recorded_study()
    killed_in_round_2(tmp_path, study)
    rounds = kinds(silo_log(tmp_path, study, "silo-3")).count("round")
    with monkeypatch.context() as patch:
        given(patch, "silo-3", OTHER)
        run = RecordedRun(tmp_path, study, resume=True)
        run.go()
    assert "this run's earlier rounds had" in caplog.text
    last = run.store.state.history[-1]
    assert last["dropouts"] == {"silo-3": "this silo cannot take part (its own log says why)"}
    assert kinds(silo_log(tmp_path, study, "silo-3")).count("round") == rounds
