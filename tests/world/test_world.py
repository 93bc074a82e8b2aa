import hashlib
import itertools
import json
import re
import struct
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from molf.world import (
    BASE_PATH,
    Fact,
    build_world,
    counterfact_records,
    held_out_text,
    training_documents,
)
from molf.world.draws import balanced, integer, sample, shuffled

# A change of the world makes the shipped base model wrong: build it anew (scripts/build_base.py)
# before writing new values here.
WORLD_SHA256 = "c24714c3641072df5ed0fea9163c7817a7203abd400b1b22e9a5882bab0e8253"
TEXTS_SHA256 = "36be717c7fa4297cf43bc019e7034e3a9801e379eb9103a8deb1c06d739b12fe"

WORLD = build_world()
RECORDS = counterfact_records(WORLD)
ORIGINAL = Path(__file__).parents[3] / "shared" / "data" / "counterfact_original_20.jsonl"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def true_facts() -> dict[str, Fact]:
    """Every prompt that the world answers, with its fact."""
    return {prompt: fact for fact in WORLD.facts for prompt in fact.prompts}


FACT_OF_PROMPT = true_facts()


class TestDraws:
    def test_integer_covers_its_range(self):
        rng = Random(0)
        assert {integer(rng, 3, 6) for _ in range(200)} == {3, 4, 5, 6}

    def test_shuffled_is_a_permutation_and_leaves_its_input(self):
        items = list(range(20))
        result = shuffled(Random(0), items)
        assert sorted(result) == items == list(range(20))
        assert result != items

    def test_sample_has_no_repeats(self):
        assert len(set(sample(Random(0), range(10), 10))) == 10

    def test_sample_of_too_many_is_an_error(self):
        with pytest.raises(ValueError, match="count=3"):
            sample(Random(0), "ab", 3)

    def test_balanced_differs_by_one_at_most(self):
        counts = Counter(balanced(Random(0), "abc", 8)).values()
        assert sorted(counts) == [2, 3, 3]


class TestWorld:
    def test_is_pinned(self):
        assert WORLD.fingerprint() == WORLD_SHA256

    def test_seeds_differ(self):
        assert build_world(1).fingerprint() != WORLD.fingerprint()

    def test_names_and_ids_are_unique(self):
        assert len({entity.id for entity in WORLD.entities}) == len(WORLD.entities)
        names = [(entity.kind, entity.name) for entity in WORLD.entities]
        assert len(set(names)) == len(names)

    def test_a_relation_gives_each_subject_one_object_of_the_right_kind(self):
        seen = set()
        for fact in WORLD.facts:
            assert fact.subject.kind == fact.relation.subject_kind
            assert fact.object.kind == fact.relation.object_kind
            assert (fact.relation.id, fact.subject) not in seen
            seen.add((fact.relation.id, fact.subject))

    def test_prompts_have_one_answer(self):
        assert len(FACT_OF_PROMPT) == sum(len(fact.prompts) for fact in WORLD.facts)

    def test_no_prompt_is_the_beginning_of_another(self):
        # "was born in" would leave open whether a city follows, or "the year" and a number.
        for kind in {fact.subject.kind for fact in WORLD.facts}:
            relations = {fact.relation for fact in WORLD.facts if fact.subject.kind == kind}
            attributes = {attribute for attribute in WORLD.attributes if attribute.kind == kind}
            phrasings = [text for item in (*relations, *attributes) for text in item.phrasings]
            assert len(set(phrasings)) == len(phrasings)
            for one, other in itertools.permutations(phrasings, 2):
                assert not other.startswith(f"{one} ")

    def test_relations_are_rich(self):
        relations = {fact.relation.id: fact.relation for fact in WORLD.facts}.values()
        assert len(relations) >= 10
        for relation in relations:
            assert len(set(relation.phrasings)) >= 6
            for text in relation.phrasings + relation.openings:
                assert text.count("{}") == 1
                assert text == text.strip()

    def test_objects_cannot_be_guessed(self):
        for relation in {fact.relation for fact in WORLD.facts}:
            counts = Counter(fact.object for fact in WORLD.facts if fact.relation == relation)
            assert len(counts) >= 18
            assert counts.most_common(1)[0][1] / counts.total() < 0.1

    def test_a_capital_lies_in_its_country(self):
        country = {fact.subject: fact.object for fact in WORLD.facts if fact.relation.id == "P17"}
        capitals = [fact for fact in WORLD.facts if fact.relation.id == "P36"]
        assert len(capitals) == len(WORLD.of_kind("country"))
        assert all(country[fact.object] == fact.subject for fact in capitals)

    def test_attributes_are_in_range(self):
        for attribute in WORLD.attributes:
            for entity in WORLD.of_kind(attribute.kind):
                value = entity.attributes[attribute.name]
                assert attribute.low <= value <= attribute.high
                assert (value - attribute.low) % attribute.step == 0


