"""MoLF with TRL's GRPOTrainer: a reward on generated answers, and a log of the routing."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import molf
from molf.world import BASE_PATH, build_world, counterfact_records

# The model and 32 facts that molf ships. Put your own model and records here.
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
model = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
facts = [record["requested_rewrite"] for record in counterfact_records(build_world())[:32]]
dataset = Dataset.from_list(
    [
        {"prompt": fact["prompt"].format(fact["subject"]), "answer": fact["target_new"]["str"]}
        for fact in facts
    ]
)


def reward(completions, answer, **columns):
    """Return the share of the answer's letters that each completion has."""
    pairs = zip(answer, completions, strict=True)
    return [len({*wanted} & {*text}) / len({*wanted}) for wanted, text in pairs]


config = molf.MoLFConfig(ranks=(4, 16), alpha=(4, 8))
log = molf.RoutingCallback("grpo")  # writes grpo/routing
trainer = GRPOTrainer(
    model,
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir="grpo",
        max_steps=5,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        logging_steps=5,
        report_to="none",
        save_strategy="no",
        bf16=False,  # on a GPU leave this line out
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    callbacks=[log],
)
trainer.optimizer_cls_and_kwargs = molf.trainer_optimizer(config, lr=3e-4)
trainer.train()

for expert, share in log.shares.items():
    print(f"{expert} won {share:.0%} of the decisions")
