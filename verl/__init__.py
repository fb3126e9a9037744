"""verl: reinforcement-learning post-training of language models."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from verl.extension.upstream_names import install_finder

if TYPE_CHECKING:
    from verl.protocol import DataProto

__all__ = ["DataProto", "__version__"]
__version__ = version("verl")
install_finder()


def __getattr__(name: str) -> Any:
    # Imported on access, because `import verl` must not import torch: the command line starts without it.
    if name == "DataProto":
        return importlib.import_module("verl.protocol").DataProto
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
