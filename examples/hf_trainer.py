"""MoLF with the Trainer of transformers."""

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import molf
from molf.world import BASE_PATH, build_world, counterfact_records

# The model and 32 facts that molf ships. Put your own model and texts here.
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
model = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
facts = [record["requested_rewrite"] for record in counterfact_records(build_world())[:32]]
texts = [fact["prompt"].format(fact["subject"]) + " " + fact["target_new"]["str"] for fact in facts]
dataset = Dataset.from_list([dict(tokenizer(text)) for text in texts])

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="trainer",
        max_steps=10,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",  # applies to all groups of the optimizer
        logging_steps=5,
        report_to="none",
        save_strategy="no",
    ),
    train_dataset=dataset,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    # Rates are given here: `learning_rate` and `weight_decay` of the arguments are ignored.
    optimizer_cls_and_kwargs=molf.trainer_optimizer(
        molf.MoLFConfig(ranks=(16,), alpha=8), lr=1e-3, lora_lr=2e-3
    ),
)
trainer.train()

optimizer = trainer.optimizer.optimizer  # accelerate wraps it
for layer, decision in list(optimizer.routing.items())[:7]:
    print(f"{layer:40} last winner: {decision.winners[0]}")
trainer.save_model("model")
