"""Generated parts of the documentation site."""
