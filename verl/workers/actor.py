"""The actor: the trained policy, and optionally the frozen reference policy, on one rank of the trainer.

It does not depend on how its process was started. Every method except the constructor is collective: all ranks call it
in the same order, each with its shard of the data.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from verl.algorithms.losses import get_policy_loss_fn, get_token_selector
from verl.config import (
    ActorConfig,
    ActorRolloutRefConfig,
    FSDPConfig,
    OptimConfig,
    RefConfig,
    RolloutConfig,
    names,
)
from verl.config.distillation import DistillationLossConfig
from verl.config.qat import policy_dtype, qat_mode
from verl.config.rank_groups import actor_ranks_per_sample
from verl.config.rollout_correction import Correction
from verl.config.sequence_parallel import actor_sequence_parallel, ref_sequence_parallel
from verl.extension.external import import_external
from verl.protocol import DataProto
from verl.utils.dtypes import choose_dtype
from verl.utils.quantization.encode_report import Errors
from verl.utils.quantization_scheme import QuantizationScheme
from verl.workers.distillation_objective import DistillationObjective
from verl.workers.engine.base import LossFn, PolicyEngine
from verl.workers.engine.export import ExportUnit
from verl.workers.engine.fsdp import FSDPEngine
from verl.workers.engine.micro_batch import MicroBatching, micro_batching
from verl.workers.engine.qat import QatOptions
from verl.workers.policy_objective import PolicyObjective, select_tokens
from verl.workers.process_group import join_process_group, memory_metrics, select_device
from verl.workers.rollout.quantization import get_scheme
from verl.workers.update_loop import run_updates
from verl.workers.weight_sync.manifest import dtype_from_name

_T = TypeVar("_T")


def log_prob_limits(section: RolloutConfig | RefConfig, actor: ActorConfig) -> MicroBatching:
    """Return the micro-batch limit of a forward pass: the section's value of each key, or the actor's if it is None.

    The rollout section has the limit of the actor's pass.
    """
    if isinstance(section, RefConfig):
        sequence_parallel = ref_sequence_parallel(section, actor)
    else:
        sequence_parallel = actor_sequence_parallel(actor)

    def either(value: _T | None, fallback: _T) -> _T:
        return fallback if value is None else value

    return micro_batching(
        either(section.log_prob_use_dynamic_bsz, actor.use_dynamic_bsz),
        either(section.log_prob_micro_batch_size_per_gpu, actor.ppo_micro_batch_size_per_gpu),
        either(section.log_prob_max_token_len_per_gpu, actor.ppo_max_token_len_per_gpu),
        sequence_parallel,
    )


class _TokenColumns(TypedDict):
    """One rank's response tokens of a mini-batch, each a tensor [N], in the order of its samples."""

    log_prob: torch.Tensor
    old_log_prob: torch.Tensor
    advantages: torch.Tensor
    sample: torch.Tensor


