"""Write a sharded model as a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from verl.utils.model_dir.index import SAFETENSORS_INDEX
from verl.workers.engine.export import export_weights

_MAX_FILE_BYTES = 5 * 10**9


def write_hf_directory(
    model: PreTrainedModel,
    path: Path,
    *,
    model_path: str,
    tokenizer_path: str,
    trust_remote_code: bool,
    writes: bool,
) -> None:
    """Write config, generation config, tokenizer, safetensors and the Python code of model and tokenizer. Collective.

    Args:
        model_path, tokenizer_path: where model and tokenizer were read.
        trust_remote_code: they run code of their own, which is copied.
        writes: True on the one rank that writes the files.
    """
    weights = _WeightFiles(path) if writes else None
    for name, tensor in export_weights(model):
        if weights is not None:
            weights.add(name, tensor.cpu())
    if weights is None:
        return
    weights.close()
    model.config.save_pretrained(path)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code).save_pretrained(path)
    for source in (Path(tokenizer_path), Path(model_path)):
        if trust_remote_code and source.is_dir():
            for code in source.glob("*.py"):
                (path / code.name).write_bytes(code.read_bytes())


class _WeightFiles:
    """Writer of safetensors files of at most 5 GB, and of their index if there are several.

    At most one file is held in memory.
    """

    def __init__(self, path: Path):
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._bytes + size > _MAX_FILE_BYTES:
            self._flush()
        self._tensors[name] = tensor
        self._bytes += size
        self._total += size

    def _part(self, number: int) -> Path:
        return self._path / f"part-{number}.safetensors"

    def _flush(self) -> None:
        save_file(self._tensors, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._tensors))
        self._tensors, self._bytes = {}, 0

    def close(self) -> None:
        """Write the remaining tensors, and rename the files, whose final names contain the number of files."""
        self._flush()
        count = len(self._files)
        if count == 1:
            self._part(0).rename(self._path / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._path / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._path / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
