"""Networks: failure head, losses, training loop, processes and checkpoints."""
