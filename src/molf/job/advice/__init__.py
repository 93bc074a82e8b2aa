"""Advice from the routing of a run: an assignment, its evidence, and the cost of training it."""
