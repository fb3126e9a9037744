"""Rollouts of a training step: prompts, sampling, dynamic sampling, partial rollouts and their schedule."""
