"""docs/rehearsal.md."""

from __future__ import annotations

import json

import pytest

from tests.support.typed import type_page

pytestmark = [pytest.mark.soak, pytest.mark.long, pytest.mark.timeout(900)]


def test_the_rehearsal(tmp_path):
    done = type_page("rehearsal.md", tmp_path, timeout=800)
    said, errors = done.stdout, done.stderr
    logs = "".join(path.read_text() for path in tmp_path.glob("silo-*.log"))
    assert done.returncode == 0, said[-3000:] + errors[-3000:] + logs[-3000:]
    assert (
        said.count("evidence verified offline") == 8
    )  # 4 of one log; by the server, simulated, compared, merged
    (run,) = tmp_path.glob("server/studies/rehearsal-*")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    for page, logs_here in ((run / "report.html", "server"), (tmp_path / "report.html", "all")):
        text = page.read_text()
        assert "<b>REAL RUN</b>" in text
        assert f"<tr><th>Logs in this bundle</th><td>{logs_here}" in text
        assert "<td>FedCoLLM</td>" in text
    assert "rounds     2 of 2 finished" in said
    assert "survivors  silo-1, silo-2, silo-3 (last round)" in said
    assert "Traceback" not in errors + logs
    for silo in (1, 2, 3):  # each has the last round's model, and measured all on its own records
        (run,) = tmp_path.glob(f"silo-{silo}/studies/*/")
        log = (tmp_path / f"silo-{silo}.log").read_text()
        for which in ("held-out", "training"):
            rounds = [
                json.loads(line) for line in (run / f"{which}.jsonl").read_text().splitlines()
            ]
            assert [line["round"] for line in rounds] == [0, 1, 2]
            whole = rounds[2]["all"]
            said_ = f"loss {-whole['gold_log_prob']:.4f}, accuracy {whole['accuracy']:.4f}"
            assert f"your {which} records: {said_} after round 2 of 2" in log
