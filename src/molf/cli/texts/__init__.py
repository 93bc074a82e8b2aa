"""Commands that generate text: `molf generate` and `molf chat`."""