class ActorWorker:
    """One rank of the actor.

    Args:
        rank, world_size: this rank, and the number of ranks.
        master_addr, master_port: address where rank 0 listens.
        config: the `actor_rollout_ref` section.
        total_training_steps: length of the learning-rate schedule.
        max_model_len: limit of a sequence in tokens, the same as in the rollout engine.
        with_ref: also hold the reference policy, a frozen copy of the initial model.
        device: "cpu", "cuda" or "npu"; if several devices are visible, see `select_device`.
        bypass: the rollout correction of bypass mode, in which `old_log_probs` come from the rollout engine and the
            loss corrects for that; None to use the loss of the `actor` section.
        distillation: the loss that pulls the policy to a teacher, which needs the column `teacher_log_probs`; None
            without a teacher.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        config: ActorRolloutRefConfig,
        *,
        total_training_steps: int,
        max_model_len: int,
        with_ref: bool,
        device: str,
        bypass: Correction | None = None,
        distillation: DistillationLossConfig | None = None,
    ):
        self.rank = rank
        self.world_size = world_size
        self._master = (master_addr, master_port)
        self._config = config
        self._total_training_steps = total_training_steps
        self._max_model_len = max_model_len
        self._with_ref = with_ref
        self._device_type = device
        self._bypass = bypass
        self._distillation = distillation
        self._device = torch.device("cpu")
        self._engine: PolicyEngine | None = None
        self._ref: PolicyEngine | None = None
        self._training_log_probs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def init_model(self) -> None:
        """Join the process group and load the models.

        Raises:
            ValueError: the checkpoint does not match the model, or a setting is unknown.
        """
        actor = self._config.actor
        import_external(self._config.model.external_lib or ())
        loss_mode = actor.policy_loss.loss_mode if self._bypass is None else "bypass_mode"
        self._policy_loss, self._select_tokens = get_policy_loss_fn(loss_mode), get_token_selector(loss_mode)
        self._ranks_per_sample = actor_ranks_per_sample(actor)
        sequence_parallel = actor_sequence_parallel(actor)
        self._train_limits = micro_batching(
            actor.use_dynamic_bsz,
            actor.ppo_micro_batch_size_per_gpu,
            actor.ppo_max_token_len_per_gpu,
            sequence_parallel,
        )
        self._device = select_device(self._device_type, self.rank)
        timeout = self._config.nccl_timeout
        mesh = join_process_group(self._device_type, self.rank, self.world_size, *self._master, timeout)
        self._engine = self._make_engine(actor.fsdp_config, mesh, sequence_parallel, optim_config=actor.optim)
        if self._with_ref:
            ref = self._config.ref
            shared = ref_sequence_parallel(ref, actor)
            self._ref = self._make_engine(ref.fsdp_config, mesh, shared, optim_config=None)

    def _make_engine(
        self, fsdp_config: FSDPConfig, mesh: DeviceMesh, sequence_parallel: int, optim_config: OptimConfig | None
    ) -> FSDPEngine:
        return FSDPEngine(
            self._config.model,
            fsdp_config,
            mesh=mesh,
            device=self._device,
            compute_dtype=policy_dtype(self._device_type, fsdp_config, self._config.rollout).name,
            max_model_len=self._max_model_len,
            optim_config=optim_config,
            total_training_steps=self._total_training_steps,
            sequence_parallel=sequence_parallel,
            qat=self._qat_options(fsdp_config),
        )

    def _qat_options(self, fsdp_config: FSDPConfig) -> QatOptions | None:
        mode = qat_mode(fsdp_config, self._config.rollout)
        if mode is None:
            return None
        return dataclasses.replace(
            self._numbers_of_engine(),
            activations=mode != names.QAT_WEIGHTS_ONLY,
            mask_saturated=fsdp_config.qat.mask_saturated,
        )

    def _numbers_of_engine(self) -> QatOptions:
        rollout = self._config.rollout
        assert self._config.model.path is not None, "preflight checks that it is set"
        scheme = get_scheme(rollout, self._config.model.path)
        return QatOptions(scheme, dtype_from_name(choose_dtype(self._device_type, rollout.dtype).name))

    @property
    def engine(self) -> PolicyEngine:
        """Engine of the policy."""
        if self._engine is None:
            raise RuntimeError("ActorWorker: call init_model() first")
        return self._engine

    def compute_log_prob(self, data: DataProto, extras: Sequence[str] = (), *, updating: bool = False) -> DataProto:
        """Return `old_log_probs` [B, T] float32 of the current policy, 0 where response_mask is 0.

        Args:
            data: input_ids, attention_mask [B, P+T], responses, response_mask [B, T]; meta_info `temperature`.
            extras: further columns [B, T] to return: `entropys`, and `sum_pi_squared`, the sum of the squared
                probabilities over the vocabulary.
            updating: use the model's mode and the micro-batches of an update.
        """
        limits = self._train_limits if updating else log_prob_limits(self._config.rollout, self._config.actor)
        log_probs, entropy, squares = self.engine.log_probs(
            data,
            limits,
            calculate_entropy="entropys" in extras,
            calculate_sum_pi_squared="sum_pi_squared" in extras,
            updating=updating,
        )
        columns = {"old_log_probs": log_probs, "entropys": entropy, "sum_pi_squared": squares}
        return DataProto.from_dict(tensors={name: column for name, column in columns.items() if column is not None})

    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """Return `ref_log_prob` [B, T] float32 of the reference policy; `data` as in `compute_log_prob`."""
        if self._ref is None:
            raise RuntimeError("ActorWorker has no reference policy: construct it with with_ref=True")
        limits = log_prob_limits(self._config.ref, self._config.actor)
        log_probs = self._ref.log_probs(data, limits, calculate_entropy=False).log_probs
        return DataProto.from_dict(tensors={"ref_log_prob": log_probs})

    def output_errors(self, data: DataProto) -> Errors:
        """Return the errors of a quantized engine in the output of each layer, for this rank's samples.

        Args:
            data: as in `compute_log_prob`; one micro-batch.
        """
        return self.engine.output_errors(data, MicroBatching(size=max(1, len(data))), self._numbers_of_engine())

    def update_actor(self, mini_batches: list[DataProto]) -> dict[str, float]:
        """Train on this rank's share of each mini-batch: `ppo_epochs` epochs, one optimizer step per mini-batch.

        Args:
            mini_batches: result of `verl.trainer.ppo.batching.split_mini_batches`.

        Returns:
            `actor/*` metrics, averaged over the optimizer steps; equal on all ranks.

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; raised on all ranks before the optimizer step.
        """
        actor = self._config.actor
        self._training_log_probs = []

        def forward_backward(epoch: int, number: int, mini_batch: DataProto) -> dict[str, float]:
            if self._select_tokens is not None:
                mini_batch = self._with_selected_tokens(mini_batch, f"{epoch}.{number}")
            objective = PolicyObjective(self._policy_loss, actor, mini_batch.meta_info, self._bypass)
            loss: LossFn = objective
            if self._distillation is not None:
                loss = DistillationObjective(objective, self._distillation, actor, mini_batch.meta_info)
            metrics = self.engine.forward_backward(
                mini_batch, loss, self._train_limits, entropy_grad=actor.entropy_coeff != 0
            )
            if epoch == 0 and self._bypass is not None:
                self._training_log_probs += objective.training_log_probs
            return metrics

        metrics = run_updates(
            self.engine, mini_batches, forward_backward, epochs=actor.ppo_epochs, prefix="actor", loss_name="actor/loss"
        )
        if actor.use_kl_loss:
            metrics["actor/kl_coef"] = actor.kl_loss_coef
        return metrics | memory_metrics("actor", self._device)

    def training_log_probs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, in bypass mode, the log-probabilities with which the last `update_actor` first trained each sample.

        A second call returns no samples.

        Returns:
            `sample_index` [b] int64, the indices in the batch of this rank's samples that have a response token, and
            their log-probabilities [b, T] float32.
        """
        parts, self._training_log_probs = self._training_log_probs, []
        if not parts:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, 0)
        index, log_probs = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return index, log_probs.float()

    def _with_selected_tokens(self, mini_batch: DataProto, number: str) -> DataProto:
        """Add `selected_tokens` [b, T], which the loss selects from the whole mini-batch with the current policy.

        Every rank selects from the samples of all ranks, so the selection does not depend on the split.

        Args:
            number: "epoch.mini-batch", part of the random seed.
        """
        assert self._select_tokens is not None, "the policy loss selects no tokens"
        log_probs = self.engine.log_probs(mini_batch, self._train_limits, calculate_entropy=False).log_probs
        columns = mini_batch.batch
        assert columns is not None, "a mini-batch has tensor columns"
        mask = columns["response_mask"].bool()
        # Only the tokens are gathered: padding may be most of a batch with long responses.
        own: _TokenColumns = {
            "log_prob": log_probs[mask],
            "old_log_prob": columns["old_log_probs"][mask],
            "advantages": columns["advantages"][mask],
            "sample": columns["sample_index"].unsqueeze(-1).expand(mask.shape)[mask],
        }
        by_rank: list[_TokenColumns] = [own] * self.world_size
        dist.all_gather_object(by_rank, own)
        parts = by_rank[:: self._ranks_per_sample]
        order = torch.cat([part["sample"] for part in parts]).argsort(stable=True)
        selected = select_tokens(
            self._select_tokens,
            log_prob=torch.cat([part["log_prob"] for part in parts])[order],
            old_log_prob=torch.cat([part["old_log_prob"] for part in parts])[order],
            advantages=torch.cat([part["advantages"] for part in parts])[order],
            config=self._config.actor,
            seed=zlib.crc32(f"{mini_batch.meta_info.get('global_step')}.{number}".encode()),
        )
        chosen = torch.empty_like(order)
        chosen[order] = selected.to(order.dtype)
        first = sum(len(part["sample"]) for part in parts[: self.rank // self._ranks_per_sample])
        marked = torch.zeros(mask.shape, dtype=torch.int64)
        marked[mask] = chosen[first : first + len(own["sample"])]
        return mini_batch.select().union(DataProto.from_dict(tensors={"selected_tokens": marked}))

    def export_weights(
        self, *, dtype: torch.dtype | None = None, encoder: QuantizationScheme | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over the policy's weights under checkpoint names; see `TrainEngine.export_weights`."""
        return self.engine.export_weights(dtype=dtype, encoder=encoder)

    def export_units(
        self,
        *,
        dtype: torch.dtype | None = None,
        exceptions: Mapping[str, torch.dtype] | None = None,
        encoder: QuantizationScheme | None = None,
    ) -> Iterator[ExportUnit]:
        """Iterate over the policy's weights before they are gathered; see `TrainEngine.export_units`."""
        return self.engine.export_units(dtype=dtype, exceptions=exceptions, encoder=encoder)

    def release(self) -> None:
        """Free the device memory of offloaded weights after an export; see `TrainEngine.release`."""
        self.engine.release()

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the resumable parts in `actor.checkpoint.save_contents` into `path`."""
        self.engine.save(path, self._config.actor.checkpoint.saved_parts)

    def load_checkpoint(self, path: str | Path) -> None:
        """Read the parts in `actor.checkpoint.load_contents`."""
        self.engine.load(path, self._config.actor.checkpoint.loaded_parts)

    def export_hf(self, path: str | Path) -> None:
        """Write the policy as the Hugging Face directory `path` if `save_contents` has `hf_model`."""
        checkpoint = self._config.actor.checkpoint
        if checkpoint.saves_hf_model:
            self.engine.export_hf(path, checkpoint.hf_dtype)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
