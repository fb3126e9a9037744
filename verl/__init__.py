"""verl: reinforcement-learning post-training of language models."""

from importlib.metadata import version

__version__ = version("verl")
