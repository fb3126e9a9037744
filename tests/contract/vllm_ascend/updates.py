"""Weight updates into a release's model, through verl's encoding, hooks and checks.

Import it only in an environment of `build_env.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from contract.vllm_ascend.harness import build_model, engine, make_vllm_config
from contract.vllm_ascend.reference import assert_same, engine_parameters, parameters_of
from safetensors.torch import load_file
from torch import nn
from vllm.config import VllmConfig

from fixtures.deltas import OneBucketDelta, nudged
from fixtures.tiny import write_tiny_model
from verl.config import RolloutConfig
from verl.utils.quantization_scheme import QuantizationScheme
from verl.utils.vllm.npu_vllm_patch import apply_patches
from verl.utils.vllm.reload import load_session
from verl.workers.rollout.quantization import get_scheme
from verl.workers.weight_sync.receiver import WeightReceiver
from verl.workers.weight_sync.sender import WeightSender

# verl's plugin does this in every process of an engine on an NPU, before the model is built.
apply_patches()

BUCKET = 20_000  # bytes: every update needs several buckets, and some tensors fill one alone


def checkpoints(directory: Path, kind: str, count: int = 5, **over) -> list[Path]:
    """Write tiny bfloat16 checkpoints with the same shapes and different weights."""
    return [
        write_tiny_model(directory / str(seed), kind=kind, seed=seed, dtype="bfloat16", **over) for seed in range(count)
    ]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by name."""
    return load_file(directory / "model.safetensors")


def scheme_of(directory: Path, **rollout) -> QuantizationScheme:
    """Return the scheme that trainer and engine share for a checkpoint."""
    section = RolloutConfig(quantization="ascend", **{"tensor_model_parallel_size": 1} | rollout)
    return get_scheme(section, str(directory))


def config_of(directory: Path, **rollout) -> VllmConfig:
    """Create vLLM's configuration for that scheme, with random weights until the first update."""
    return make_vllm_config(
        directory, scheme_of(directory, **rollout).format.description.to_json_dict(), load_format="dummy"
    )


class Updates:
    """Sender and receiver of weight updates in one process.

    Args:
        model: model of the release, loaded once.
        scheme: scheme of the checkpoint that trainer and engine start from.
    """

    def __init__(self, model: nn.Module, config: VllmConfig, scheme: QuantizationScheme):
        session = load_session(model, config, torch.device("cpu"), scheme)
        self._receiver = WeightReceiver(session, scheme)
        self._sender = WeightSender(BUCKET)
        self._scheme = scheme
        self._version = 0

    def send(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Send a full update."""
        self.stream(self._scheme.encode(weights.items()))

    def stream(self, encoded: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send a full update of encoded tensors."""
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

    def send_delta(self, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
        """Send a delta from `old`, the weights of the engine; it is written in place."""
        self._version += 1
        changes = OneBucketDelta(dict(self.encoded(old)), dict(self.encoded(new)), self._version)
        self._receiver.begin(self._version, self._version - 1)
        self._receiver.load_bucket(changes.bucket)
        self._receiver.finish(changes.manifest)
        assert self._receiver.version == self._version

    def encoded(self, weights: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors that `send` streams."""
        return list(self._scheme.encode(weights.items()))


def assert_every_update_lands(sources: list[Path]) -> None:
    """Send each of `sources` to a model with random weights; check its bytes, and that no address changes."""
    first, *others = sources
    config = config_of(first)
    with engine(config):
        model = build_model(config)
        updates, before = Updates(model, config, scheme_of(first)), addresses(model)
        for source in [*others, first, others[0]]:
            updates.send(weights_of(source))
            assert_same(parameters_of(model), engine_parameters(weights_of(source)))
            assert addresses(model) == before


def assert_every_delta_lands(source: Path, *, fp4: Callable[[str], bool] = lambda name: False, **rollout) -> None:
    """Send deltas of growing size and then `source` again; check each time as `assert_every_update_lands`.

    Args:
        fp4: whether the engine holds a weight in MXFP4, by name.
        rollout: keys of the rollout's section.
    """
    config, scheme = config_of(source, **rollout), scheme_of(source, **rollout)
    weights = weights_of(source)
    with engine(config):
        model = build_model(config)
        updates, before = Updates(model, config, scheme), addresses(model)
        updates.send(weights)
        if not updates.accepts_delta:  # the next full update keeps the sources of derived tensors
            updates.send(weights)
        assert updates.accepts_delta
        for step in range(5):
            old, weights = weights, nudged(weights, step, 10 ** (step - 5))
            updates.send_delta(old, weights)
            assert_same(parameters_of(model), engine_parameters(weights, fp4=fp4))
            assert addresses(model) == before
        updates.send(weights_of(source))
        assert_same(parameters_of(model), engine_parameters(weights_of(source), fp4=fp4))
        assert addresses(model) == before


def addresses(model: nn.Module) -> dict[str, tuple]:
    """Return address, shape and strides of each parameter, on which captured graphs rely."""
    return {name: (p.data_ptr(), tuple(p.shape), p.stride()) for name, p in model.named_parameters()}
