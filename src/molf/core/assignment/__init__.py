"""Assignments: per linear layer full training, LoRA or neither, decided before the training."""
