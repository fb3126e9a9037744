"""Registers nothing: the stand-in has no such operators."""


def _register_atb_extensions() -> None:
    """Do nothing; vllm-ascend calls it while it starts."""
