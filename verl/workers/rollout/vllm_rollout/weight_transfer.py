"""verl's weight update as a backend of vLLM's weight transfer: `weight_transfer_config={"backend": "verl"}`.

Any trainer can drive it through vLLM's API, with one dictionary of plain JSON values per call:

    init_weight_transfer_engine   fields of `VerlInitInfo`
    start_weight_update           -
    update_weights                {"bucket": ...}, once per bucket; tensors are in shared memory
    update_weights                {"manifest": ...}, once: checks everything and brings the weights to the kernel layout
    finish_weight_update          serves the new weights

vLLM itself has no transaction: after an error in the middle of an update, the engine would go on with weights of two
versions. So the model computes nothing (`ServingBlock`) from the start of an update until `finish_weight_update` of a
complete one. After an error the client starts another update; only a complete one ends the block.

vLLM leads to two rules:

- The checks are in the call with the manifest. After an error in `finish_weight_update` itself, vLLM would refuse the
  next `start_weight_update`.
- Of several workers, only the last one raises. vLLM reads their replies by rank up to the first error, and takes the
  remaining replies for those to its next call. For the same reason an error of one worker waits for the manifest, with
  which the workers agree on the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from torch import nn
from vllm.distributed.parallel_state import get_world_group
from vllm.distributed.weight_transfer import base

from verl.workers.rollout.quantization import WorkerSettings, worker_scheme
from verl.workers.rollout.vllm_rollout.create_receiver import create_receiver
from verl.workers.rollout.vllm_rollout.serving_block import ServingBlock
from verl.workers.weight_sync.manifest import WeightUpdateError, check_used, dtype_from_name
from verl.workers.weight_sync.messages import Bucket, FullManifest, is_delta_bucket
from verl.workers.weight_sync.receiver import WeightReceiver

_BACKEND = 'weight_transfer_config.backend="verl"'
_SIDES = ("sender", "receiver")
# vLLM 0.28 to 0.33: what the constructor of a backend receives, and the methods that vLLM requires of it.
_ARGUMENTS = ["self", "config", "vllm_config", "device", "model"]
_METHODS = ["finish_weight_update", "init_transfer_engine", "receive_weights", "shutdown", "start_weight_update"]


def check_api(backend: type) -> None:
    """Check that vLLM's base class of backends has the known interface.

    Raises:
        NotImplementedError: it has another one.
    """
    arguments = list(inspect.signature(backend.__init__).parameters)  # type: ignore[misc]  # of the class itself
    methods = sorted(getattr(backend, "__abstractmethods__", ()))
    if (arguments, methods) != (_ARGUMENTS, _METHODS):
        raise NotImplementedError(
            f"{_BACKEND} is not supported with the weight transfer of vLLM {vllm.__version__}: a backend there takes "
            f"{', '.join(arguments[1:])} and has the methods {', '.join(methods)}; use vLLM 0.28 to 0.33"
        )


# When an engine selects the backend: with another interface, the classes below would fail without a reason.
check_api(base.WeightTransferEngine)


@dataclass
class VerlInitInfo(base.WeightTransferInitInfo):
    """The fields of `init_info`. They have the meaning of the keys of `actor_rollout_ref.rollout` of the same names.

    Attributes:
        quantization: the quantization that the engine was started with.
        quantization_scheme: the scheme that the engine's description was made with.
        quantization_side: `sender`: the client sends encoded weights; `receiver`: it sends plain ones.
        quantization_config_file: the file that the engine's description was made with.
    """

    quantization: str | None = None
    quantization_scheme: str | None = None
    quantization_side: str = "sender"
    quantization_config_file: str | None = None

    def __post_init__(self) -> None:
        if self.quantization_side not in _SIDES:
            raise ValueError(
                f"init_info.quantization_side={self.quantization_side!r}: must be one of {', '.join(_SIDES)}"
            )


@dataclass
class VerlUpdateInfo(base.WeightTransferUpdateInfo):
    """The fields of `update_info`; exactly one of them is given.

    Attributes:
        bucket: a `Bucket`, as `WeightSender.next_bucket` returns it.
        manifest: a `FullManifest`, as `WeightSender.manifest` returns it after the last bucket.
    """

    bucket: Bucket | None = None
    manifest: FullManifest | None = None

    def __post_init__(self) -> None:
        if (self.bucket is None) == (self.manifest is None):
            raise ValueError("update_info: must have one of the keys bucket and manifest")
        if self.bucket is not None:
            _check_keys("bucket", self.bucket, Bucket.__required_keys__)
        if self.manifest is not None:
            _check_keys("manifest", self.manifest, FullManifest.__required_keys__)


def _check_keys(name: str, message: Any, required: frozenset[str]) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"update_info.{name}={message!r}: must be a dictionary with the keys {sorted(required)}")
    for key in sorted(required - message.keys()):
        raise ValueError(f"update_info.{name}: missing key {key!r}")


class VerlWeightTransferEngine(base.WeightTransferEngine[VerlInitInfo, VerlUpdateInfo]):
    """The backend in one worker of an engine. vLLM creates it after it has loaded the model.

    In engines with several workers, only the last one raises the documented errors.

    Raises:
        NotImplementedError: the engine has data parallelism.
    """

    init_info_cls = VerlInitInfo
    update_info_cls = VerlUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module):
        super().__init__(config, vllm_config, device, model)
        if (replicas := vllm_config.parallel_config.data_parallel_size) > 1:
            raise NotImplementedError(f"{_BACKEND}: data_parallel_size={replicas} is not supported; use 1")
        self._is_last = get_world_group().rank_in_group == get_world_group().world_size - 1
        self._block = ServingBlock(model)
        self._receiver: WeightReceiver | None = None
        self._update: _Update | None = None

    def init_transfer_engine(self, init_info: VerlInitInfo) -> None:
        """Prepare for updates. Until the first one, an engine with random weights (`load_format=dummy`) serves nothing.

        Raises:
            WeightUpdateError: the engine was started with another quantization, the file does not fit the checkpoint,
                or weights in the layouts of the engine's layers cannot be replaced.
        """
        error = None
        try:
            self._receiver = self._create_receiver(init_info)
        except Exception as caught:  # noqa: BLE001  (the workers agree on it and raise it)
            error = f"{type(caught).__name__}: {caught}"
        errors = [found for found in gather_from_workers(error) if found is not None]
        if errors:
            self._receiver = None
            self._raise(WeightUpdateError(errors[0]))
            return
        if self.vllm_config.load_config.load_format == "dummy":
            self._block.set("its weights are random (load_format=dummy) until the first weight update")

    def _create_receiver(self, init_info: VerlInitInfo) -> WeightReceiver:
        running = self.model_config.quantization
        if running != init_info.quantization:
            raise ValueError(
                f"init_info.quantization={init_info.quantization!r}: the engine was started with "
                f"quantization={running!r}; both must be equal"
            )
        parallel = self.parallel_config
        ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
        settings: WorkerSettings = {
            "quantization": init_info.quantization,
            "quantization_scheme": init_info.quantization_scheme,
            "quantization_config_file": init_info.quantization_config_file,
            "quantization_side": init_info.quantization_side,
            "tensor_model_parallel_size": parallel.tensor_parallel_size,
            "expert_parallel_size": ranks if parallel.enable_expert_parallel else 1,
        }
        device = torch.device(self.device)
        scheme = worker_scheme(settings, self.model_config.model)
        scheme.format.validate(device.type, installed=True)
        scheme.check_engine(self.model)
        if device.type == "npu":
            scheme.self_test(self.model, self.vllm_config)
        return create_receiver(self.model, self.vllm_config, device, settings)

    def start_weight_update(self) -> None:
        """Stop serving. The first bucket brings the weights to the checkpoint layout.

        Raises:
            WeightUpdateError: `init_weight_transfer_engine` was not called, or failed.
        """
        if self._receiver is None:
            self._raise(WeightUpdateError(f"{_BACKEND}: call init_weight_transfer_engine before start_weight_update"))
            return
        self._block.set("a weight update is in progress")
        self._update = _Update(self._receiver)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load a bucket, or complete the update with its manifest.

        Raises:
            WeightUpdateError: the update is refused; the engine serves nothing until a full update succeeds.
        """
        # Not the method of the base class, which waits for an accelerator even on a CPU. Loading waits for copies.
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:  # noqa: BLE001  (refused, and raised in the last worker)
            self._refuse(error)

    def receive_weights(self, update_info: VerlUpdateInfo) -> None:
        """Do the work of `update_weights`."""
        if self._update is None:
            raise WeightUpdateError("no weight update is open: call start_weight_update")
        if update_info.bucket is not None:
            self._update.load_bucket(update_info.bucket)
        elif update_info.manifest is not None:
            self._update.complete(update_info.manifest)

    def finish_weight_update(self) -> None:
        """Serve the new weights.

        Raises:
            WeightUpdateError: the manifest did not arrive, or the update was refused before.
        """
        if self._update is None or not self._update.completed:
            self._refuse(WeightUpdateError("finish_weight_update was called before a manifest was accepted"))
            return
        self._update = None
        self._block.clear()

    def shutdown(self) -> None:
        """Release the client's memory. An open update is refused."""
        if self._update is not None:
            self._block.set("the weight transfer was shut down during an update")
        self._receiver = self._update = None

    def _refuse(self, error: Exception) -> None:
        """End an open update, and raise its error."""
        if self._update is not None:
            self._update = None
            self._block.set(f"a weight update was refused: {error}")
        refused = "; the engine serves nothing until a full update succeeds" if self._block.reason is not None else ""
        self._raise(WeightUpdateError(f"{error}{refused}"))

    def _raise(self, error: Exception) -> None:
        if self._is_last:
            raise error


