"""One optimizer step: units, forms, operations, checks and routing."""
