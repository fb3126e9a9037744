"""The actor: the policy that is trained, and the frozen reference beside it, on a rank of the trainer.

It knows nothing of how its process was started. Every method but the constructor is collective: all ranks call it with
their own shard of the data, in the same order.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from verl.algorithms.losses import get_policy_loss_fn, get_token_selector
from verl.config.rollout_correction import Correction
from verl.protocol import DataProto
from verl.utils.dtypes import choose_dtype
from verl.utils.external import import_external
from verl.utils.quantization_scheme import QuantizationScheme
from verl.workers.engine.base import PolicyEngine
from verl.workers.engine.export import ExportUnit
from verl.workers.engine.fsdp import FSDPEngine
from verl.workers.engine.micro_batch import MicroBatching, micro_batching
from verl.workers.policy_objective import PolicyObjective
from verl.workers.process_group import join_ranks, own_device, peak_memory_gb

logger = logging.getLogger(__name__)


def log_prob_limits(section: Any, actor: Any) -> MicroBatching:
    """The limits of a forward pass: those of its section (rollout, ref), the actor's where it has none."""

    def own(value: Any, other: Any) -> Any:
        return other if value is None else value

    return micro_batching(
        own(section.log_prob_use_dynamic_bsz, actor.use_dynamic_bsz),
        own(section.log_prob_micro_batch_size_per_gpu, actor.ppo_micro_batch_size_per_gpu),
        own(section.log_prob_max_token_len_per_gpu, actor.ppo_max_token_len_per_gpu),
    )