class TestCounterfactRecords:
    @pytest.mark.skipif(not ORIGINAL.exists(), reason="needs CounterFact")
    def test_has_the_layout_of_the_original(self):
        original = json.loads(ORIGINAL.read_text(encoding="utf-8").splitlines()[0])
        for record in RECORDS:
            assert layout(record) == layout(original)
            assert list(record) == list(original)
            assert list(record["requested_rewrite"]) == list(original["requested_rewrite"])

    def test_has_the_documented_layout(self):
        for case_id, record in enumerate(RECORDS):
            assert record["case_id"] == case_id
            assert len(record["paraphrase_prompts"]) == 2
            for field in ("neighborhood_prompts", "attribute_prompts", "generation_prompts"):
                assert len(record[field]) == 10
            for text in strings(record):
                assert text == text.strip()

    def test_survives_json(self):
        assert json.loads(json.dumps(RECORDS)) == RECORDS

    def test_is_deterministic_and_seeded(self):
        assert counterfact_records(WORLD) == RECORDS
        assert counterfact_records(WORLD, seed=1) != RECORDS

    def test_requests_change_different_true_facts(self):
        assert len(RECORDS) == 200
        assert len({prompt_fact(record) for record in RECORDS}) == 200
        for record in RECORDS:
            rewrite = record["requested_rewrite"]
            fact = prompt_fact(record)
            assert WORLD.facts[record["pararel_idx"]] == fact
            assert fact.relation.id == rewrite["relation_id"]
            assert rewrite["target_true"] == {"str": fact.object.name, "id": fact.object.id}
            new = {entity.id: entity for entity in WORLD.entities}[rewrite["target_new"]["id"]]
            assert new.name == rewrite["target_new"]["str"]
            assert new.kind == fact.object.kind

    def test_targets_differ_in_their_first_word(self):
        for record in RECORDS:
            rewrite = record["requested_rewrite"]
            new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
            assert new.split()[0] != true.split()[0]

    def test_paraphrases_say_the_same_otherwise(self):
        for record in RECORDS:
            rewrite = record["requested_rewrite"]
            fact = prompt_fact(record)
            edited = rewrite["prompt"].format(rewrite["subject"])
            found = set()
            for paraphrase in record["paraphrase_prompts"]:
                sentence, prompt = re.fullmatch(r"(.+\.) (.+)", paraphrase).groups()
                assert rewrite["subject"] not in sentence
                assert prompt in fact.prompts
                found.add(prompt)
            assert len(found - {edited}) == 2

    def test_neighbors_share_the_object_and_are_never_edited(self):
        edited = {record["requested_rewrite"]["subject"] for record in RECORDS}
        for record in RECORDS:
            fact = prompt_fact(record)
            neighbors = [FACT_OF_PROMPT[prompt] for prompt in record["neighborhood_prompts"]]
            assert len(set(record["neighborhood_prompts"])) == 10
            assert len({neighbor.subject for neighbor in neighbors}) >= 2
            for neighbor in neighbors:
                assert neighbor.relation == fact.relation
                assert neighbor.object == fact.object
                assert neighbor.subject.name not in edited

    def test_attribute_prompts_have_the_new_object(self):
        for record in RECORDS:
            rewrite = record["requested_rewrite"]
            for prompt in record["attribute_prompts"]:
                fact = FACT_OF_PROMPT[prompt]
                assert fact.relation.id == rewrite["relation_id"]
                assert fact.object.id == rewrite["target_new"]["id"]

    def test_fewer_records_are_the_first_of_more(self):
        few = counterfact_records(WORLD, count=3)
        subjects = [record["requested_rewrite"]["subject"] for record in RECORDS[:3]]
        assert [record["requested_rewrite"]["subject"] for record in few] == subjects

    @pytest.mark.parametrize("count", [-1, 100_000])
    def test_an_impossible_count_is_an_error(self, count):
        with pytest.raises(ValueError, match=re.escape(f"count={count}")):
            counterfact_records(WORLD, count=count)


