"""MoLF in a loop of your own: plain PyTorch, a schedule, and a checkpoint."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import molf
from molf.world import BASE_PATH, build_world, counterfact_records

STEPS = 20

# The model and 32 facts that molf ships. Put your own model and texts here.
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
model = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
facts = [record["requested_rewrite"] for record in counterfact_records(build_world())[:32]]
texts = [fact["prompt"].format(fact["subject"]) + " " + fact["target_new"]["str"] for fact in facts]

config = molf.MoLFConfig(ranks=(16,), alpha=8)
optimizer = molf.MoLFAdamW.from_model(model, config, lr=1e-3, lora_lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

model.train()
for step in range(STEPS):
    first = step * 8 % len(texts)
    batch = tokenizer(texts[first : first + 8], return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)  # no loss on padding
    loss = model(**batch, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 5 == 0 or step == STEPS - 1:
        print(f"step {step:2}  loss {loss.item():.3f}")

for layer, evidence in optimizer.evidence.items():
    print(f"{layer:40} full won {evidence.share('full'):.0%} of {evidence.decisions} steps")

model.save_pretrained("model")  # a plain transformers checkpoint
tokenizer.save_pretrained("model")
torch.save(optimizer.state_dict(), "optimizer.pt")  # to continue the training
