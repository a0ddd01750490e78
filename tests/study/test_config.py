"""A study file: what is accepted, what is refused, and with which words."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from securefedcollm.errors import ConfigError
from securefedcollm.study import Field, digest, dump_study, load_study, study_from_tree
from securefedcollm.study.life import load_life

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path):
    first, *_ = load_life(path)  # of several studies the later ones need what it releases
    assert len(digest(study_from_tree(first))) == 32


def test_the_digest_is_that_of_the_meaning_not_of_the_spelling(tmp_path):
    study = load_study(QUICKSTART)
    written_out = tmp_path / "study.yaml"
    written_out.write_text(dump_study(study))
    assert digest(load_study(written_out)) == digest(study)
    assert digest(load_study(QUICKSTART, ["rounds=5"])) != digest(study)
    assert digest(load_study(QUICKSTART, ["privacy.delta=0.00001"])) == digest(study)


def test_a_study_may_name_thousands_of_silos(tmp_path):
    path = tmp_path / "study.yaml"
    keys = [sha256(bytes([i % 256, i >> 8])).hexdigest() for i in range(3001)]
    silos = [
        f"- {{name: clinic-{i:05d}.example.org, role: silo, key: {keys[i]}}}" for i in range(3000)
    ]
    roster = ["roster:", f"- {{name: hub, role: server, key: {keys[3000]}}}", *silos]
    text = (ROOT / "configs" / "thousand.yaml").read_text()
    text = text.replace("count: 1000", "count: 3000") + "\n".join(roster)
    path.write_text(text)
    assert len(load_study(path).roster) == 3001
    path.write_text(text.replace(keys[2], keys[1]))
    with pytest.raises(ConfigError, match=f"the key {keys[1][:16]} appears twice"):
        load_study(path)


@pytest.mark.parametrize(
    ("override", "where", "hint"),
    [
        ("privcy.epsilon=3", "privcy: unknown key", "did you mean 'privacy'"),
        ("privacy.epsilom=3", "privacy.epsilom: unknown key", "did you mean 'epsilon'"),
        ("privacy={epsilon: 3}", "privacy.delta: this key is missing", "add it"),
        ("privacy.epsilon=x", "privacy.epsilon: expected `float`", "study schema"),
        ("privacy.epsilon=-1", "privacy.epsilon: expected `float` > 0", ""),
        ("privacy.epsilon=.inf", "privacy.epsilon: inf is too large", ""),
        ("privacy.delta=0.5", "privacy.delta: δ = 0.5 would allow", "1e-5"),
        ("rounds=true", "rounds: expected `int`, got `bool`", ""),
        ("seed=1.5", "seed: expected `int`", ""),
        ("study=A B", "study: expected `str` matching regex", ""),
        ("silos.minimum=2", "silos.minimum: a sum over 2 silos, 1 of them", "colluders + 2 = 3"),
        ("silos.minimum=5", "silos.minimum: 5 survivors of 4", "at most 4"),
        ("silos.count=129", "silos.count: 129 silos, and 128 are the most", "graph: {}"),
        ("silos.count=10001", "silos.count: expected `int` <= 10000", ""),
        ("aggregation.threshold=2", "aggregation.threshold: a server with 1", "at least 3"),
        ("aggregation.threshold=5", "aggregation.threshold: 5 of 4", "at most 4"),
        ("aggregation.value_bits=33", "aggregation.value_bits: sums and squares", "lower it"),
        ("aggregation.value_bits=90", "aggregation.value_bits: sums and squares", "lower it"),
        ("models.llm.source=gpt2", "models.llm.source: 'gpt2' is no model source", "hub:ORG"),
        ("models.llm.source=hub:a/b", "models.llm.revision: a hub model without", "40-digit"),
        ("models.slm.revision=" + "a" * 40, "models.slm.revision: only hub models", "sha256"),
        (
            "adapter.virtual_tokens=16",
            "adapter.virtual_tokens: an adapter of the method ffa",
            "pref",
        ),
        (
            "adapter={method: prompt, rank: 4}",
            "adapter.rank: an adapter of the method prompt",
            "lora",
        ),
        (
            "adapter={method: prefix, alpha: 4}",
            "adapter.alpha: an adapter of the method",
            "ffa-lora",
        ),
        (
            "adapter={method: prefix, dropout: 0.1}",
            "adapter.dropout: an adapter of the",
            "ffa-lora",
        ),
        ("adapter={method: prompt, targets: [a]}", "adapter.targets: an adapter of", "ffa-lora"),
        ("adapter={method: prompt, top_layers: 1}", "adapter.top_layers: an adapter", "ffa-lora"),
        (
            "adapter={method: prompt, virtual_tokens: 0}",
            "adapter.virtual_tokens: expected `int` >=",
            "",
        ),
        ("task.data.train=x.jsonl", "task.data.train: the built-in world and files", "remove"),
        ("task.data={public: 2}", "task.data.train: this key is missing", "builtin"),
        ("task.data={skew: 2}", "task.data.train: this key is missing", "leave all out"),
        (
            "task.data={train: /etc/x, test: y, public: 1, per_silo: 1}",
            "task.data.train: '/etc/x' is not a plain file name",
            "--data",
        ),
        (
            "task.data={train: x, test: y, public: 1, per_silo: 1, public_labelled: 2}",
            "task.data.public_labelled: 2 labelled of 1",
            "at most",
        ),
        ("privacy.unit=subject", "privacy.subject: no column names", "name the column"),
        ("privacy.subject=patient", "privacy.subject: unit: record needs none", "unit: subject"),
        (
            "privacy={unit: subject, subject: answer, epsilon: 8, delta: 1e-5}",
            "privacy.subject: 'answer' is the content of a record",
            "the patient",
        ),
        (
            "privacy={unit: subject, subject: ward, epsilon: 8, delta: 1e-5}",
            "privacy.subject: the built-in world has no column 'ward'",
            "patient",
        ),
        (
            "privacy={unit: silo, noise: local, epsilon: 8, delta: 1e-5}",
            "privacy.noise: no study can ask for unit: silo",
            "silo with distributed",
        ),
        ("adapter.dropout=0.1", "adapter.dropout: with dropout one record", "unit: silo"),
        ("privacy.adaptive={}", "privacy.adaptive: the clip norm of unit: record", "unit: silo"),
        ("distillation.batch_labelled=9.5", "distillation.batch_labelled: expected `int`", ""),
        (
            "distillation={loss: none, batch_labelled: 0}",
            "distillation.batch_labelled: without distillation",
            "above 0",
        ),
        (
            "distillation={loss: none, order: llm-first}",
            "distillation.order: with loss: none no model learns from what the other one",
            "remove it",
        ),
        (
            "distillation={loss: transfer, weighting: paced}",
            "distillation.weighting: loss: transfer weighs all questions alike",
            "mutual-kl",
        ),
        (
            "distillation={batch_labelled: 0, batch_unlabelled: 0}",
            "distillation.batch_unlabelled: both batches are empty",
            "at least one",
        ),
        (
            "aggregation={scheme: ckks, value_bits: 32}",
            "aggregation.value_bits: the precise ring cannot hold a sum of 4 values",
            "lower it, or choose scheme: masking",
        ),
        (
            "aggregation.key_model=authority",
            "aggregation.key_model: only CKKS has a key that an authority can hold",
            "add aggregation.scheme: ckks",
        ),
        (
            "task.kind=instruction",
            "task.kind: the built-in world has multiple-choice",
            "give files",
        ),
        ("task.kind=text", "distillation.over: kind: text has no choices", "choose answer"),
        ("server={}", "server: no part of it is given", "outer or central"),
        ("server.outer={optimizer: adagrad, learning_rate: 1}", "server.outer.optimizer: ", ""),
        ("server.outer={optimizer: sgd}", "server.outer.learning_rate: this key is missing", "add"),
        ("server.outer={optimizer: sgd, learning_rate: 0}", "server.outer.learning_rate: ", ""),
        (
            "server.outer={optimizer: sgd, learning_rate: 1, momentum: 1}",
            "server.outer.momentum: expected `float` < 1",
            "",
        ),
        (
            "server.outer={optimizer: nesterov, learning_rate: 1, momentum: 0}",
            "server.outer.momentum: without momentum there is nothing",
            "optimizer: sgd",
        ),
        (
            "server.outer={optimizer: sgd, learning_rate: 1, tau: 1}",
            "server.outer.tau: optimizer: sgd has none",
            "optimizer: adam",
        ),
        (
            "server.outer={optimizer: nesterov, learning_rate: 1, beta2: 0.9}",
            "server.outer.beta2: optimizer: nesterov has none",
            "optimizer: adam",
        ),
        ("server.central={batch: 3}", "server.central.batch: unknown key", "'batch_size'"),
        (
            "server.central={steps: 2000000000}",
            "server.central.steps: 2000000000 is too",
            "at most",
        ),
        (
            "task={%s, kind: classification}",
            "task.labels: the labels are missing",
            "list them",
        ),
        ("task={%s, labels: [a, b]}", "task.labels: multiple_choice has no labels", "remove"),
        (
            "task={%s, kind: classification, labels: [a, a]}",
            "task.labels: a classification needs two or more different labels",
            "once",
        ),
        (
            "task={%s, kind: classification, labels: ['a ', b]}",
            "task.labels: 'a ' begins or ends with a space",
            "remove the space",
        ),
        (
            "task={%s, columns: {text: note}}",
            "task.columns.text: kind: multiple_choice reads no such column",
            "answer, choices, question, subject",
        ),
        (
            "task={%s, columns: {question: ' note'}}",
            "task.columns.question: ' note' is no column's name",
            "header",
        ),
        (
            "task={%s, columns: {question: answer}}",
            "task.columns.question: two fields would be read from 'answer'",
            "a column of its own",
        ),
        (
            "task={%s, columns: {question: prompt}}",
            "task.columns.question: a column prompt is used unchanged",
            "rename",
        ),
        ("task={%s, columns: [a]}", "task.columns: expected `object`, got `array`", ""),
        ("task={%s, template: 'Q'}", "task.template: it must contain {}", "Note: {}"),
        ("task={%s, template: '{}{}'}", "task.template: it must contain {}", "Note: {}"),
        ("task={%s, template: '{} '}", "task.template: ends in white space", "|-"),
        ("task={%s, kind: text, template: '{}'}", "task.template: kind: text has no prompt", ""),
        ("task.template='{}'", "task.template: the built-in world has", "remove it"),
        ("task.columns={question: q}", "task.columns: the built-in world has", "remove it"),
        (
            "privacy={epsilon: 1, delta: 1e-5, unit: subject, subject: q}",
            "privacy.subject: the built-in world has no column 'q'",
            "patient",
        ),
        ("task={%s, kind: text}", "distillation.over: kind: text has no choices", "choose answer"),
        ("task={%s, kind: text, score: pmi}", "task.score: pmi is about choices", "plain"),
        (
            "task={%s, kind: text, score_temperature: 3}",
            "task.score_temperature: 3.0 is about choices",
            "choose 1.0",
        ),
        (
            "distillation={top_k: 8}",
            "distillation.top_k: over: choices always keeps all choices of a question",
            "over: all",
        ),
        (
            "distillation={top_k: 8, over: all, loss: mutual-kl}",
            "distillation.top_k: loss: mutual-kl keeps no predictions",
            "dual-min-ce",
        ),
        ("nonsense", "--set: 'nonsense' is not key=value", "--set local.steps=20"),
        ("study.x=1", "--set study.x: 'study' holds a plain value", ""),
        ("rounds=[", "--set rounds: ", "YAML"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_the_fix(override, where, hint):
    files = "data: {train: x, test: y, public: 2, per_silo: 1}"
    with pytest.raises(ConfigError) as caught:
        load_study(QUICKSTART, [override.replace("%s", files)])
    assert str(caught.value).startswith(where)
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)


def test_the_unit_is_no_column_of_what_a_record_says():
    files = "task.data={train: x, test: y, public: 2, per_silo: 1}"
    unit = "privacy={epsilon: 1, delta: 1e-5, unit: subject, subject: case}"
    assert load_study(QUICKSTART, [files, unit]).subject == "case"
    with pytest.raises(ConfigError, match="'case' is the content of a record, not its subject"):
        load_study(QUICKSTART, [files, unit, "task.columns={question: case}"])


def test_letters_need_choices_to_name():
    asked = "models.slm.ask=letters"
    assert load_study(QUICKSTART, [asked]).models.slm.ask == "letters"
    with pytest.raises(ConfigError, match=r"^models\.slm\.ask: a letter is no text"):
        load_study(QUICKSTART, [asked, "distillation.over=all"])
    files = "task={data: {train: x, test: y, public: 2, per_silo: 1}, kind: text}"
    for key, value in (("ask", "letters"), ("temperature", "2")):
        given = [files, "distillation.over=all", f"models.llm.{key}={value}"]
        with pytest.raises(ConfigError, match=rf"^models\.llm\.{key}: is about choices"):
            load_study(QUICKSTART, given)


def test_without_a_large_model_there_is_nothing_to_distil():
    with pytest.raises(ConfigError, match="distillation: there is no large model to distil with"):
        load_study(QUICKSTART, ["models.llm=none", "distillation.steps=2"])
    alone = load_study(QUICKSTART, ["models.llm=none", "distillation={}"])
    assert alone.models.llm is None
    assert digest(study_from_tree(alone.tree)) == digest(alone)


CENTRAL = "server.central={}"
OUTER = "server.outer={optimizer: sgd, learning_rate: 1}"
ALONE = ("models.llm=none", "distillation={}")
OWN = ("task={kind: own}", "models={slm: {source: 'own:x'}}", "adapter={}", "distillation={}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            (OUTER, "privacy.noise=distributed", "local.sampling_rate=0.02"),
            "server.outer: in joint DP-SGD what is opened is a gradient",
        ),
        (
            (CENTRAL, "task.data={train: x, test: y, public: 2, per_silo: 1}"),
            "server.central: no public row has its answer",
        ),
        (
            (CENTRAL, *ALONE, "task.data={train: x, test: y, per_silo: 1}"),
            "task.data.public: this key is missing",
        ),
        (
            (
                CENTRAL,
                "task.data={train: x, test: y, public: 4, public_labelled: 2, per_silo: 1}",
                "keep={rows: 2}",
            ),
            "keep.rows: all public rows with answers are kept apart, and none is left to tune on",
        ),
        ((CENTRAL, *OWN, "privacy=none"), "server.central: the silos train with their own code"),
    ],
)
def test_what_the_servers_parts_need(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_study(QUICKSTART, list(changes))


def test_the_servers_parts_are_in_the_digest_and_a_study_without_them_is_as_it_was():
    plain = load_study(QUICKSTART)
    assert "server" not in plain.tree
    assert not plain.remembers
    assert digest(load_study(QUICKSTART, ["server=null"])) == digest(plain)
    both = load_study(QUICKSTART, [CENTRAL, OUTER])
    assert digest(both) != digest(plain)
    assert digest(study_from_tree(both.tree)) == digest(both)
    assert both.remembers
    alone = load_study(QUICKSTART, ALONE)
    assert not alone.needs_public
    assert load_study(QUICKSTART, [*ALONE, CENTRAL]).needs_public
    assert not load_study(QUICKSTART, [*OWN, "privacy=none", OUTER]).needs_public


def test_what_a_task_without_choices_cannot_have():
    files = "task={data: {train: x, test: y, public: 2, per_silo: 1}, kind: instruction}"
    with pytest.raises(ConfigError, match=r"local.loss: choices is about choices"):
        load_study(QUICKSTART, [files, "local.loss=choices", "distillation.over=all"])
    with pytest.raises(ConfigError, match=r"distillation.over: a public instruction without"):
        load_study(QUICKSTART, [files, "distillation.over=answer"])
    for fix in ("distillation.over=all", "task.data.public_labelled=2"):
        study = load_study(QUICKSTART, [files, "distillation.over=answer", fix])
        assert study.generative


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "line 1"),
        ("- a\n- b\n", "a study must be a mapping"),
        ("study: a\nstudy: b\n", "'study' is given twice \\(line 2\\)"),
        ("x" * (5 << 20), "over 4 MiB"),
        ("\udc80", "cannot be read"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=message) as caught:
        load_study(path)
    assert "broken.yaml" in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: there is no such file"):
        load_study(tmp_path / "none.yaml")


def test_python_objects_in_yaml_are_not_made(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("study: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_study(path)


def test_the_default_threshold_is_the_smallest_that_cannot_be_split():
    for n in range(3, 129):
        for c in range(3):
            if c + 2 > n or (n + c) // 2 + 1 > n:
                continue
            study = load_study(
                QUICKSTART, [f"silos={{count: {n}, colluders: {c}, minimum: {max(c + 2, 2)}}}"]
            )
            assert 2 * study.threshold > n + c >= 2 * (study.threshold - 1)


@given(value_bits=st.integers(8, 32), silos=st.integers(3, 128))
def test_a_field_holds_the_sum_of_all_silos_at_the_precision_asked_for(value_bits, silos):
    field = Field.fit(value_bits, silos)
    assert field.per_word * field.bits <= 64
    assert 2 * field.bound * silos < 2**field.bits  # no carry into the next field
    assert field.bound >= 2 ** (value_bits - 1) - 1
    assert field.bound < 2**31
    # The densest packing: one more field in the word would be too narrow.
    narrower = 64 // (field.per_word + 1)
    assert 2 * (2 ** (value_bits - 1) - 1) * silos >= 2**narrower


def test_later_keys_leave_older_studies_their_digest():
    """A key that version 1 did not always have is not written out at its default."""
    study = load_study(QUICKSTART)
    assert "max_abs" not in study.tree["adapter"]
    assert "reply_slot" not in study.tree["local"]
    assert digest(load_study(QUICKSTART, ["adapter.max_abs=100"])) == digest(study)
    assert digest(load_study(QUICKSTART, ["keep=null"])) == digest(study)
    kept = load_study(QUICKSTART, ["keep={rows: 8}"])
    assert digest(kept) != digest(study)
    assert digest(study_from_tree(kept.tree)) == digest(kept)
    added = {"epochs", "schedule", "warmup", "weight_decay"}
    assert not added & {*study.tree["local"], *study.tree["distillation"]}
    for change in (
        "adapter.max_abs=50",
        "local.reply_slot=30",
        "local.schedule=cosine",
        "local.weight_decay=0.1",
        "distillation.warmup=0.1",
    ):
        changed = load_study(QUICKSTART, [change])
        assert digest(changed) != digest(study)
        assert digest(study_from_tree(changed.tree)) == digest(changed)
    files = load_study(QUICKSTART, ["task.data={train: x, test: y, public: 2, per_silo: 1}"])
    assert not {"columns", "template"} & files.tree["task"].keys()
    for name, value in (("columns", {"question": "q"}), ("template", "{} A:")):
        changed = study_from_tree({**files.tree, "task": files.tree["task"] | {name: value}})
        assert digest(changed) != digest(files)
        assert digest(study_from_tree(changed.tree)) == digest(changed)


def test_a_thousand_silos_take_a_graph() -> None:
    study = load_study(ROOT / "configs" / "thousand.yaml")
    assert (study.silos.count, study.threshold, study.minimum) == (1000, 526, 900)
    assert study.graph is not None
    with pytest.raises(ConfigError, match=r"retrieval: 200 silos, and 128 .* answer questions"):
        load_study(
            ROOT / "configs" / "retrieval.yaml", ["silos.count=200", "aggregation={graph: {}}"]
        )
