"""Records that vote, as processes over mutual TLS, with kills."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path

import pytest
from securefedcollm_audits.verification.merge import merge
from securefedcollm_audits.verification.verify import verify

from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.privacy.ledger import Ledger
from tests.support.consortium import make_homes
from tests.support.polling import CHOICES, COPIES, QUESTION, RECORDS
from tests.support.shelf_processes import Processes
from tests.support.vote_network import SILOS, SignedVoters

pytestmark = [pytest.mark.timeout(600), pytest.mark.soak]

ASKED = json.dumps({"question": QUESTION, "choices": list(CHOICES)})


def test_records_vote_through_kills(tmp_path: Path) -> None:
    homes = make_homes(tmp_path / "homes", SILOS)
    signed = SignedVoters(tmp_path / "place", homes=homes, questions=6)
    data, words = signed.voters.data, {}
    for name, records in RECORDS.items():
        rows = [
            {"question": one.prompt, "choices": list(one.choices), "answer": one.answer}
            for one in records
        ]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words[name] = ["--records", str(file), "--models", str(data)]
    with contextlib.ExitStack() as stack:
        processes = Processes(signed, data, words, stack)
        for name in ("server", *SILOS):
            processes.start(name)
        whole = set(SILOS)
        answer = processes.until_answered("silo-1", ASKED, whole, "counted")
        assert answer["choice"] == "w50"
        assert [round(vote / COPIES) for vote in answer["votes"].values()] == [2, 1, 0]
        processes.kill("silo-3")
        answer = processes.ask("server", ASKED)
        assert set(answer["counted"]) == whole - {"silo-3"}
        processes.start("silo-3")
        processes.kill("server")
        processes.start("server")
        processes.until_answered("silo-1", ASKED, whole, "counted")
        processes.kill("silo-1")  # who asks, and votes
        processes.start("silo-1")
        processes.until_answered("server", ASKED, whole, "counted")
    bundles = []
    for name, home in homes.items():
        (run,) = (home / "studies").iterdir()
        bundles.append(tmp_path / f"{name}.zip")
        bundles[-1].write_bytes(make_bundle(run))
        assert verify(bundles[-1]).holds
        for book in home.glob("ledger.answers-*.sqlite"):
            with Ledger(book, name) as ledger:
                runs = Counter(entry.key.run for entry in ledger.entries())
                assert set(runs.values()) == {1}
    (tmp_path / "all.zip").write_bytes(merge(bundles))
    verdict = verify(tmp_path / "all.zip")
    assert verdict.holds, [(check.name, check.faults) for check in verdict.failed]
    statuses = {row.name: row.status for row in verdict.results}
    assert statuses["votes"] == statuses["tallies"] == "pass"
