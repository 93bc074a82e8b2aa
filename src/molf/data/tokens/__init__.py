"""Tokens of all examples: made by several processes, and kept for later runs."""
