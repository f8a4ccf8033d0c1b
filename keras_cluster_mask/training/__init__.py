"""What one `fit` does: inputs, micro-batches, the loss, the optimizer, checkpoints."""
