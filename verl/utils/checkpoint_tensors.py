"""Names and shapes of the tensors in a directory of torch.distributed.checkpoint. Imports no torch, runs no code."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

from verl.utils.text import without_controls

METADATA = ".metadata"


def saved_shapes(directory: Path) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes by name; None if the metadata have another form than the known one.

    Raises:
        FileNotFoundError: there are no metadata.
    """
    try:
        with open(directory / METADATA, "rb") as file:
            entries = _Unpickler(file).load().state["state_dict_metadata"]
        return {
            without_controls(name): tuple(int(size) for size in entry.state["size"].arguments[0])
            for name, entry in entries.items()
            if type(entry).__name__ == "TensorStorageMetadata"
        }
    except FileNotFoundError:
        raise
    except Exception:  # noqa: BLE001  (damaged bytes make the unpickler raise nearly any exception; the run reports them)
        return None


class _Object:
    """Stands for any object of the pickle: keeps its arguments and its state."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> _Object:
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Unpickler that makes an `_Object` of every object, so no code of the file or of torch runs."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class with the name of the file's class."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(name, (_Object,), {})
