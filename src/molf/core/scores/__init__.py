"""Scores of experts and rules that choose the winners. Imports the standard library only."""
