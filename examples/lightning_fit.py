"""MoLF with PyTorch Lightning: `configure_optimizers` returns the optimizer and a schedule."""

import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import molf
from molf.world import BASE_PATH, build_world, counterfact_records

# The model and 32 facts that molf ships. Put your own model and texts here.
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
facts = [record["requested_rewrite"] for record in counterfact_records(build_world())[:32]]
texts = [fact["prompt"].format(fact["subject"]) + " " + fact["target_new"]["str"] for fact in facts]


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    """Return a padded batch without loss on padding."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return {**batch, "labels": batch.input_ids.masked_fill(batch.attention_mask == 0, -100)}


class FineTuning(lightning.LightningModule):
    """A causal language model trained by MoLF."""

    def __init__(self) -> None:
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
        self.model = model.train()  # transformers loads models in evaluation mode

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        """Return the optimizer and its schedule."""
        config = molf.MoLFConfig(ranks=(16,), alpha=8)
        optimizer = molf.MoLFAdamW.from_model(self.model, config, lr=1e-3, lora_lr=2e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10),
        }


module = FineTuning()
trainer = lightning.Trainer(
    max_steps=10,
    gradient_clip_val=1.0,
    accelerator="auto",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir="lightning",  # its checkpoints have the state of the optimizer
)
trainer.fit(module, DataLoader(texts, batch_size=8, shuffle=True, collate_fn=collate))

optimizer = trainer.optimizers[0]
for layer, decision in list(optimizer.routing.items())[:7]:
    print(f"{layer:40} last winner: {decision.winners[0]}")
module.model.save_pretrained("model")
