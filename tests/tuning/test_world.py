"""The embedded world: what is held apart, who knows what, and that it reads like language."""

from __future__ import annotations

import numpy as np
import torch

from securefedcollm.tuning.question import Question
from securefedcollm.tuning.questions import encode
from securefedcollm.tuning.world import (
    CONDITIONS,
    CONSORTIUM,
    PROMPT_TOKENS,
    SENTENCE_TOKENS,
    VOCABULARY,
    Sizes,
    World,
    as_text,
    make_tokenizer,
)

WORLD = World(5)
TESTS, PUBLIC = WORLD.tests(), WORLD.public()
RECORDS = [WORLD.records(silo) for silo in range(4)]
ALL_RECORDS = [question for records in RECORDS for question in records]
TEXT = [" ".join(VOCABULARY[i] for i in row) for row in WORLD.pretraining(20_000)]


def condition(question: Question) -> str:
    return question.prompt.split()[6]


def rule_of(question: Question) -> tuple[str, ...]:
    """What a consortium question asks: its kind, and the severity if that matters."""
    words = question.prompt.split()
    kind = words[8]
    return (kind, words[5]) if kind == "ward" else (kind,)


def right(question: Question) -> str:
    assert question.answer is not None
    return question.choices[question.answer]


def test_sizes_and_groups() -> None:
    sizes = Sizes()
    assert [len(r) for r in RECORDS] == [sizes.records_per_silo] * 4
    general = [q for q in TESTS if q.group == "general"]
    assert (len(general), len(TESTS) - len(general)) == (sizes.test_general, sizes.test_private)
    labelled = [q for q in PUBLIC if q.answer is not None]
    assert len(labelled) == sizes.public_labelled
    assert {q.group for q in labelled} == {"general"}
    unlabelled = [q.group for q in PUBLIC if q.answer is None]
    assert unlabelled.count("general") == sizes.public_general
    assert unlabelled.count("private") == sizes.public_private


def test_no_test_prompt_occurs_anywhere_else() -> None:
    tests = {q.prompt for q in TESTS}
    assert len(tests) == len(TESTS)
    assert not tests & {q.prompt for q in PUBLIC}
    assert not any(tests & {q.prompt for q in records} for records in RECORDS)
    assert not tests & {line.rsplit(" ", 2)[0] for line in TEXT}


def test_no_record_asks_what_a_public_prompt_asks() -> None:
    """Or the server would have the silos' models answer what they were tuned on."""
    public = {q.prompt for q in PUBLIC}
    shared = World(5).records(0, 500, np.full(16, 1 / 16))
    assert not any(public & {q.prompt for q in records} for records in (*RECORDS, shared))


def test_labelled_public_facts_are_not_tested() -> None:
    """General accuracy must not come from the public labels themselves."""

    def fact(question: Question) -> tuple[str, str]:
        return condition(question), question.prompt.split()[8]

    tested = {fact(q) for q in TESTS if q.group == "general"}
    assert not tested & {fact(q) for q in PUBLIC if q.answer is not None}


def test_some_conditions_are_in_no_record_and_no_private_prompt() -> None:
    private = [q for q in PUBLIC if q.group == "private"]
    seen = {condition(q) for q in [*private, *ALL_RECORDS]}
    assert len(CONDITIONS) - len(seen) == 64
    asked = {condition(q) for q in TESTS if q.group == "private"}
    assert len(asked - seen) > 50


def test_public_text_does_not_know_the_rules() -> None:
    """Consortium sentences in pretraining end at random; records agree with the tests."""
    rules: dict[tuple[str, ...], str] = {}
    for question in [*ALL_RECORDS, *(q for q in TESTS if q.group == "private")]:
        key = (condition(question), *rule_of(question))
        assert rules.setdefault(key, right(question)) == right(question)
    said = [line.split() for line in TEXT if f"at {CONSORTIUM} " in line]
    known = [(words, rules.get((words[6], words[8]))) for words in said if words[8] != "ward"]
    hits = [words[9] == answer for words, answer in known if answer is not None]
    assert len(hits) > 60
    assert np.mean(hits) < 0.15  # 1 in 16 or 24 by chance


def test_each_silo_holds_its_own_families() -> None:
    own = [max_family_share(records) for records in RECORDS]
    for share, families in own:
        assert share > 0.95
        assert len(families) == 4
    assert len(set().union(*(families for _, families in own))) == 16


