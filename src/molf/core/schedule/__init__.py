"""When units step: in the backward pass, or one by one with offloaded state."""
