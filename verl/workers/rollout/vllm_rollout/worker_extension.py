"""Methods that vLLM adds to each of its workers (`worker_extension_cls`): the engine's end of a weight update.

`worker_calls` calls them by name through `collective_rpc`: arguments and results are plain strings and numbers.
Errors are returned, not raised: an exception in a worker ends the whole engine, and a refused update must not.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from verl.config import RolloutConfig
from verl.timeline.spans import Timeline, join_timeline, spanned
from verl.utils.quantization_scheme import QuantizationScheme
from verl.utils.vllm.logprobs_mode import apply_logprobs_mode
from verl.workers.rollout.quantization import WorkerSettings, scheme_class, worker_settings
from verl.workers.rollout.vllm_rollout.create_receiver import create_receiver
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.messages import Bucket, BucketReport, EngineReport, ManifestMessage, WorkerReply
from verl.workers.weight_sync.receiver import WeightReceiver

_logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class WeightUpdateExtension:
    """A mixin of vLLM's worker class, which has the four attributes."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    rank: int

    _verl_receiver: WeightReceiver | None = None

    def verl_join_timeline(self, timeline: Timeline, replica: str) -> None:
        """Record this worker's forward passes and weight updates; see `join_timeline`."""
        join_timeline(timeline, f"{replica} worker {self.rank}")
        for method, name in (("execute_model", "forward"), ("sample_tokens", "sample")):
            setattr(self.model_runner, method, spanned(name, "engine")(getattr(self.model_runner, method)))

    def verl_check_engine(self, settings: WorkerSettings, self_test: bool = False) -> WorkerReply[None]:
        """Check that this worker's weights can be replaced; see `QuantizationScheme.check_engine` and `.self_test`.

        Also apply the engine's `logprobs_mode` to its sampler; see `apply_logprobs_mode`.
        """
        return _reply(self._verl_check, scheme_class(settings["quantization"]), self_test)

    def _verl_check(self, scheme: type[QuantizationScheme], self_test: bool) -> None:
        apply_logprobs_mode(self.model_runner, self.vllm_config.model_config.logprobs_mode)
        scheme.check_engine(self.model_runner.model)
        if self_test:
            scheme.self_test(self.model_runner.model, self.vllm_config)

    @spanned("update: begin")
    def verl_begin_update(
        self, version: int, settings: WorkerSettings | None = None, base: int | None = None
    ) -> WorkerReply[None]:
        """Bring the model to the checkpoint layout, or prepare it for a delta against the version `base`.

        Args:
            settings: the result of `worker_settings`; None for those of the default config.
        """
        return _reply(self._verl_begin, version, settings or worker_settings(RolloutConfig()), base)

    def _verl_begin(self, version: int, settings: WorkerSettings, base: int | None) -> None:
        if self._verl_receiver is None:
            model, device = self.model_runner.model, torch.device(self.device)
            self._verl_receiver = create_receiver(model, self.vllm_config, device, settings)
        self._verl_receiver.begin(version, base)

    @spanned("update: load a bucket")
    def verl_load_bucket(self, bucket: Bucket) -> WorkerReply[BucketReport]:
        """Load one bucket from shared memory."""
        assert self._verl_receiver is not None, "call verl_begin_update first"
        return _reply(self._verl_receiver.load_bucket, bucket)

    @spanned("update: finish")
    def verl_finish_update(self, manifest: ManifestMessage) -> WorkerReply[EngineReport]:
        """Check the update, bring the model to the kernel layout, and commit."""
        assert self._verl_receiver is not None, "call verl_begin_update first"
        return _reply(self._verl_receiver.finish, manifest)

    def verl_parameter_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every parameter's bytes on this worker, by engine name."""
        hashes = {}
        for name, parameter in self.model_runner.model.named_parameters():
            for part, tensor in _plain_parts(name, parameter.detach()):
                data = tensor.contiguous().cpu().flatten().view(torch.uint8)
                hashes[part] = hashlib.sha256(data.numpy().tobytes()).hexdigest()
        return hashes

    def verl_parameter_addresses(self) -> dict[str, int]:
        """Return the address of every parameter on this worker, by engine name. Captured graphs need them to stay."""
        return {name: parameter.data_ptr() for name, parameter in self.model_runner.model.named_parameters()}


def _plain_parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the tensor itself, or the tensors that it is made of, such as torchao's."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(f"{name}.{attribute}", getattr(tensor, attribute))


def _reply(call: Callable[P, R], *arguments: P.args, **keywords: P.kwargs) -> WorkerReply[R]:
    """Return the result of a call, or the text of its error."""
    try:
        return {"error": None, "result": call(*arguments, **keywords)}
    except WeightUpdateError as error:
        return {"error": f"{type(error).__name__}: {error}", "result": None}
    except Exception as error:  # whatever it is, raised here it would end the engine
        _logger.warning("a part of a weight update failed", exc_info=True)
        return {"error": f"{type(error).__name__}: {error}", "result": None}
