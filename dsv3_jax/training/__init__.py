"""Loss, optimizer, step, data, checkpoints and the loop that joins them."""