class TestTexts:
    def test_are_pinned(self):
        texts = [*training_documents(WORLD), held_out_text(WORLD), json.dumps(RECORDS)]
        assert sha256("\n".join(texts)) == TEXTS_SHA256

    def test_training_states_every_fact_in_every_phrasing(self):
        documents = set(training_documents(WORLD))
        assert documents.issuperset(
            statement for fact in WORLD.facts for statement in fact.statements
        )

    def test_held_out_paragraphs_are_new(self):
        trained = {
            paragraph
            for document in training_documents(WORLD)
            for paragraph in document.split("\n\n")
        }
        assert not trained.intersection(held_out_text(WORLD).split("\n\n"))

    def test_held_out_text_is_short_and_says_something(self):
        text = held_out_text(WORLD)
        assert 100 <= len(text.split("\n\n")) <= 300
        stated = sum(
            statement in text
            for fact in WORLD.facts
            if not fact.subject.editable
            for statement in fact.statements
        )
        assert stated >= 400

    def test_held_out_text_states_no_fact_that_a_request_could_change(self):
        text = held_out_text(WORLD)
        editable = [fact for fact in WORLD.facts if fact.subject.editable]
        assert not any(prompt in text for fact in editable for prompt in fact.prompts)


class TestShippedFiles:
    def test_weights_are_few_and_16_bit(self):
        with (BASE_PATH / "model.safetensors").open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        assert {tensor["dtype"] for tensor in header.values()} == {"F16"}
        starts_and_ends = [tensor["data_offsets"] for tensor in header.values()]
        assert sum(end - start for start, end in starts_and_ends) / 2 <= 3_200_000

    def test_checkpoint_is_complete_and_small(self):
        files = {path.name: path.stat().st_size for path in BASE_PATH.iterdir()}
        assert set(files) == {
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "scores.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert sum(files.values()) <= 8_000_000

    def test_weights_load_in_float32(self):
        config = json.loads((BASE_PATH / "config.json").read_text(encoding="utf-8"))
        assert config["dtype"] == "float32"

    def test_was_trained_on_this_world(self):
        scores = json.loads((BASE_PATH / "scores.json").read_text(encoding="utf-8"))
        assert scores["world"] == WORLD.fingerprint()


def prompt_fact(record: dict) -> Fact:
    """The fact that a request changes, found by what its prompt asks."""
    rewrite = record["requested_rewrite"]
    return FACT_OF_PROMPT[rewrite["prompt"].format(rewrite["subject"])]


def strings(value: object) -> list[str]:
    """All texts within a record."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def layout(value: object) -> object:
    """The keys and types within a record."""
    if isinstance(value, dict):
        return {key: layout(item) for key, item in value.items()}
    if isinstance(value, list):
        return [layout(item) for item in value]
    return type(value)
