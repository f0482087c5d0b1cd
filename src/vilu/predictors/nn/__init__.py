"""Networks: the failure head, its losses, the training loop, its processes and checkpoints."""
