"""Predict parameters and memory of a training from the model's configuration.

The entry point is `plan_training`. Importing this package needs neither torch nor transformers.
"""