class ActorWorker:
    """One rank of the actor.

    Args:
        rank: this rank, of `world_size`.
        master_addr: where rank 0 listens for the others.
        master_port: on which port.
        config: the `actor_rollout_ref` section.
        total_training_steps: length of the learning-rate schedule.
        with_ref: also hold the reference policy, a frozen copy of the initial model.
        device: "cpu", "cuda" or "npu"; the first visible one of an accelerator unless several are.
        bypass: the rollout correction of bypass mode: `old_log_probs` are the rollout engine's, and the loss corrects
            for that; None for the loss that the `actor` section names.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        config: Any,
        *,
        total_training_steps: int,
        with_ref: bool,
        device: str,
        bypass: Correction | None = None,
    ):
        self.rank = rank
        self.world_size = world_size
        self._master = (master_addr, master_port)
        self._config = config
        self._total_training_steps = total_training_steps
        self._with_ref = with_ref
        self._device_type = device
        self._bypass = bypass
        self._device = torch.device("cpu")
        self._engine: PolicyEngine | None = None
        self._ref: PolicyEngine | None = None
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def init_model(self) -> None:
        """Join the other ranks and load the models.

        Raises:
            ValueError: the checkpoint does not fit the model, or a setting is unknown.
        """
        actor = self._config.actor
        import_external(self._config.model.external_lib or ())
        loss_mode = actor.policy_loss.loss_mode if self._bypass is None else "bypass_mode"
        self._policy_loss, self._select_tokens = get_policy_loss_fn(loss_mode), get_token_selector(loss_mode)
        self._train_limits = micro_batching(
            actor.use_dynamic_bsz, actor.ppo_micro_batch_size_per_gpu, actor.ppo_max_token_len_per_gpu
        )
        self._device = own_device(self._device_type, self.rank)
        mesh = join_ranks(self._device_type, self.rank, self.world_size, *self._master)
        self._engine = self._make_engine(actor.fsdp_config, mesh, optim_config=actor.optim)
        if self._with_ref:
            self._ref = self._make_engine(self._config.ref.fsdp_config, mesh, optim_config=None)

    def _make_engine(self, fsdp_config: Any, mesh: DeviceMesh, optim_config: Any | None) -> FSDPEngine:
        return FSDPEngine(
            self._config.model,
            fsdp_config,
            mesh=mesh,
            device=self._device,
            compute_dtype=choose_dtype(self._device_type, fsdp_config.dtype).name,
            optim_config=optim_config,
            total_training_steps=self._total_training_steps,
        )

    @property
    def engine(self) -> PolicyEngine:
        """The engine of the policy."""
        if self._engine is None:
            raise RuntimeError("ActorWorker: call init_model() first")
        return self._engine

    def compute_log_prob(self, data: DataProto, extras: Sequence[str] = ()) -> DataProto:
        """`old_log_probs` [B, T] float32 under the present policy, 0 where response_mask is 0.

        Args:
            data: input_ids, attention_mask [B, P+T], responses, response_mask [B, T]; meta_info `temperature`.
            extras: further columns of that kind: `entropys`, and `sum_pi_squared`, the sum over the vocabulary of the
                squared probabilities.
        """
        limits = log_prob_limits(self._config.rollout, self._config.actor)
        log_probs, entropy, *squares = self.engine.log_probs(
            data,
            limits,
            calculate_entropy="entropys" in extras,
            calculate_sum_pi_squared="sum_pi_squared" in extras,
        )
        columns = {"old_log_probs": log_probs, "entropys": entropy, "sum_pi_squared": squares[0] if squares else None}
        return DataProto.from_dict(tensors={name: column for name, column in columns.items() if column is not None})

    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """`ref_log_prob` [B, T] float32 under the reference policy; `data` as in `compute_log_prob`."""
        if self._ref is None:
            raise RuntimeError("ActorWorker: there is no reference policy; construct it with with_ref=True")
        limits = log_prob_limits(self._config.ref, self._config.actor)
        log_probs, _ = self._ref.log_probs(data, limits, calculate_entropy=False)
        return DataProto.from_dict(tensors={"ref_log_prob": log_probs})

    def update_actor(self, mini_batches: list[DataProto]) -> dict[str, float]:
        """Train on this rank's share of each mini-batch, `ppo_epochs` times over, one optimizer step each.

        Args:
            mini_batches: as `verl.trainer.ppo.batching.split_mini_batches` makes them.

        Returns:
            `actor/*` metrics, means over the optimizer steps; equal on all ranks.

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; raised on all ranks before the optimizer step.
        """
        actor = self._config.actor
        history: list[dict[str, float]] = []
        self._seen = []
        for epoch in range(actor.ppo_epochs):
            for number, mini_batch in enumerate(mini_batches):
                if self._select_tokens is not None:
                    mini_batch = self._with_selected_tokens(mini_batch, f"{epoch}.{number}")
                objective = PolicyObjective(self._policy_loss, actor, mini_batch.meta_info, self._bypass)
                metrics = self.engine.forward_backward(
                    mini_batch, objective, self._train_limits, entropy_grad=actor.entropy_coeff != 0
                )
                metrics["actor/loss"] = metrics.pop("loss")
                metrics["actor/perf/padding_fraction"] = metrics.pop("padding_fraction")
                step = self.engine.optimizer_step()
                metrics["actor/grad_norm"], metrics["actor/lr"] = step["grad_norm"], step["lr"]
                history.append(metrics)
                if epoch == 0 and self._bypass is not None:
                    self._seen += objective.seen
        self.engine.schedule_step()
        means = {name: sum(metrics[name] for metrics in history) / len(history) for name in history[0]}
        if actor.use_kl_loss:
            means["actor/kl_coef"] = actor.kl_loss_coef
        means["actor/perf/max_memory_allocated_gb"] = peak_memory_gb(self._device)
        return means

    def training_log_probs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last `update_actor` saw of the policy in bypass mode, when each sample was first trained on.

        Returns:
            `sample_index` [b] int64, this rank's samples' places in the batch (those with a token to train on), and
            their log-probabilities [b, T] float32.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, 0)
        index, log_probs = (torch.cat(column).cpu() for column in zip(*seen, strict=True))
        return index, log_probs.float()

    def _with_selected_tokens(self, mini_batch: DataProto, number: str) -> DataProto:
        """Add `selected_tokens` [b, T], what the loss chooses from the whole mini-batch under the present policy.

        The choice is made alike on every rank from all ranks' samples, so it does not depend on how they are divided.
        """
        log_probs, *_ = self.engine.log_probs(mini_batch, self._train_limits, calculate_entropy=False)
        columns = mini_batch.batch
        mask = columns["response_mask"].bool()
        # The tokens alone, one after the other: padding may be most of a batch of long responses.
        own = {
            "log_prob": log_probs[mask],
            "old_log_prob": columns["old_log_probs"][mask],
            "advantages": columns["advantages"][mask],
            "sample": columns["sample_index"].unsqueeze(-1).expand(mask.shape)[mask],
        }
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, own)
        whole = {name: torch.cat([part[name] for part in parts]) for name in own}
        order = whole.pop("sample").argsort(stable=True)
        selected = self._select_tokens(
            **{name: values[order].unsqueeze(0) for name, values in whole.items()},
            response_mask=torch.ones(1, len(order)),
            config=self._config.actor,
            seed=zlib.crc32(f"{mini_batch.meta_info.get('global_step')}.{number}".encode()),
        )
        chosen = torch.empty_like(order)
        chosen[order] = selected.squeeze(0).to(order.dtype)
        first = sum(len(part["sample"]) for part in parts[: self.rank])
        marked = torch.zeros(mask.shape, dtype=torch.int64)
        marked[mask] = chosen[first : first + len(own["sample"])]
        return mini_batch.select().union(DataProto.from_dict(tensors={"selected_tokens": marked}))

    def export_weights(
        self, *, dtype: torch.dtype | None = None, encoder: QuantizationScheme | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's weights under checkpoint names; see `TrainEngine.export_weights`."""
        return self.engine.export_weights(dtype=dtype, encoder=encoder)

    def export_units(
        self, *, dtype: torch.dtype | None = None, encoder: QuantizationScheme | None = None
    ) -> Iterator[ExportUnit]:
        """The policy's weights before they are gathered; see `TrainEngine.export_units`."""
        return self.engine.export_units(dtype=dtype, encoder=encoder)

    def save_checkpoint(self, path: str | Path) -> None:
        """Write what `actor.checkpoint.save_contents` names into `path`, `hf_model` into `path/huggingface`."""
        self.engine.save(path, self._config.actor.checkpoint.save_contents)

    def load_checkpoint(self, path: str | Path) -> None:
        """Read what `actor.checkpoint.load_contents` names."""
        self.engine.load(path, self._config.actor.checkpoint.load_contents)

    def export_hf(self, path: str | Path) -> None:
        """Write the policy as a Hugging Face directory."""
        self.engine.export_hf(path)

    def close(self) -> None:
        """Leave the group of ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()
