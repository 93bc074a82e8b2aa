"""MoLF with Accelerate: accumulated gradients, clipping, and a saved state.

`accelerate launch accelerate_loop.py` runs the same file in several processes (DDP).
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import molf
from molf.world import BASE_PATH, build_world, counterfact_records

# The model and 32 facts that molf ships. Put your own model and texts here.
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
model = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
facts = [record["requested_rewrite"] for record in counterfact_records(build_world())[:32]]
texts = [fact["prompt"].format(fact["subject"]) + " " + fact["target_new"]["str"] for fact in facts]


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    """Return a padded batch without loss on padding."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return {**batch, "labels": batch.input_ids.masked_fill(batch.attention_mask == 0, -100)}


accelerator = Accelerator(gradient_accumulation_steps=2)
optimizer = molf.MoLFAdamW.from_model(
    model, molf.MoLFConfig(ranks=(16,), alpha=8), lr=1e-3, lora_lr=2e-3
)
loader = DataLoader(texts, batch_size=4, shuffle=True, collate_fn=collate)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

model.train()
for epoch in range(3):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}  loss {loss.item():.3f}")

routed = optimizer.optimizer  # accelerate wraps it
shares = [evidence.share("full") for evidence in routed.evidence.values()]
accelerator.print(f"full won {sum(shares) / len(shares):.0%} of the decisions")
accelerator.save_state("state")  # weights, moments, factors and counts of decisions
