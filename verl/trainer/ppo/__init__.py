"""The training loop: its stages, processes, checkpoints, metrics and validation."""
