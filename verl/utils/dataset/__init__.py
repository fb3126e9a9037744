"""Prompts from data files: `files` reads, `prompts` tokenizes, `rl_dataset` is the dataset, `loader` makes batches.

This file imports nothing, because `files` must work without torch and transformers.
"""
