"""Training engines: a model that can be run forward and backward, stepped, exported, saved and loaded."""

from verl.workers.engine.base import LossFn, TrainEngine
from verl.workers.engine.errors import NonFiniteError
from verl.workers.engine.micro_batch import MicroBatching

__all__ = ["LossFn", "MicroBatching", "NonFiniteError", "TrainEngine"]
