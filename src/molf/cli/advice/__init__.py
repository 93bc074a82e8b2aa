"""The commands `molf advise` and `molf probe`."""
