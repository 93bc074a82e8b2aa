"""The run directory and all that a job records."""
