"""Nothing is profiled."""


def init(*_, **__) -> None:
    """Do nothing; called when a worker starts."""


def step() -> None:
    """Do nothing; called after each step."""
