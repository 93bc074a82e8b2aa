"""The model that is trained: its linear layers, adapters, parameter groups, merging."""
