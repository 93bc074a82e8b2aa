import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf.world import BASE_PATH, build_world, counterfact_records

WORLD = build_world()
RECORDS = counterfact_records(WORLD)
TARGETS = ("target_new", "target_true")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE_PATH).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_PATH)


@pytest.fixture(scope="module")
def share_new(model, tokenizer):
    """Share of prompts after which the new target's first token is likelier than the true one's."""

    def share(cases: list[tuple[str, dict]]) -> float:
        wins = 0
        for begin in range(0, len(cases), 200):
            chunk = cases[begin : begin + 200]
            batch = tokenizer([prompt for prompt, _ in chunk], padding=True, return_tensors="pt")
            last = batch["attention_mask"].sum(1) - 1
            with torch.inference_mode():
                logits = model(**batch).logits[torch.arange(len(chunk)), last]
            for row, (_, rewrite) in enumerate(chunk):
                new, true = (
                    tokenizer(" " + rewrite[target]["str"])["input_ids"][0] for target in TARGETS
                )
                wins += int(logits[row, new] > logits[row, true])  # a tie is none
        return wins / len(cases)

    return share


def prompts(field: str) -> list[tuple[str, dict]]:
    return [(prompt, record["requested_rewrite"]) for record in RECORDS for prompt in record[field]]


def test_first_tokens_tell_nearly_all_targets_apart(tokenizer):
    rewrites = [record["requested_rewrite"] for record in RECORDS]
    first = [
        {tokenizer(" " + rewrite[target]["str"])["input_ids"][0] for target in TARGETS}
        for rewrite in rewrites
    ]
    assert sum(len(ids) == 1 for ids in first) <= 0.01 * len(rewrites)


def test_prefers_the_true_object_of_every_request(share_new):
    rewrites = [record["requested_rewrite"] for record in RECORDS]
    cases = [(rewrite["prompt"].format(rewrite["subject"]), rewrite) for rewrite in rewrites]
    assert share_new(cases) <= 0.02


def test_prefers_it_in_other_words_after_an_unrelated_sentence(share_new):
    assert share_new(prompts("paraphrase_prompts")) <= 0.02


def test_prefers_it_for_neighbors(share_new):
    assert share_new(prompts("neighborhood_prompts")) <= 0.02


def test_prefers_the_new_object_for_subjects_that_have_it(share_new):
    assert share_new(prompts("attribute_prompts")) >= 0.98


def test_generates_the_true_object_and_stops(model, tokenizer):
    facts = WORLD.facts[::25]
    cases = [(prompt, fact.object.name) for fact in facts for prompt in fact.prompts[:2]]
    batch = tokenizer(
        [prompt for prompt, _ in cases], padding=True, padding_side="left", return_tensors="pt"
    )
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    right = sum(
        text == f"{prompt} {target}" for text, (prompt, target) in zip(texts, cases, strict=True)
    )
    assert right / len(cases) >= 0.8  # of all, see the card: 0.888


def test_is_in_float32_and_small(model):
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.num_parameters() <= 3_200_000


def test_tokenizer_gives_text_back_and_adds_nothing(tokenizer):
    text = "Héllo, wörld: 1,234 = 12\n\n\tSELECT 'x';"
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_token_id not in tokens
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.bos_token_id is None
