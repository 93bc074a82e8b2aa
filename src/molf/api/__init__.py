"""The whole job from Python: `molf.train`, `molf.evaluate`, `molf.plan`, `molf.Run`."""
