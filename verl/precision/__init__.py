"""Precision by measurement: which layers to quantize so that the policy changes by no more than a budget.

`calibration` provides the prompts, `sensitivity` measures what the quantization of layers costs, `plans` knows every
choice of layers worth considering, and `budget` finds the one with the fewest bytes within the budget.
"""
