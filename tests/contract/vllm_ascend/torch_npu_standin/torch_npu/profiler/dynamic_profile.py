"""Nothing is profiled."""


def init(*_, **__) -> None:
    """Called when a worker starts."""


def step() -> None:
    """Called after each step."""
