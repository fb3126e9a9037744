"""Training engines based on FSDP2 (`fully_shard`), for any Hugging Face causal language model on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from verl.config import FSDPConfig, LoraOptions, ModelConfig, OptimConfig, lora_options
from verl.config.critic import CriticModelConfig
from verl.protocol import DataProto
from verl.timeline.spans import span, spanned
from verl.utils.quantization.encode_report import Errors
from verl.utils.quantization_scheme import QuantizationScheme
from verl.workers.engine import checkpoint, optim
from verl.workers.engine.activations import ActivationOffload
from verl.workers.engine.base import (
    LogProbs,
    LossFn,
    OptimizerStep,
    PolicyEngine,
    TrainEngine,
    ValueEngine,
    ValueLossFn,
)
from verl.workers.engine.errors import NonFiniteError
from verl.workers.engine.export import ExportUnit, WeightExport
from verl.workers.engine.hf_directory import write_hf_directory
from verl.workers.engine.host_memory import host_memory
from verl.workers.engine.loading import Sharding, load_sharded_model, parse_dtype
from verl.workers.engine.mesh import make_mesh
from verl.workers.engine.metric_sums import MeanShare, MetricSums
from verl.workers.engine.micro_batch import AlignedBatch, Layout, MicroBatch, MicroBatching, call_model
from verl.workers.engine.offload import OffloadedState
from verl.workers.engine.output_errors import OutputErrors
from verl.workers.engine.output_head import OutputHead, try_chunked_head
from verl.workers.engine.packed_attention import packs_sequences
from verl.workers.engine.qat import QatOptions, QuantizedForward

# Counts that are summed together with the metrics, to compute `padding_fraction`.
_TOKENS, _POSITIONS = "tokens", "positions"


class FSDPTrainEngine(TrainEngine):
    """A model whose parameters, gradients and optimizer state are sharded over ranks, see `verl.workers.engine.mesh`.

    Args:
        model_config: a `model` section.
        fsdp_config: an `fsdp_config` section; its `model_dtype` is the dtype of the master weights.
        mesh: one-dimensional mesh of all ranks.
        device: this rank's device.
        compute_dtype: dtype of matrix products and activations, e.g. "float32" or "bfloat16".
        max_model_len: limit of a sequence in tokens, the same as in the rollout engine.
        optim_config: the `optim` section; None for an engine without an optimizer, which only runs forward.
        total_training_steps: length of the learning-rate schedule.
        sequence_parallel: number of neighboring ranks that share the sequences of a micro-batch. They must be given the
            same data, and return the same. The same holds for `fsdp_config.tensor_parallel_size`.
        qat: the engine's quantization, for a policy that computes with its numbers.
    """

    _value_head = False
    _keeps_adapters = False  # of an engine without an optimizer

    def __init__(
        self,
        model_config: ModelConfig | CriticModelConfig,
        fsdp_config: FSDPConfig,
        *,
        mesh: DeviceMesh,
        device: torch.device,
        compute_dtype: str,
        max_model_len: int,
        optim_config: OptimConfig | None = None,
        total_training_steps: int = 0,
        sequence_parallel: int = 1,
        qat: QatOptions | None = None,
    ):
        self._model_config = model_config
        self._device = device
        self._mesh = make_mesh(mesh, fsdp_config.fsdp_size, sequence_parallel, fsdp_config.tensor_parallel_size)
        self._group, self._sequence = self._mesh.group, self._mesh.sequence
        self._path = _required_path(model_config)
        trains = optim_config is not None
        memory = host_memory(device)
        on_host = fsdp_config.offload_policy and memory is not None
        self.model = load_sharded_model(
            self._path,
            mesh=self._mesh,
            device=device,
            dtype=parse_dtype(fsdp_config.model_dtype, "fsdp_config.model_dtype"),
            compute_dtype=parse_dtype(compute_dtype, "compute dtype"),
            max_model_len=max_model_len,
            packs=model_config.use_remove_padding,
            trust_remote_code=bool(model_config.trust_remote_code),
            override_config=model_config.override_config,
            gradient_checkpointing=trains and model_config.enable_gradient_checkpointing,
            activations=ActivationOffload(memory) if model_config.enable_activation_offload and memory else None,
            sharding=Sharding.of(fsdp_config, on_host=on_host),
            value_head=self._value_head,
            lora=self._lora_options(model_config) if trains or self._keeps_adapters else None,
        )
        if not trains and not self._keeps_adapters:
            self.model.requires_grad_(False)
        self._layout = Layout.FULL_ROWS
        if model_config.use_remove_padding:
            self._layout = Layout.PACKED if packs_sequences(self.model) else Layout.ROWS
        self._optimizer = None if optim_config is None else optim.make_optimizer(self.model, optim_config)
        self._lr_at = None if optim_config is None else optim.make_schedule(optim_config, total_training_steps)
        self._clip = None if optim_config is None else optim_config.clip_grad
        self._schedule_step = 0
        self._mini_batch: DataProto | None = None
        tensor = self._mesh.tensor
        self._export = WeightExport(self.model, device, tensor)
        self._quantized = None if qat is None else QuantizedForward(self.model, self._export, qat)
        if tensor is not None:
            if qat is not None:
                tensor.check_blocks(self.model)
            tensor.install(self.model)
        self._on_model_loaded()
        self._offloaded = OffloadedState(
            self.model,
            self._optimizer,
            None if on_host else memory,
            weights=fsdp_config.param_offload,
            moments=fsdp_config.optimizer_offload,
        )
        self._updating = False
        self._offloaded.release()

    def _lora_options(self, model_config: ModelConfig | CriticModelConfig) -> LoraOptions | None:
        """Return the adapters to train. The critic has none, and neither has the reference policy."""
        return None

    def _on_model_loaded(self) -> None:
        """Prepare the model for the forward pass of a subclass."""

    @spanned("optimizer", "train")
    def optimizer_step(self) -> OptimizerStep:
        assert self._optimizer is not None and self._lr_at is not None, "this engine has no optimizer"
        self._offloaded.load_moments()
        counted = grads = optim.local_grads(self.model.parameters())
        if self._mesh.tensor is not None:
            self._mesh.tensor.complete_gradients(self.model)
            counted = optim.local_grads(self._mesh.tensor.counted(self.model))
        norm = optim.global_grad_norm(counted, self._mesh.shard_group, self._device)
        if not torch.isfinite(torch.tensor(norm)):
            assert self._mini_batch is not None
            self._fail("gradient norm", _uids(self._mini_batch, slice(None)))
        if self._clip is not None:
            optim.clip_grads(grads, norm, self._clip)
        lr = self._lr_at(self._schedule_step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._note_new_weights()
        self._optimizer.zero_grad(set_to_none=True)
        self._mini_batch = None
        return {"grad_norm": norm, "lr": lr}

    def schedule_step(self) -> None:
        self._schedule_step += 1
        self._updating = False
        self.release()

    def release(self) -> None:
        if not self._updating:
            self._offloaded.release()

    def export_units(
        self,
        *,
        dtype: torch.dtype | None = None,
        exceptions: Mapping[str, torch.dtype] | None = None,
        encoder: QuantizationScheme | None = None,
    ) -> Iterator[ExportUnit]:
        self._offloaded.load_weights()
        encoded = None
        if encoder is not None and self._quantized is not None:
            # The engine receives the bytes with which the trainer computes.
            self._quantized.refresh()
            encoder.adopt_report(self._quantized.report)
            encoded = self._quantized.encoded
        return self._export.units(dtype=dtype, exceptions=exceptions, encoder=encoder, encoded=encoded)

    def save(self, path: str | Path, contents: Sequence[str] = checkpoint.CONTENTS) -> None:
        self._load_state()
        checkpoint.save_state(
            Path(path),
            contents,
            model=self.model,
            optimizer=self._optimizer,
            schedule_step=self._schedule_step,
            device=self._device,
            group=self._group,
            tensor=self._mesh.tensor,
        )
        self.release()

    def load(self, path: str | Path, contents: Sequence[str] = checkpoint.CONTENTS) -> None:
        self._load_state()
        step = checkpoint.load_state(
            Path(path),
            contents,
            model=self.model,
            optimizer=self._optimizer,
            device=self._device,
            group=self._group,
            tensor=self._mesh.tensor,
        )
        self._note_new_weights()
        if step is not None:
            self._schedule_step = step
        self.release()

    def export_hf(self, path: str | Path, dtype: str = "auto") -> None:
        self._offloaded.load_weights()
        write_hf_directory(
            self._export,
            self.model,
            Path(path),
            source=Path(self._path),
            tokenizer=Path(self._model_config.tokenizer_path or self._path),
            override=self._model_config.override_config,
            dtype=dtype,
            writes=dist.get_rank(self._group) == 0,
            group=self._group,
        )
        self.release()

    def _accumulate(
        self,
        mini_batch: DataProto,
        micro_batching: MicroBatching,
        loss_of: Callable[[MicroBatch, AlignedBatch], tuple[torch.Tensor, Mapping[str, torch.Tensor | MeanShare]]],
    ) -> dict[str, float]:
        """Run `loss_of` forward and backward over this rank's micro-batches.

        Returns:
            loss and metrics, reduced over micro-batches and ranks, and `padding_fraction`, the share of padding among
            the positions that the model processed.
        """
        self._mini_batch, self._updating = mini_batch, True
        self._prepare_weights()
        self._offloaded.start_loading_moments()
        aligned = AlignedBatch(mini_batch, self._device, self._layout, self._sequence)
        sums = MetricSums()
        losses, samples = [], []
        for micro_batch in aligned.micro_batches(micro_batching, self._group):
            with span("forward", "train", samples=len(micro_batch.sample_indices)):
                loss, metrics = loss_of(micro_batch, aligned)
            with span("backward", "train"):
                loss.backward()
            losses.append(loss.detach())
            samples.append(micro_batch.sample_indices)
            if not self._mesh.counts_samples:
                continue
            positions = micro_batch.input_ids.numel() * self._sequence.size
            counts = {_TOKENS: micro_batch.tokens, _POSITIONS: positions}
            for name, value in {**metrics, "loss": loss, **counts}.items():
                sums.add(name, value)
        self._raise_if_not_finite(losses, samples)
        reduced = sums.reduce(self._group, self._device)
        reduced["padding_fraction"] = 1.0 - reduced.pop(_TOKENS) / max(reduced.pop(_POSITIONS), 1.0)
        return reduced

    def _collect(
        self,
        data: DataProto,
        micro_batching: MicroBatching,
        count: int,
        forward: Callable[[MicroBatch, AlignedBatch], Sequence[torch.Tensor]],
        *,
        updating: bool = False,
    ) -> list[torch.Tensor]:
        """Return the `count` [B, T] float32 tensors that `forward` computes, in the order of `data`, on the CPU.

        Args:
            forward: returns `count` tensors [b, T] of a micro-batch.
            updating: run the model as `_accumulate` does, with gradients and checkpointing.
        """
        self._prepare_weights()
        aligned = AlignedBatch(data, self._device, self._layout, self._sequence)
        shape = aligned.response_mask.shape
        columns = [torch.zeros(shape, dtype=torch.float32, device=self._device) for _ in range(count)]
        for micro_batch in aligned.micro_batches(micro_batching, self._group):
            index = micro_batch.sample_indices
            with span("forward", "train", samples=len(index)), torch.set_grad_enabled(updating):
                parts = forward(micro_batch, aligned)
            if len(index):
                for column, part in zip(columns, parts, strict=True):
                    column[index] = part.detach().to(column.dtype)
        self._reshard()
        self.release()
        return [column.cpu() for column in columns]

    def _load_state(self) -> None:
        """Bring weights and optimizer state to the device."""
        self._offloaded.load_weights()
        self._offloaded.load_moments()

    def _scatter(
        self, values: Sequence[torch.Tensor], micro_batch: MicroBatch, aligned: AlignedBatch
    ) -> tuple[torch.Tensor, ...]:
        """Return [b, T] tensors with the values at the response tokens and 0 elsewhere.

        Args:
            values: each [n], of the tokens that this rank's positions predict.
        """
        indices, shape = micro_batch.response_indices, (max(len(micro_batch.sample_indices), 1), aligned.response_width)
        return tuple(
            flat.new_zeros(shape[0] * shape[1]).index_put((indices,), flat).view(shape)
            for flat in self._sequence.gather(values, micro_batch.own, len(indices))
        )

    def _note_new_weights(self) -> None:
        self._offloaded.mark_changed()
        if self._quantized is not None:
            self._quantized.mark_stale()

    def _prepare_weights(self) -> None:
        """Bring the weights to the device, and encode them for quantized passes if they have changed. Collective."""
        self._offloaded.load_weights()
        if self._quantized is not None:
            self._quantized.refresh()

    def _reshard(self) -> None:
        """Free the parameters that FSDP keeps gathered for a backward pass, which does not follow here."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _raise_if_not_finite(self, losses: list[torch.Tensor], samples: list[torch.Tensor]) -> None:
        """Check all losses once per mini-batch; an earlier exception would leave other ranks waiting in a collective.

        Args:
            losses: loss of each micro-batch.
            samples: sample indices of each micro-batch.

        Raises:
            NonFiniteError: a loss is NaN or infinite on any rank; raised on all ranks.
        """
        bad = ~torch.isfinite(torch.stack(losses)) if losses else torch.zeros(1, dtype=torch.bool, device=self._device)
        count = bad.sum().to(torch.int32)
        dist.all_reduce(count, group=self._group)
        if int(count) == 0:
            return
        assert self._mini_batch is not None
        failed = [samples[i].cpu().numpy() for i in bad.nonzero().flatten().tolist()]
        mine = [uid for index in failed for uid in _uids(self._mini_batch, index)]
        self._fail("loss", mine)

    def _fail(self, quantity: str, uids: list[str]) -> NoReturn:
        """Drop the gradients and raise NonFiniteError. Collective: all ranks must call it."""
        assert self._mini_batch is not None and self._optimizer is not None
        self._optimizer.zero_grad(set_to_none=True)
        self._updating = False
        self.release()
        by_rank: list[list[str] | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(by_rank, uids, group=self._group)
        all_uids = sorted({uid for rank_uids in by_rank for uid in rank_uids or ()})
        raise NonFiniteError(quantity, self._mini_batch.meta_info.get("global_step"), all_uids)


class FSDPEngine(FSDPTrainEngine, PolicyEngine):
    """Engine of the policy, or of the frozen reference policy."""

    def _lora_options(self, model_config: ModelConfig | CriticModelConfig) -> LoraOptions | None:
        assert isinstance(model_config, ModelConfig)
        return lora_options(model_config)

    def _on_model_loaded(self) -> None:
        assert isinstance(self._model_config, ModelConfig)
        requested = self._model_config.use_fused_kernels
        if requested and dist.get_rank(self._group) == 0:
            try_chunked_head(self.model.config, self._model_config.trust_remote_code)
        self.output_head = OutputHead(self.model, requested)

    def forward_backward(
        self, mini_batch: DataProto, loss_fn: LossFn, micro_batching: MicroBatching, *, entropy_grad: bool = False
    ) -> dict[str, float]:
        temperature = _temperature(mini_batch)

        def loss_of(
            micro_batch: MicroBatch, aligned: AlignedBatch
        ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor | MeanShare]]:
            log_probs, entropy = self._forward(micro_batch, aligned, temperature, entropy_grad=entropy_grad)
            return loss_fn(log_probs, entropy, _columns(aligned, micro_batch))

        return self._accumulate(mini_batch, micro_batching, loss_of)

    def log_probs(
        self,
        data: DataProto,
        micro_batching: MicroBatching,
        *,
        calculate_entropy: bool,
        calculate_sum_pi_squared: bool = False,
        updating: bool = False,
    ) -> LogProbs:
        temperature = _temperature(data)

        def forward(micro_batch: MicroBatch, aligned: AlignedBatch) -> tuple[torch.Tensor, ...]:
            return self._forward(micro_batch, aligned, temperature, sum_pi_squared=calculate_sum_pi_squared)

        count = 2 + calculate_sum_pi_squared
        log_probs, entropy, *squares = self._collect(data, micro_batching, count, forward, updating=updating)
        return LogProbs(log_probs, entropy if calculate_entropy else None, squares[0] if squares else None)

    def output_errors(self, data: DataProto, micro_batching: MicroBatching, options: QatOptions) -> Errors:
        if self._mesh.tensor is not None:
            return {}  # of parts of an output, and of parts of a sum
        with OutputErrors(self.model, self._export, options) as measured:
            self.log_probs(data, micro_batching, calculate_entropy=False)
        return measured.errors

    def _forward(
        self,
        micro_batch: MicroBatch,
        aligned: AlignedBatch,
        temperature: float,
        *,
        entropy_grad: bool = False,
        sum_pi_squared: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Return log-probabilities, entropies and, if requested, sums of squares of a micro-batch, [b, T] float32."""
        flat = self.output_head.log_probs(
            micro_batch, temperature, entropy_grad=entropy_grad, sum_pi_squared=sum_pi_squared
        )
        return self._scatter([values for values in flat if values is not None], micro_batch, aligned)


class FSDPValueEngine(FSDPTrainEngine, ValueEngine):
    """Engine of the critic."""

    _value_head = True

    def forward_backward(
        self, mini_batch: DataProto, loss_fn: ValueLossFn, micro_batching: MicroBatching
    ) -> dict[str, float]:
        def loss_of(
            micro_batch: MicroBatch, aligned: AlignedBatch
        ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor | MeanShare]]:
            return loss_fn(self._forward(micro_batch, aligned), _columns(aligned, micro_batch))

        return self._accumulate(mini_batch, micro_batching, loss_of)

    def values(self, data: DataProto, micro_batching: MicroBatching) -> torch.Tensor:
        [values] = self._collect(data, micro_batching, 1, lambda *micro_batch: [self._forward(*micro_batch)])
        return values

    def _forward(self, micro_batch: MicroBatch, aligned: AlignedBatch) -> torch.Tensor:
        """Return the values of a micro-batch, [b, T] float32."""
        flat = call_model(self.model, micro_batch, rows=micro_batch.predictor_indices)
        return self._scatter([flat.squeeze(-1)], micro_batch, aligned)[0]


def _required_path(model_config: ModelConfig | CriticModelConfig) -> str:
    assert model_config.path is not None, "model.path is a required key"
    return model_config.path


def _temperature(data: DataProto) -> float:
    temperature = float(data.meta_info["temperature"])
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be positive to compute log-probabilities")
    return temperature


def _columns(aligned: AlignedBatch, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Return the [b, T] and [b] columns of the micro-batch; one sample of zeros if it has no samples."""
    index = micro_batch.sample_indices
    if len(index) == 0:
        return {name: column.new_zeros(1, *column.shape[1:]) for name, column in aligned.columns.items()}
    return {name: column[index] for name, column in aligned.columns.items()}


def _uids(data: DataProto, samples: np.ndarray | slice) -> list[str]:
    return [str(uid) for uid in data.non_tensor_batch["uid"][samples]] if "uid" in data.non_tensor_batch else []
