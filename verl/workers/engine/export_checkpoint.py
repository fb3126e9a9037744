"""Convert one model of a checkpoint to a Hugging Face directory, in one process without the run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from verl.config import FSDPConfig, ModelConfig
from verl.config.critic import CriticModelConfig
from verl.workers.engine import lora
from verl.workers.engine.fsdp import FSDPEngine, FSDPTrainEngine, FSDPValueEngine


class _AdapterEngine(FSDPEngine):
    """The policy with the adapters that it was trained with, but without an optimizer."""

    _keeps_adapters = True


def export_checkpoint(
    state: Path, target: Path, model: ModelConfig | CriticModelConfig, fsdp: FSDPConfig, *, dtype: str
) -> None:
    """Write the weights in `state`, `actor` or `critic` of a checkpoint, as the Hugging Face directory `target`.

    Adapters are merged into the weights; they are also copied, in peft's format, to `target/lora_adapter`. The process
    must not have a process group. It needs memory for one copy of the model in `fsdp.model_dtype`.

    Args:
        model: the `model` section of the run.
        fsdp: the `fsdp_config` section of the run, whose `model_dtype` is the dtype of the weights in the checkpoint.
        dtype: value of `checkpoint.hf_dtype`.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the checkpoint belongs to another model.
    """
    kind: type[FSDPTrainEngine] = _AdapterEngine if isinstance(model, ModelConfig) else FSDPValueEngine
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        engine = kind(
            model,
            replace(fsdp, tensor_parallel_size=1),  # this process has whole layers
            mesh=init_device_mesh("cpu", (1,)),
            device=torch.device("cpu"),
            compute_dtype="float32",
            max_model_len=1,  # nothing is computed
        )
        engine.load(state, ["model"])
        engine.export_hf(target, dtype)
    finally:
        dist.destroy_process_group()
    if (state / lora.DIRECTORY).is_dir():
        shutil.copytree(state / lora.DIRECTORY, target / lora.DIRECTORY, copy_function=shutil.copyfile)
