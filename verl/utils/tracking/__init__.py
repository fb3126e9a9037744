"""Metrics of a run: console, JSON lines, tensorboard, wandb, swanlab; and the progress display."""

from verl.utils.tracking.jsonl import read_steps
from verl.utils.tracking.plain import mask_secrets
from verl.utils.tracking.progress import Progress
from verl.utils.tracking.tracker import Tracking

__all__ = ["Progress", "Tracking", "mask_secrets", "read_steps"]
