"""Registers nothing: there are no such operators here."""


def _register_atb_extensions() -> None:
    """Called by vllm-ascend while it starts."""
