"""MoLF-Efficient with TRL's SFTTrainer: LoRA experts in a PEFT adapter, loss on completions."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

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
            "completion": " " + fact["target_new"]["str"],
        }
        for fact in facts
    ]
)

# alpha per rank: both experts have the scaling 8 / sqrt(16) = 4 / sqrt(4).
config = molf.MoLFConfig(ranks=(4, 16), alpha=(4, 8), freeze_base=True)
model = molf.with_adapter(model, config)  # a PEFT model with one adapter of rank 20

trainer = SFTTrainer(
    model,
    args=SFTConfig(
        output_dir="sft",
        max_steps=10,
        per_device_train_batch_size=8,
        logging_steps=5,
        report_to="none",
        save_strategy="no",
        bf16=False,  # on a GPU leave this line out
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    optimizer_cls_and_kwargs=molf.trainer_optimizer(config, lr=3e-3),
)
trainer.train()

for layer, decision in list(trainer.optimizer.optimizer.routing.items())[:7]:
    print(f"{layer:40} last winner: {decision.winners[0]}")
model.save_pretrained("adapter")  # an ordinary PEFT adapter
