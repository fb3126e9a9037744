"""The training engines on FSDP2 (`fully_shard`): any Hugging Face causal language model, any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from verl.config import lora_options
from verl.protocol import DataProto
from verl.utils.quantization_scheme import QuantizationScheme
from verl.utils.timeline import span, spanned
from verl.workers.engine import checkpoint, export, optim
from verl.workers.engine.base import LossFn, PolicyEngine, TrainEngine, ValueEngine, ValueLossFn
from verl.workers.engine.errors import NonFiniteError
from verl.workers.engine.export import ExportUnit, WeightExport
from verl.workers.engine.loading import load_sharded_model, parse_dtype
from verl.workers.engine.log_probs import token_log_probs
from verl.workers.engine.micro_batch import AlignedBatch, Layout, MicroBatch, MicroBatching
from verl.workers.engine.packed_attention import pack_attention

_TOKENS, _POSITIONS = "tokens", "positions"


class FSDPTrainEngine(TrainEngine):
    """A model whose parameters, gradients and optimizer state are sharded over the ranks of `mesh`.

    Args:
        model_config: a `model` section.
        fsdp_config: an `fsdp_config` section.
        mesh: one dimension, all ranks.
        device: this rank's device.
        compute_dtype: of matrix products and activations, e.g. "float32" or "bfloat16"; the master weights' is
            `fsdp_config.model_dtype`.
        optim_config: the `optim` section; None for an engine that only runs forward.
        total_training_steps: length of the learning-rate schedule.
    """

    _value_head = False

    def __init__(
        self,
        model_config: Any,
        fsdp_config: Any,
        *,
        mesh: DeviceMesh,
        device: torch.device,
        compute_dtype: str,
        optim_config: Any | None = None,
        total_training_steps: int = 0,
    ):
        self._model_config = model_config
        self._device = device
        self._group = mesh.get_group()
        trains = optim_config is not None
        self.model = load_sharded_model(
            model_config.path,
            mesh=mesh,
            device=device,
            dtype=parse_dtype(fsdp_config.model_dtype, "fsdp_config.model_dtype"),
            compute_dtype=parse_dtype(compute_dtype, "compute dtype"),
            trust_remote_code=model_config.trust_remote_code,
            override_config=model_config.override_config,
            gradient_checkpointing=trains and model_config.enable_gradient_checkpointing,
            reshard_after_forward=fsdp_config.reshard_after_forward,
            value_head=self._value_head,
            # Neither the reference policy nor the critic has adapters.
            lora=lora_options(model_config) if trains and not self._value_head else None,
        )
        if not trains:
            self.model.requires_grad_(False)
        self._layout = Layout.FULL_ROWS
        if model_config.use_remove_padding:
            self._layout = Layout.PACKED if pack_attention(self.model) else Layout.ROWS
        self._optimizer = _make_optimizer(self.model, optim_config, device) if trains else None
        self._lr_at = _make_schedule(optim_config, total_training_steps) if trains else None
        self._clip = optim_config.clip_grad if trains else None
        self._schedule_step = 0
        self._mini_batch: DataProto | None = None
        self._export = WeightExport(self.model)
        self._offloads = not trains and fsdp_config.param_offload
        self._offload()

    @spanned("optimizer", "train")
    def optimizer_step(self) -> dict[str, float]:
        assert self._optimizer is not None and self._lr_at is not None, "this engine only runs forward"
        grads = optim.local_grads(self.model.parameters())
        norm = optim.global_grad_norm(grads, self._group, self._device)
        if not torch.isfinite(torch.tensor(norm)):
            assert self._mini_batch is not None
            self._fail("gradient norm", _uids(self._mini_batch, slice(None)))
        if self._clip is not None:
            optim.clip_grads(grads, norm, self._clip)
        lr = self._lr_at(self._schedule_step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._mini_batch = None
        return {"grad_norm": norm, "lr": lr}

    def schedule_step(self) -> None:
        self._schedule_step += 1

    def export_units(
        self, *, dtype: torch.dtype | None = None, encoder: QuantizationScheme | None = None
    ) -> Iterator[ExportUnit]:
        return self._export.units(dtype=dtype, encoder=encoder)

    def save(self, path: str | Path, contents: Sequence[str] = checkpoint.CONTENTS) -> None:
        checkpoint.save_state(
            Path(path),
            [part for part in contents if part != checkpoint.HF_MODEL],
            model=self.model,
            optimizer=self._optimizer,
            schedule_step=self._schedule_step,
            device=self._device,
            group=self._group,
        )
        if checkpoint.HF_MODEL in contents:
            self.export_hf(Path(path) / "huggingface")

    def load(self, path: str | Path, contents: Sequence[str] = checkpoint.CONTENTS) -> None:
        step = checkpoint.load_state(
            Path(path),
            [part for part in contents if part != checkpoint.HF_MODEL],
            model=self.model,
            optimizer=self._optimizer,
            device=self._device,
            group=self._group,
        )
        if step is not None:
            self._schedule_step = step

    def export_hf(self, path: str | Path) -> None:
        export.write_hf_directory(
            self.model,
            Path(path),
            tokenizer_path=self._model_config.tokenizer_path or self._model_config.path,
            trust_remote_code=self._model_config.trust_remote_code,
            writes=dist.get_rank(self._group) == 0,
        )
        dist.barrier(group=self._group)

    def _accumulate(
        self,
        mini_batch: DataProto,
        micro_batching: MicroBatching,
        loss_of: Callable[[MicroBatch, AlignedBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    ) -> dict[str, float]:
        """Run `loss_of` forward and backward over this rank's micro-batches; sums over them and over the ranks.

        `padding_fraction` is the share of the positions that went through the model without being of a sample.
        """
        self.model.train()
        self._mini_batch = mini_batch
        aligned = AlignedBatch(mini_batch, self._device, self._layout)
        totals: dict[str, torch.Tensor] = {}
        losses, rows = [], []
        for micro_batch in aligned.micro_batches(micro_batching, self._group):
            with span("forward", "train", samples=len(micro_batch.rows)):
                loss, metrics = loss_of(micro_batch, aligned)
            with span("backward", "train"):
                loss.backward()
            losses.append(loss.detach())
            rows.append(micro_batch.rows)
            counts = {_TOKENS: micro_batch.tokens, _POSITIONS: micro_batch.input_ids.numel()}
            for name, value in {**metrics, "loss": loss, **counts}.items():
                totals[name] = totals.get(name, 0) + torch.as_tensor(value).detach()
        self._raise_if_not_finite(losses, rows)
        sums = self._sum_over_ranks(totals)
        sums["padding_fraction"] = 1.0 - sums.pop(_TOKENS) / max(sums.pop(_POSITIONS), 1.0)
        return sums

    @torch.no_grad()
    def _collect(
        self,
        data: DataProto,
        micro_batching: MicroBatching,
        count: int,
        forward: Callable[[MicroBatch, AlignedBatch], Sequence[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """The `count` [b, T] tensors that `forward` makes of each micro-batch, joined in the order of `data`, on the
        CPU."""
        self.model.eval()
        if self._offloads:
            self.model.to(self._device)
        aligned = AlignedBatch(data, self._device, self._layout)
        shape = aligned.response_mask.shape
        whole = [torch.zeros(shape, dtype=torch.float32, device=self._device) for _ in range(count)]
        for micro_batch in aligned.micro_batches(micro_batching, self._group):
            with span("forward", "train", samples=len(micro_batch.rows)):
                parts = forward(micro_batch, aligned)
            if len(micro_batch.rows):
                for column, part in zip(whole, parts, strict=True):
                    column[micro_batch.rows] = part.to(column.dtype)
        self._reshard()
        self._offload()
        return [column.cpu() for column in whole]

    def _offload(self) -> None:
        """Move this rank's shards to the host until the next forward pass, where the config says so."""
        if self._offloads:
            self.model.to("cpu")

    def _reshard(self) -> None:
        """Free what FSDP keeps gathered after a forward pass, expecting a backward that does not come."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _sum_over_ranks(self, totals: dict[str, torch.Tensor]) -> dict[str, float]:
        # HCCL does not reduce float64
        dtype = torch.float32 if self._device.type == "npu" else torch.float64
        names = sorted(totals)
        values = torch.stack([totals[name].to(self._device, dtype) for name in names])
        dist.all_reduce(values, group=self._group)
        return dict(zip(names, values.tolist(), strict=True))

    def _raise_if_not_finite(self, losses: list[torch.Tensor], rows: list[torch.Tensor]) -> None:
        """Judged once per mini-batch: leaving earlier would leave other ranks in a collective, waiting."""
        bad = ~torch.isfinite(torch.stack(losses)) if losses else torch.zeros(1, dtype=torch.bool, device=self._device)
        count = bad.sum().to(torch.int32)
        dist.all_reduce(count, group=self._group)
        if int(count) == 0:
            return
        assert self._mini_batch is not None
        mine = [uid for i in bad.nonzero().flatten().tolist() for uid in _uids(self._mini_batch, rows[i].cpu().numpy())]
        self._fail("loss", mine)

    def _fail(self, what: str, uids: list[str]) -> None:
        """Drop the gradients and raise on all ranks, which must all come here."""
        assert self._mini_batch is not None and self._optimizer is not None
        self._optimizer.zero_grad(set_to_none=True)
        of_all: list[list[str] | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(of_all, uids, group=self._group)
        everyone = sorted({uid for some in of_all for uid in some or ()})
        raise NonFiniteError(what, self._mini_batch.meta_info.get("global_step"), everyone)


class FSDPEngine(FSDPTrainEngine, PolicyEngine):
    """The policy, or its frozen reference."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_input = _SelectRows(self.model.get_output_embeddings())

    def forward_backward(
        self, mini_batch: DataProto, loss_fn: LossFn, micro_batching: MicroBatching, *, entropy_grad: bool = False
    ) -> dict[str, float]:
        temperature = _temperature(mini_batch)

        def loss_of(micro_batch: MicroBatch, aligned: AlignedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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
    ) -> tuple[Any, ...]:
        temperature = _temperature(data)

        def forward(micro_batch: MicroBatch, aligned: AlignedBatch) -> tuple[torch.Tensor, ...]:
            return self._forward(micro_batch, aligned, temperature, sum_pi_squared=calculate_sum_pi_squared)

        log_probs, entropy, *more = self._collect(data, micro_batching, 2 + calculate_sum_pi_squared, forward)
        return log_probs, entropy if calculate_entropy else None, *more

    def _forward(
        self,
        micro_batch: MicroBatch,
        aligned: AlignedBatch,
        temperature: float,
        *,
        entropy_grad: bool = False,
        sum_pi_squared: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Log-probabilities, entropies and, if asked for, sums of squares [b, T] float32 of a micro-batch."""
        logits = self._head_input.logits(self.model, micro_batch)
        flat = token_log_probs(
            logits, micro_batch.targets, temperature, entropy_grad=entropy_grad, sum_pi_squared=sum_pi_squared
        )
        return tuple(_spread(some, micro_batch, aligned) for some in flat if some is not None)


class FSDPValueEngine(FSDPTrainEngine, ValueEngine):
    """The critic."""

    _value_head = True

    def forward_backward(
        self, mini_batch: DataProto, loss_fn: ValueLossFn, micro_batching: MicroBatching
    ) -> dict[str, float]:
        def loss_of(micro_batch: MicroBatch, aligned: AlignedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return loss_fn(self._forward(micro_batch, aligned), _columns(aligned, micro_batch))

        return self._accumulate(mini_batch, micro_batching, loss_of)

    def values(self, data: DataProto, micro_batching: MicroBatching) -> torch.Tensor:
        [values] = self._collect(data, micro_batching, 1, lambda *micro_batch: [self._forward(*micro_batch)])
        return values

    def _forward(self, micro_batch: MicroBatch, aligned: AlignedBatch) -> torch.Tensor:
        """Values [b, T] float32 of a micro-batch."""
        flat = _run(self.model, micro_batch, rows=micro_batch.predictors)
        return _spread(flat.squeeze(-1), micro_batch, aligned)


class _SelectRows:
    """Lets the output head see only the hidden states whose logits are needed.

    A hook, so that what the model does around its head (soft-capping, scaling) stays the model's own.
    """

    def __init__(self, head: torch.nn.Module):
        self._rows: torch.Tensor | None = None
        head.register_forward_pre_hook(self._select)

    def _select(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert self._rows is not None, "the model is run by logits() only"
        hidden, *others = args
        return hidden.reshape(-1, hidden.shape[-1])[self._rows].unsqueeze(0), *others

    def logits(self, model: PreTrainedModel, micro_batch: MicroBatch) -> torch.Tensor:
        """Logits [N, V] of the positions that predict response tokens."""
        self._rows = rows = micro_batch.predictors
        try:
            logits = _run(model, micro_batch, attention_mask=None, use_cache=False).logits
        finally:
            self._rows = None
        if logits.shape[:2] != (1, len(rows)):
            raise NotImplementedError(
                f"{type(model).__name__} made logits of shape {list(logits.shape)} from {len(rows)} hidden states: its "
                "output head cannot be restricted to the response; this architecture is not supported yet"
            )
        return logits.squeeze(0)


def _make_optimizer(model: torch.nn.Module, config: Any, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=tuple(config.betas),
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def _make_schedule(config: Any, run_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the training step."""
    given = config.total_training_steps
    total = run_steps if given is None or given < 0 else given
    warmup = optim.warmup_steps(config, total)

    def lr_at(step: int) -> float:
        factor = optim.lr_factor(
            step, kind=config.lr_scheduler_type, warmup=warmup, total=total, min_lr_ratio=config.min_lr_ratio or 0.0
        )
        return config.lr * factor

    return lr_at


def _run(model: PreTrainedModel, micro_batch: MicroBatch, **options: Any) -> Any:
    sequences = micro_batch.sequences
    if sequences is not None:
        options["packed_sequences"] = sequences
    output = model(input_ids=micro_batch.input_ids, position_ids=micro_batch.position_ids, **options)
    if sequences is not None:
        sequences.check_seen(model)
    return output


def _spread(flat: torch.Tensor, micro_batch: MicroBatch, aligned: AlignedBatch) -> torch.Tensor:
    """Put [N] numbers of response tokens into their places of [b, T]; 0 elsewhere."""
    shape = (max(len(micro_batch.rows), 1), aligned.response_width)
    return flat.new_zeros(shape[0] * shape[1]).index_put((micro_batch.slots,), flat).view(shape)


def _temperature(data: DataProto) -> float:
    temperature = float(data.meta_info["temperature"])
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: log-probabilities need a positive sampling temperature")
    return temperature


def _columns(aligned: AlignedBatch, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
    """The micro-batch's [b, T] and [b] columns; one sample of zeros for one without samples."""
    if len(micro_batch.rows) == 0:
        return {name: column.new_zeros(1, *column.shape[1:]) for name, column in aligned.columns.items()}
    return {name: column[micro_batch.rows] for name, column in aligned.columns.items()}


def _uids(data: DataProto, rows: Any) -> list[str]:
    return [str(uid) for uid in data.non_tensor_batch["uid"][rows]] if "uid" in data.non_tensor_batch else []
