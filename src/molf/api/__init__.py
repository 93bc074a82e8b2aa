"""The whole job from Python: `molf.train`, `molf.evaluate`, and `molf.Run` for run directories."""
