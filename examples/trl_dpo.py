"""MoLF with TRL's DPOTrainer: preferred answers, and a log of the routing."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import molf
from molf.world import BASE_PATH, build_world, counterfact_records

# The model and 32 facts that molf ships. Put your own model and records here.
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
model = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
facts = [record["requested_rewrite"] for record in counterfact_records(build_world())[:32]]
dataset = Dataset.from_list(
    [
        {
            "prompt": fact["prompt"].format(fact["subject"]),
            "chosen": " " + fact["target_new"]["str"],
            "rejected": " " + fact["target_true"]["str"],
        }
        for fact in facts
    ]
)

config = molf.MoLFConfig(ranks=(4, 16), alpha=(4, 8))
log = molf.RoutingCallback("dpo")  # writes dpo/routing
trainer = DPOTrainer(
    model,
    ref_model=AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32"),
    args=DPOConfig(
        output_dir="dpo",
        max_steps=10,
        per_device_train_batch_size=4,
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
