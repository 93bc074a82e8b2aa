"""Answers before a training: the plan of its memory, and a range test of its rates."""
