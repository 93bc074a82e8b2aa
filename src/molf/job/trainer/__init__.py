"""TRL's trainer with a method's optimizer, its arguments, callbacks and checkpoints."""
