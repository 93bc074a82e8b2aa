"""How weights, moments and gradients are stored, and where."""
