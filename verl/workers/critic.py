"""The critic: the value model of PPO, in the same process as the actor of a trainer rank.

Every method except the constructor is collective: all ranks call it in the same order, each with its shard of the data.
"""

from __future__ import annotations

from pathlib import Path

import torch

from verl.algorithms.losses import agg_loss, compute_value_loss
from verl.config import CriticConfig
from verl.config.sequence_parallel import critic_sequence_parallel
from verl.protocol import DataProto
from verl.utils.dtypes import choose_dtype
from verl.workers.engine.base import ValueEngine
from verl.workers.engine.fsdp import FSDPValueEngine
from verl.workers.engine.micro_batch import MicroBatching, micro_batching
from verl.workers.process_group import join_process_group, memory_metrics, select_device
from verl.workers.update_loop import loss_denominators, run_updates


def forward_limits(config: CriticConfig) -> MicroBatching:
    """Return the micro-batch limit of the forward pass that computes values."""
    return micro_batching(
        bool(config.use_dynamic_bsz),
        config.forward_micro_batch_size_per_gpu,
        config.forward_max_token_len_per_gpu,
        critic_sequence_parallel(config),
    )


class CriticWorker:
    """One rank of the critic.

    Args:
        rank, world_size: this rank, and the number of ranks.
        master_addr, master_port: address where rank 0 listens; not used if this process has already joined the group.
        config: the `critic` section, completed by `verl.config.critic.resolve_critic`.
        total_training_steps: length of the learning-rate schedule.
        max_model_len: limit of a sequence in tokens, the same as in the rollout engine.
        device: "cpu", "cuda" or "npu".
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        config: CriticConfig,
        *,
        total_training_steps: int,
        max_model_len: int,
        device: str,
    ):
        self.rank = rank
        self.world_size = world_size
        self._master = (master_addr, master_port)
        self._config = config
        self._total_training_steps = total_training_steps
        self._max_model_len = max_model_len
        self._device_type = device
        self._engine: ValueEngine | None = None

    def init_model(self) -> None:
        """Join the process group and load the model.

        Raises:
            ValueError: the checkpoint does not match the model, or a setting is unknown or missing.
        """
        config = self._config
        sequence_parallel = critic_sequence_parallel(config)
        self._train_limits = micro_batching(
            bool(config.use_dynamic_bsz),
            config.ppo_micro_batch_size_per_gpu,
            config.ppo_max_token_len_per_gpu,
            sequence_parallel,
        )
        self._forward_limits = forward_limits(config)
        device = self._device = select_device(self._device_type, self.rank)
        self._engine = FSDPValueEngine(
            config.model,
            config.fsdp,
            mesh=join_process_group(self._device_type, self.rank, self.world_size, *self._master),
            device=device,
            compute_dtype=choose_dtype(self._device_type, config.fsdp.compute_dtype).name,
            max_model_len=self._max_model_len,
            optim_config=config.optim,
            total_training_steps=self._total_training_steps,
            sequence_parallel=sequence_parallel,
        )

    @property
    def engine(self) -> ValueEngine:
        """Engine of the value model."""
        if self._engine is None:
            raise RuntimeError("CriticWorker: call init_model() first")
        return self._engine

    def compute_values(self, data: DataProto) -> DataProto:
        """Return `values` [B, T] float32: at each response token, the value of the state in which it was chosen.

        They are 0 where response_mask is 0.

        Args:
            data: input_ids, attention_mask [B, P+T], responses, response_mask [B, T].
        """
        return DataProto.from_dict(tensors={"values": self.engine.values(data, self._forward_limits)})

    def update_critic(self, mini_batches: list[DataProto]) -> dict[str, float]:
        """Train on this rank's share of each mini-batch: `ppo_epochs` epochs, one optimizer step per mini-batch.

        Args:
            mini_batches: result of `verl.trainer.ppo.batching.split_mini_batches`, with `values` and `returns`.

        Returns:
            `critic/{vf_loss,vf_clipfrac,vpred_mean,grad_norm,lr,perf/padding_fraction}`, averaged over the optimizer
            steps, and `memory_metrics`; equal on all ranks.

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; raised on all ranks before the optimizer step.
        """

        def forward_backward(epoch: int, number: int, mini_batch: DataProto) -> dict[str, float]:
            objective = ValueObjective(self._config, mini_batch)
            return self.engine.forward_backward(mini_batch, objective, self._train_limits)

        epochs = self._config.ppo_epochs or 1
        metrics = run_updates(
            self.engine, mini_batches, forward_backward, epochs=epochs, prefix="critic", loss_name="critic/vf_loss"
        )
        return metrics | memory_metrics("critic", self._device)

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the resumable parts in `critic.checkpoint.save_contents` into `path`."""
        self.engine.save(path, self._config.checkpoint.saved_parts)

    def load_checkpoint(self, path: str | Path) -> None:
        """Read the parts in `critic.checkpoint.load_contents`."""
        self.engine.load(path, self._config.checkpoint.loaded_parts)

    def export_hf(self, path: str | Path) -> None:
        """Write the critic as the Hugging Face directory `path` if `save_contents` has `hf_model`."""
        if self._config.checkpoint.saves_hf_model:
            self.engine.export_hf(path, self._config.checkpoint.hf_dtype)


class ValueObjective:
    """The value loss of one micro-batch, divided by the denominators of its mini-batch."""

    def __init__(self, config: CriticConfig, mini_batch: DataProto):
        self._config = config
        self._denominators = loss_denominators(mini_batch.meta_info)

    def __call__(
        self, values: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask = columns["response_mask"]
        loss, clipped = compute_value_loss(
            vpreds=values,
            returns=columns["returns"],
            values=columns["values"],
            response_mask=mask,
            cliprange_value=self._config.cliprange_value,
            loss_agg_mode=self._config.loss_agg_mode or "token-mean",
            **self._denominators,
        )
        mean = agg_loss(values.detach(), mask, "token-mean", **self._denominators)
        return loss, {"critic/vf_clipfrac": clipped, "critic/vpred_mean": mean}
