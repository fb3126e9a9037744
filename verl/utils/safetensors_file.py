"""Writing of safetensors files with the permissions of any other new file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def save_safetensors(tensors: Mapping[str, torch.Tensor], path: Path, *, file_format: str = "pt") -> None:
    """Write tensors to a file whose mode follows the umask.

    safetensors writes a temporary file with mode 0600 and renames it, so other users could not read the model.

    Args:
        file_format: value of `format` in the metadata; transformers requires `pt`.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Without truncation: the tensors may be mapped from this file.
    with open(path, "ab") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o7777
    try:
        save_file(dict(tensors), path, metadata={"format": file_format})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    os.chmod(path, mode)
