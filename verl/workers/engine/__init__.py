"""Training engines: run a model forward and backward, step its optimizer, and export, save and load it."""

from verl.workers.engine.base import LossFn, TrainEngine
from verl.workers.engine.errors import NonFiniteError
from verl.workers.engine.micro_batch import MicroBatching

__all__ = ["LossFn", "MicroBatching", "NonFiniteError", "TrainEngine"]