def max_family_share(records: list[Question]) -> tuple[float, set[str]]:
    """The share of the four most frequent stems, and those stems."""
    stems = [next(s for s in STEMS if condition(q).startswith(s)) for q in records]
    names, counts = np.unique(stems, return_counts=True)
    top = np.argsort(-counts)[:4]
    return float(counts[top].sum() / len(stems)), set(names[top])


STEMS = {c.removesuffix("itis") for c in CONDITIONS if c.endswith("itis")}


def test_the_same_seed_is_the_same_world() -> None:
    again = World(5)
    assert again.tests() == TESTS
    assert again.public() == PUBLIC
    assert again.records(2) == RECORDS[2]
    other = World(6)
    assert other.records(2) != RECORDS[2]
    assert {q.prompt for q in other.tests()} == {q.prompt for q in TESTS}  # what models left out
    assert np.array_equal(other.pretraining(50), again.pretraining(50))
    assert not np.array_equal(World(5, public_seed=2).pretraining(50), again.pretraining(50))


def test_more_silos_share_the_families() -> None:
    world = World(5, silos=20, sizes=Sizes(records_per_silo=50))
    assert len(world.records(19)) == 50


def test_scarce_text_is_about_the_drugs_only() -> None:
    rows = WORLD.pretraining(8000, rare_share=0.5, rare=0.02)
    general = [
        " ".join(VOCABULARY[i] for i in row).split() for row in rows if VOCABULARY[row[0]] == "in"
    ]
    drugs = [words[6] for words in general if words[8] == "drug"]
    origins = [words[6] for words in general if words[8] == "origin"]
    assert len(set(origins)) > 290
    assert len(set(drugs)) < 230


def test_text_is_plain_words_and_one_token_each() -> None:
    tokenizer = make_tokenizer()
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    line = TEXT[0]
    assert tokenizer.decode(tokenizer(line)["input_ids"]) == line
    assert len(line.split()) == SENTENCE_TOKENS
    encoded = encode([*TESTS[:5], *PUBLIC[-5:]], tokenizer, 64)
    assert encoded.tokens.shape == (10, PROMPT_TOKENS)
    assert encoded.attention_mask(torch.float32) is None
    assert not bool((encoded.tokens == tokenizer.unk_token_id).any())


def test_as_text_a_record_is_its_sentence_and_public_text_holds_no_secret_and_no_test() -> None:
    texts = WORLD.public_texts()
    assert len(texts) == len({q.choices for q in texts}) == Sizes().public_texts
    assert WORLD.public_texts() == texts != World(6).public_texts()
    assert all(q.choices[0].startswith("in general ") for q in texts)
    tested = {as_text(q).choices[0] for q in TESTS}
    assert not tested & {q.choices[0] for q in texts}
    assert not tested & {as_text(q).choices[0] for q in ALL_RECORDS}
    record = RECORDS[2][7]
    text = as_text(record)
    assert text.choices[0] == f"{record.prompt} {right(record)} ."
    assert (text.prompt, text.answer, text.group) == ("", 0, record.group)
    assert text.subject == record.subject is not None
    encoded = encode([text], make_tokenizer(), 64, "text")
    assert encoded.generative
    words = [VOCABULARY[i] for i in encoded.targets[0].tolist()]
    assert " ".join(words) == text.choices[0].removesuffix(" .")  # "." is the end-of-text token


def test_a_part_of_the_families_has_records_and_a_group_of_its_own():
    parts = [World(seed=5, part=(number, 3)) for number in range(3)]
    whole = World(seed=5)
    seen = []
    for number, world in enumerate(parts):
        records = [question for silo in range(4) for question in world.records(silo, 200)]
        assert {question.group for question in records} == {f"private {number + 1}"}
        seen.append({condition(question) for question in records})
        shares = np.full(16, 1 / 16)
        assert {q.group for q in world.records(0, 100, shares)} == {f"private {number + 1}"}
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]
    for world in parts:  # all are asked about all parts, and know the same public questions
        groups = {question.group for question in world.tests()}
        assert groups == {"general", "private 1", "private 2", "private 3"}
        assert {q.prompt for q in world.tests()} == {q.prompt for q in whole.tests()}
        assert {q.prompt for q in world.public()} == {q.prompt for q in whole.public()}


def test_a_hospital_without_families_in_the_part_has_records_of_the_others():
    world = World(seed=5, silos=8, part=(0, 8))  # two families for eight hospitals
    assert all(len(world.records(silo, 20)) == 20 for silo in range(8))
