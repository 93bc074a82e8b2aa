"""Words of the pages of results, one module per kind (`scripts/results_page.py`)."""
