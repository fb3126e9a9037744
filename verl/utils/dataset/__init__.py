"""Prompts from data files: reading (files), tokenising (prompts), the dataset (rl_dataset), the loader (loader).

`files` needs neither torch nor transformers, so this package imports nothing by itself.
"""
