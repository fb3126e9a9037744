"""Weight updates into a release's model through the framework's own stream, hooks and checks.

To be imported inside an environment of `build_env.py` only.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from contract.vllm_ascend.harness import build_model, engine, make_vllm_config
from contract.vllm_ascend.reference import assert_same, engine_parameters, held
from safetensors.torch import load_file
from torch import nn
from vllm.config import VllmConfig

from fixtures.deltas import OneBucketDelta
from fixtures.tiny import write_tiny_model
from verl.config import RolloutConfig
from verl.utils.vllm.npu_vllm_patch import apply_patches
from verl.utils.vllm.reload import load_session
from verl.workers.rollout.quantization.ascend import AscendScheme
from verl.workers.weight_sync.receiver import WeightReceiver
from verl.workers.weight_sync.sender import WeightSender

# What verl's plugin does in every process of an engine on an NPU, before the model is built.
apply_patches()

BUCKET = 20_000  # bytes: every update takes several, and some tensors one of their own


def checkpoints(directory: Path, kind: str, count: int = 5, **over) -> list[Path]:
    """Tiny bfloat16 checkpoints of the same shapes and different weights."""
    return [
        write_tiny_model(directory / str(seed), kind=kind, seed=seed, dtype="bfloat16", **over) for seed in range(count)
    ]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by name."""
    return load_file(directory / "model.safetensors")


def scheme_of(directory: Path, **rollout) -> AscendScheme:
    """The scheme that trainer and engine share for a checkpoint."""
    return AscendScheme(
        RolloutConfig(quantization="ascend", **{"tensor_model_parallel_size": 1} | rollout), str(directory)
    )


def config_of(directory: Path, **rollout) -> VllmConfig:
    """vLLM's configuration for that scheme, with random weights until the first update."""
    return make_vllm_config(directory, scheme_of(directory, **rollout).description.to_json_dict(), load_format="dummy")


class Updates:
    """The engine's end and the trainer's end of weight updates, in one process.

    Args:
        model: of the release, loaded once.
        scheme: of the checkpoint that trainer and engine start from.
    """

    def __init__(self, model: nn.Module, config: VllmConfig, scheme: AscendScheme):
        session = load_session(model, config, torch.device("cpu"), AscendScheme)
        self._receiver = WeightReceiver(session, scheme)
        self._sender = WeightSender(BUCKET)
        self._scheme = scheme
        self._version = 0

    def send(self, weights: Mapping[str, torch.Tensor]) -> None:
        """A whole update."""
        self.stream(self._scheme.encode(weights.items()))

    def stream(self, encoded: Iterable[tuple[str, torch.Tensor]]) -> None:
        """An update of tensors that are encoded already."""
        self._version += 1
        self._receiver.begin(self._version)
        self._sender.begin(self._version, encoded)
        last = False
        while not last:
            bucket = self._sender.next_bucket()
            self._receiver.load_bucket(bucket)
            last = bucket["last"]
        self.accepts_delta = self._receiver.finish(self._sender.manifest())["accepts_delta"]
        assert self._receiver.version == self._version

    def send_changes(self, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
        """What changed since `old`, which the engine has, written in place."""
        self._version += 1
        changes = OneBucketDelta(dict(self.encoded(old)), dict(self.encoded(new)), self._version)
        self._receiver.begin(self._version, self._version - 1)
        self._receiver.load_bucket(changes.bucket)
        self._receiver.finish(changes.manifest)
        assert self._receiver.version == self._version

    def encoded(self, weights: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """What `send` would stream."""
        return list(self._scheme.encode(weights.items()))


def assert_every_update_lands(sources: list[Path]) -> None:
    """A model with random weights takes each of `sources`: the right bytes, always where the first ones were."""
    first, *others = sources
    config = config_of(first)
    with engine(config):
        model = build_model(config)
        updates, before = Updates(model, config, scheme_of(first)), addresses(model)
        for source in [*others, first, others[0]]:
            updates.send(weights_of(source))
            assert_same(held(model), engine_parameters(weights_of(source)))
            assert addresses(model) == before


def addresses(model: nn.Module) -> dict[str, tuple]:
    """Where each parameter is and how it lies there: what a captured graph would replay."""
    return {name: (p.data_ptr(), tuple(p.shape), p.stride()) for name, p in model.named_parameters()}
