"""``compare``: the numbers of the runs themselves, what differs, and what is refused."""

from __future__ import annotations

import json
import shutil
from xml.etree import ElementTree

import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.experiment.compare import compare_runs
from tests.support.inputs import make_inputs

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs, of three rounds without privacy and of two with it."""
    home = tmp_path_factory.mktemp("runs")
    make_inputs(home)
    common = ["simulate", str(home / "tiny.yaml"), "--data", str(home), "--workers", "0"]
    for name, changes in (("plain", ["privacy=none", "rounds=3"]), ("private", ["seed=4"])):
        sets = [word for change in changes for word in ("--set", change)]
        out = ["--no-baselines", "--out", str(home / name), "--json"]
        result = CliRunner().invoke(app, [*common, *sets, *out])
        assert result.exit_code == 0, result.output
    return home


def invoke(*words, ok=True):
    result = CliRunner().invoke(app, ["compare", *map(str, words)])
    if result.exception and ok:
        raise result.exception
    return result


def test_the_table_holds_each_run_s_own_numbers_and_the_keys_that_differ(runs):
    found = json.loads(invoke(runs / "plain", runs / "private", "--json").stdout)
    values = {d["key"]: d["values"] for d in found["differences"]}
    keys = ("epsilon", "delta", "unit", "noise", "clip_norm", "excess_noise")
    private = {f"privacy.{key}" for key in keys}
    assert values.keys() == {"rounds", "seed", *private}
    assert values["rounds"] == [3, 2]
    assert values["seed"] == [3, 4]
    assert values["privacy.epsilon"] == [None, 8]
    for run in found["runs"]:
        results = json.loads((runs / run["name"] / "results.json").read_text())
        rounds = results["rounds"]
        assert run["rounds"] == len(rounds)
        assert run["course"] == [{"accuracy": r["evaluation"]} for r in rounds]
        assert run["bytes_up"] == sum(silo["bytes_up"] for silo in results["silos"])
        assert run["bytes_down"] == sum(silo["bytes_down"] for silo in results["silos"])
        assert run["seconds"] == pytest.approx(
            sum(sum(r["seconds"].values()) for r in rounds), abs=0.051
        )
        spent = [silo["epsilon_spent"] for silo in results["silos"]]
        if run["name"] == "plain":
            assert run["privacy"] is None
        else:
            assert run["privacy"]["epsilon"] == max(spent)
    shown = invoke(runs / "plain", runs / "private").stdout
    assert "no DP" in shown
    last = found["runs"][0]["course"][-1]["accuracy"]["slm/"]
    assert f"{100 * last:.1f}" in shown


def test_the_picture_has_a_line_for_every_run_and_a_point_for_every_round(runs, tmp_path):
    invoke(runs / "plain", runs / "private", "--plot", tmp_path / "course.svg")
    picture = ElementTree.fromstring((tmp_path / "course.svg").read_text())
    panels = 2  # accuracy of both models
    assert len(picture.findall(f".//{SVG}polyline")) == 2 * panels
    assert len(picture.findall(f".//{SVG}circle")) == (3 + 2) * panels
    words = {text.text for text in picture.findall(f".//{SVG}text")}
    assert {"plain", "private", "SLM: accuracy, %"} <= words
    invoke(runs / "plain", runs / "private", "--plot", tmp_path / "course.html")
    page = (tmp_path / "course.html").read_text()
    assert "privacy.epsilon" in page
    assert "<script" not in page
    refused = invoke(runs / "plain", runs / "private", "--plot", "course.png", ok=False)
    assert isinstance(refused.exception, ConfigError)
    assert ".svg or .html" in refused.exception.hint


def test_a_server_s_run_shows_what_the_study_allows_and_perplexity_where_it_was_measured(
    runs, tmp_path
):
    shutil.copytree(runs / "private", tmp_path / "private")
    results = json.loads((tmp_path / "private" / "results.json").read_text())
    for key in ("silos", "table"):  # a server has neither
        del results[key]
    for record in results["rounds"]:
        record["perplexity"] = {"slm/": 12.25}
    name = "\x1b[31m<b>&"
    (tmp_path / "private" / "results.json").write_text(json.dumps(results))
    (tmp_path / "private").rename(tmp_path / name)
    both = (tmp_path / name, runs / "private")
    found = compare_runs(both)
    assert found.runs[0].privacy.epsilon is None
    assert not found.differences
    assert ("perplexity", "slm/", [12.25, None]) in found.scores()
    shown = invoke(*both).stdout
    assert "at most 8" in shown
    assert "12.25" in shown
    assert "\x1b[31m<" not in shown
    invoke(*both, "--plot", tmp_path / "p.html")
    assert "<b>&" not in (tmp_path / "p.html").read_text()


def test_what_is_no_finished_run_is_refused(runs, tmp_path):
    def refusal(*paths):
        with pytest.raises(ConfigError) as refused:
            compare_runs(paths)
        return f"{refused.value.message} {refused.value.hint}"

    assert "two or more" in refusal(runs / "plain")
    assert "simulate" in refusal(runs / "plain", tmp_path)
    shutil.copytree(runs / "plain", tmp_path / "cut")
    (tmp_path / "cut" / "results.json").unlink()
    assert "--resume" in refusal(runs / "plain", tmp_path / "cut")
    for broken in ("[]", "{", '{"digest": 1}', '{"rounds": [], "version": "1", "digest": ""}'):
        (tmp_path / "cut" / "results.json").write_text(broken)
        assert "results" in refusal(runs / "plain", tmp_path / "cut")
    shutil.copy(runs / "private" / "results.json", tmp_path / "cut" / "results.json")
    assert "another study" in refusal(runs / "plain", tmp_path / "cut")
