"""Pages of runs: `molf report`, and the page that `molf train` writes at its end. No torch."""
