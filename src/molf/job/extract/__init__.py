"""Extraction: the change of a trained model as one LoRA adapter."""
