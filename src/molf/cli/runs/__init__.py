"""Commands that show runs: `molf report`, `molf compare`, `molf routing`."""
