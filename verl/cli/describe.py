"""`verl describe`: show which layers of a model run in MXFP8 or MXFP4 on Ascend."""

from __future__ import annotations

from verl.utils.quantization.ascend_description.command import add_arguments, run

__all__ = ["add_arguments", "run"]
