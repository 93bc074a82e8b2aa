"""Training runs: settings, the job, and its files on disk.

Importing this package needs neither torch nor transformers; `molf.job.run` needs both.
"""
