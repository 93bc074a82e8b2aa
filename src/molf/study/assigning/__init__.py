"""Assignments of method hybrid that a study makes for each trial. Imports no torch."""
