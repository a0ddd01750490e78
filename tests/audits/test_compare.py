"""Two bundles of one run, side by side. Adversary: a server with a history for each reader."""

from __future__ import annotations

import pytest
from securefedcollm_audits.verification.compare import compare
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import ConfigError
from securefedcollm.evidence.bundle import make_bundle
from tests.support.forge import by_name, doctor


@pytest.fixture
def parts(record_bundle, tmp_path):
    """What silo-1 and silo-2 each show an auditor: their own log and the server's."""
    paths = []
    for name in ("silo-1", "silo-2"):
        paths.append(tmp_path / f"{name}.zip")
        paths[-1].write_bytes(make_bundle(record_bundle.parent, ["server", name]))
    return paths


def test_bundles_of_an_honest_run_agree(parts, record_bundle):
    verdict = compare(*parts)
    assert verdict.holds
    assert verdict.participants == ["server", "silo-1", "silo-2"]
    assert compare(parts[0], record_bundle).holds


def test_a_server_with_two_histories_is_exposed_by_its_own_signatures(parts, tmp_path):
    """Each bundle holds by itself: the server's whole story was rewritten for silo-2."""

    def other_sum(f):
        f.what("server", "summed", 0)["sum"] = "0" * 64

    lie = doctor(parts[1], tmp_path / "lie.zip", other_sum)
    assert verify(lie).holds
    verdict = compare(parts[0], lie)
    failed = {result.name for result in verdict.failed}
    assert failed == {"common-logs", "one-history"}
    (fault,) = by_name(verdict)["common-logs"].faults
    assert fault == (
        "server#3 (summed): in A; server#3 (summed) in B is another: server signed both"
    )


def test_two_silos_without_the_server_s_log_expose_it_too(record_bundle, tmp_path):
    paths = []
    for name in ("silo-1", "silo-2"):
        paths.append(tmp_path / f"{name}.zip")
        paths[-1].write_bytes(make_bundle(record_bundle.parent, [name]))
    assert compare(*paths).holds

    def shown_another(f):
        f.what("silo-2", "witnessed")["root"] = "0" * 64

    verdict = compare(paths[0], doctor(paths[1], tmp_path / "x.zip", shown_another))
    (result,) = verdict.failed
    assert result.faults == [
        "witnessed: the server showed silo-1 and silo-2 different logs of 5 entries"
    ]


def test_other_runs_and_broken_files(parts, silo_bundle, tmp_path):
    with pytest.raises(ConfigError, match="are not of one study and run"):
        compare(parts[0], silo_bundle)
    with pytest.raises(ConfigError, match="there is no such file"):
        compare(parts[0], tmp_path / "nowhere.zip")
    (tmp_path / "broken.zip").write_bytes(b"PK")
    verdict = compare(parts[0], tmp_path / "broken.zip")
    assert [result.name for result in verdict.failed] == ["bundle-B"]
