"""Training runs: settings, the job itself, and what it leaves on disk.

Importing this package needs neither torch nor transformers; `molf.train.run` does.
"""
