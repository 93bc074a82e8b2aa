"""Answers before a training: the plan of its memory."""
