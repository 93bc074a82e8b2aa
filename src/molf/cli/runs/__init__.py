"""Commands that show runs: `molf report`, `molf routing`."""
