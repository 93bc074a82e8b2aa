"""Recipes: files of options, shipped or one's own, for `--config`."""