class _Update:
    """One update in one worker, with what vLLM's API cannot report to the client after each bucket."""

    def __init__(self, receiver: WeightReceiver):
        self._receiver = receiver
        self._begun = False
        self._error: Exception | None = None
        self._unused: list[str] = []
        self.completed = False

    def load_bucket(self, bucket: Bucket) -> None:
        """Load a bucket; the first one begins the update to its version.

        With several workers, an error is raised by `complete`.
        """
        try:
            self._load(bucket)
        except Exception as error:
            if get_world_group().world_size == 1:
                raise
            self._error = self._error or error

    def _load(self, bucket: Bucket) -> None:
        if is_delta_bucket(bucket):
            raise WeightUpdateError(f"{_BACKEND}: received a bucket of a delta; only full updates are supported")
        if not self._begun:
            self._receiver.begin(int(bucket["version"]))
            self._begun = True
        report = self._receiver.load_bucket(bucket)
        self._unused += report["unused"]
        sent = {entry["name"]: entry["dtype"] for entry in bucket["entries"]}
        for name, held in report["dtypes"].items():
            if not is_exact(sent[name], held):
                raise WeightUpdateError(
                    f"parameter {name!r}: it was sent in {sent[name]}, and the engine holds it in {held}, which rounds "
                    f"it; send it in {held}"
                )

    def complete(self, manifest: FullManifest) -> None:
        """Check the update, bring the weights to the kernel layout, and agree with the other workers.

        Raises:
            WeightUpdateError: a worker has an error, or no worker used a tensor. All workers raise the same one.
        """
        error = self._error
        if error is None:
            try:
                self._receiver.finish(manifest)
            except Exception as caught:  # noqa: BLE001  (the workers agree on it and raise it)
                error = caught
        reports = gather_from_workers((str(error) if error is not None else None, self._unused))
        errors = [f"worker {rank}: {text}" for rank, (text, _) in enumerate(reports) if text is not None]
        if errors:
            raise WeightUpdateError(errors[0])
        # With expert parallelism, for example, each worker reads a part of the tensors.
        check_used(int(manifest["version"]), set.intersection(*(set(unused) for _, unused in reports)))
        self.completed = True


def gather_from_workers(value: Any) -> list[Any]:
    """Return the values of all workers of this engine, by rank."""
    group = get_world_group()
    values = [value] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


def is_exact(sent: str, held: str) -> bool:
    """Return whether the dtype `held` represents every value of the dtype `sent`; both are names of dtypes."""
    dtype = dtype_from_name(held)
    return torch.promote_types(dtype_from_name(sent), dtype) == dtype
