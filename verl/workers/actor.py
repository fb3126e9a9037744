"""The actor: the policy that is trained, and the frozen reference beside it, on a rank of the trainer.

It knows nothing of how its process was started. Every method but the constructor is collective: all ranks call it with
their own shard of the data, in the same order.
"""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.platform import choose_dtype, dist_backend, torch_device
from verl.workers.engine.base import TrainEngine
from verl.workers.engine.export import RowEncoder
from verl.workers.engine.fsdp import FSDPEngine
from verl.workers.engine.micro_batch import MicroBatching
from verl.workers.policy_objective import PolicyObjective

logger = logging.getLogger(__name__)

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


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
    ):
        self.rank = rank
        self.world_size = world_size
        self._rendezvous = f"tcp://{master_addr}:{master_port}"
        self._config = config
        self._total_training_steps = total_training_steps
        self._with_ref = with_ref
        self._device_type = device
        self._device = torch.device("cpu")
        self._engine: TrainEngine | None = None
        self._ref: TrainEngine | None = None

    def init_model(self) -> None:
        """Join the other ranks and load the models.

        Raises:
            ValueError: the checkpoint does not fit the model, or a setting is unknown.
        """
        actor = self._config.actor
        self._policy_loss = get_policy_loss_fn(actor.policy_loss.loss_mode)
        self._train_limits = micro_batching(
            actor.use_dynamic_bsz, actor.ppo_micro_batch_size_per_gpu, actor.ppo_max_token_len_per_gpu
        )
        self._device = _own_device(self._device_type, self.rank)
        mesh = self._join()
        self._engine = self._make_engine(actor.fsdp_config, mesh, optim_config=actor.optim)
        if self._with_ref:
            self._ref = self._make_engine(self._config.ref.fsdp_config, mesh, optim_config=None)

    def _join(self) -> DeviceMesh:
        if not dist.is_initialized():
            dist.init_process_group(
                dist_backend(self._device_type),
                init_method=self._rendezvous,
                rank=self.rank,
                world_size=self.world_size,
                timeout=_COLLECTIVE_TIMEOUT,
            )
        return init_device_mesh(self._device_type, (self.world_size,))

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
    def engine(self) -> TrainEngine:
        """The engine of the policy."""
        if self._engine is None:
            raise RuntimeError("ActorWorker: call init_model() first")
        return self._engine

    def compute_log_prob(self, data: DataProto) -> DataProto:
        """`old_log_probs` and `entropys` [B, T] float32 under the present policy, 0 where response_mask is 0.

        Args:
            data: input_ids, attention_mask [B, P+T], responses, response_mask [B, T]; meta_info `temperature`.
        """
        limits = self._log_prob_limits(self._config.rollout)
        log_probs, entropy = self.engine.log_probs(data, limits, calculate_entropy=True)
        return DataProto.from_dict(tensors={"old_log_probs": log_probs, "entropys": entropy})

    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """`ref_log_prob` [B, T] float32 under the reference policy; `data` as in `compute_log_prob`."""
        if self._ref is None:
            raise RuntimeError("ActorWorker: there is no reference policy; construct it with with_ref=True")
        log_probs, _ = self._ref.log_probs(data, self._log_prob_limits(self._config.ref), calculate_entropy=False)
        return DataProto.from_dict(tensors={"ref_log_prob": log_probs})

    def _log_prob_limits(self, section: Any) -> MicroBatching:
        """A section's own limits, the actor's where it leaves them open."""
        actor = self._config.actor

        def own(value: Any, other: Any) -> Any:
            return other if value is None else value

        return micro_batching(
            own(section.log_prob_use_dynamic_bsz, actor.use_dynamic_bsz),
            own(section.log_prob_micro_batch_size_per_gpu, actor.ppo_micro_batch_size_per_gpu),
            own(section.log_prob_max_token_len_per_gpu, actor.ppo_max_token_len_per_gpu),
        )

    def update_actor(self, mini_batches: list[DataProto]) -> dict[str, float]:
        """Train on this rank's share of each mini-batch, `ppo_epochs` times over, one optimizer step each.

        Args:
            mini_batches: as `verl.workers.engine.batching.split_mini_batches` makes them.

        Returns:
            `actor/*` metrics, means over the optimizer steps; equal on all ranks.

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; raised on all ranks before the optimizer step.
        """
        actor = self._config.actor
        history: list[dict[str, float]] = []
        for _ in range(actor.ppo_epochs):
            for mini_batch in mini_batches:
                objective = PolicyObjective(self._policy_loss, actor, mini_batch.meta_info)
                metrics = self.engine.forward_backward(
                    mini_batch, objective, self._train_limits, entropy_grad=actor.entropy_coeff != 0
                )
                metrics["actor/loss"] = metrics.pop("loss")
                step = self.engine.optimizer_step()
                metrics["actor/grad_norm"], metrics["actor/lr"] = step["grad_norm"], step["lr"]
                history.append(metrics)
        self.engine.schedule_step()
        means = {name: sum(metrics[name] for metrics in history) / len(history) for name in history[0]}
        if actor.use_kl_loss:
            means["actor/kl_coef"] = actor.kl_loss_coef
        means["actor/perf/max_memory_allocated_gb"] = self._peak_memory_gb()
        return means

    def _peak_memory_gb(self) -> float:
        """GiB at the peak, of the rank that needed most: allocated on an accelerator, resident on a CPU."""
        if self._device.type == "cpu":
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        else:
            peak = torch.get_device_module(self._device).max_memory_allocated(self._device)
        worst = torch.tensor(peak / 2**30, dtype=torch.float32, device=self._device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst.item()

    def export_weights(
        self, *, dtype: torch.dtype | None = None, encoder: RowEncoder | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's weights under checkpoint names; see `TrainEngine.export_weights`."""
        return self.engine.export_weights(dtype=dtype, encoder=encoder)

    def save_checkpoint(self, path: str | Path) -> None:
        """Write what `actor.checkpoint.save_contents` names into `path`, `hf_model` into `path/huggingface`."""
        wanted = list(self._config.actor.checkpoint.save_contents)
        self.engine.save(path, [part for part in wanted if part != "hf_model"])
        if "hf_model" in wanted:
            self.engine.export_hf(Path(path) / "huggingface")

    def load_checkpoint(self, path: str | Path) -> None:
        """Read what `actor.checkpoint.load_contents` names."""
        wanted = self._config.actor.checkpoint.load_contents
        self.engine.load(path, [part for part in wanted if part != "hf_model"])

    def export_hf(self, path: str | Path) -> None:
        """Write the policy as a Hugging Face directory."""
        self.engine.export_hf(path)

    def close(self) -> None:
        """Leave the group of ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()


def micro_batching(use_dynamic_bsz: bool, micro_batch_size: int | None, max_token_len: int | None) -> MicroBatching:
    """The limits that a section's three keys stand for."""
    return MicroBatching(max_tokens=max_token_len) if use_dynamic_bsz else MicroBatching(size=micro_batch_size)


def _own_device(device: str, rank: int) -> torch.device:
    """This rank's device; where a process sees several of them, they are dealt out by rank."""
    if device == "cpu":
        return torch_device("cpu")
    module = torch.get_device_module(torch_device(device))
    own = torch_device(device, rank % module.device_count())
    module.set_device(own)
    return own
