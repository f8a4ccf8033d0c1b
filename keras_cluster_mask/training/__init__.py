"""The parts of `fit`: input checks, micro-batches, the optimizer, checkpoints."""
