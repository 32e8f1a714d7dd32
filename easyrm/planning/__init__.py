"""What a training step takes of a TPU slice that need not exist: compiled, measured from its program, priced."""
