"""The process of one trainer rank: actor, optional critic, and the sender of weight updates."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from verl.config import ActorRolloutRefConfig, CriticConfig
from verl.config.distillation import DistillationLossConfig
from verl.config.rollout_correction import Correction
from verl.config.weight_updates import full_update_reason
from verl.protocol import DataProto
from verl.timeline.spans import Timeline, join_timeline, span, spanned
from verl.utils.checkpoint_files import write_manifest_part
from verl.utils.heap import freeze_heap
from verl.utils.heartbeat import send_heartbeats_from_environment
from verl.utils.network import choose_gloo_interface
from verl.utils.profiler import ProfilerSettings, install_profiler, profiled, start_profile, stop_profile
from verl.utils.quantization.encode_report import EncodeReport, EncodeReportMessage, Errors
from verl.utils.quantization_scheme import QuantizationScheme
from verl.workers.actor import ActorWorker
from verl.workers.critic import CriticWorker
from verl.workers.engine.export import ExportUnit
from verl.workers.engine.hf_directory import HF_DIRECTORY
from verl.workers.rollout.quantization import get_scheme
from verl.workers.weight_sync.block_gather import PackedBlock
from verl.workers.weight_sync.last_sent import LastSentWeights
from verl.workers.weight_sync.manifest import dtype_from_name
from verl.workers.weight_sync.messages import Bucket, RankExport
from verl.workers.weight_sync.sender import WeightSender

_MIB = 1 << 20


class TrainWorker:
    """Actor and critic of one rank; the driver calls the same methods on all ranks.

    The constructor loads nothing. Call `setup` when the address of rank 0 is known.

    Args:
        rank, world_size: this rank in the trainer's process group, and the number of ranks.
        config: the section `actor_rollout_ref`.
        device: `cpu`, `cuda` or `npu`.
        total_training_steps: length of the learning-rate schedule in training steps.
        max_model_len: limit of a sequence in tokens, the same as in the rollout engine.
        with_ref: also load the reference model.
        seed: seed of the run, from which each rank derives its own.
        rollout_dtype: name of the dtype in which weights are sent.
        critic: the section `critic`, completed by `resolve_critic`; None for a run without a critic.
        critic_warmup: number of first training steps in which only the critic is trained.
        bypass, distillation: as in `ActorWorker`.
        profiles: profiles of the trainer's ranks; None without any.
        timeline: argument of `join_timeline`.
    """

    def __init__(
        self,
        rank: int,
        *,
        world_size: int,
        config: ActorRolloutRefConfig,
        device: str,
        total_training_steps: int,
        max_model_len: int,
        with_ref: bool,
        seed: int,
        rollout_dtype: str,
        critic: CriticConfig | None = None,
        critic_warmup: int = 0,
        bypass: Correction | None = None,
        distillation: DistillationLossConfig | None = None,
        profiles: ProfilerSettings | None = None,
        timeline: Timeline | None = None,
    ):
        send_heartbeats_from_environment()
        join_timeline(timeline, f"trainer rank {rank}")
        self._rank, self._world_size, self._config, self._device = rank, world_size, config, device
        self._total_training_steps, self._with_ref, self._seed = total_training_steps, with_ref, seed
        self._max_model_len = max_model_len
        self._critic_config, self._critic_warmup, self._bypass = critic, critic_warmup, bypass
        self._distillation, self._profiles = distillation, profiles
        self._critic: CriticWorker | None = None
        self._send_dtype = dtype_from_name(rollout_dtype)
        # Tensors that the engines hold in another dtype, by checkpoint name.
        self._exceptions: dict[str, torch.dtype] = {}
        self._sender: WeightSender | None = None
        assert config.model.path is not None, "actor_rollout_ref.model.path is a required key"
        # With `quantization_side=receiver`, weights are sent unquantized.
        sends = config.rollout.quantization_side == "sender"
        self._scheme: QuantizationScheme | None = get_scheme(config.rollout, config.model.path) if sends else None
        self._last_sent = LastSentWeights(self._scheme, keeps=full_update_reason(config.rollout, device) is None)
        self._exporting = 0
        self._reserved_socket: socket.socket | None = None

    def missing_paths(self, paths: list[str]) -> list[str]:
        """Return the paths that do not exist on this host."""
        return [path for path in paths if not os.path.exists(path)]

    def reserve_port(self, address: str) -> int:
        """Return a free port of this host's `address` for rank 0, reserved until `setup`."""
        self._reserved_socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._reserved_socket.bind((address, 0))
        return self._reserved_socket.getsockname()[1]

    def setup(self, host: str, port: int, address: str) -> None:
        """Join the process group and load the models.

        Args:
            host, port: address where rank 0 listens.
            address: address of this rank's host in the network of the other ranks.
        """
        if address != "127.0.0.1":
            choose_gloo_interface(address)
        install_profiler(self._profiles, self._rank, self._world_size, self._device)
        if self._reserved_socket is not None:
            # Released as late as possible, so that no other process of the run gets the port.
            self._reserved_socket.close()
        self._actor = ActorWorker(
            self._rank,
            self._world_size,
            host,
            port,
            self._config,
            total_training_steps=max(1, self._total_training_steps - self._critic_warmup),
            max_model_len=self._max_model_len,
            with_ref=self._with_ref,
            device=self._device,
            bypass=self._bypass,
            distillation=self._distillation,
        )
        torch.manual_seed(self._seed + self._rank)
        self._actor.init_model()
        if self._critic_config is not None:
            self._critic = CriticWorker(
                self._rank,
                self._world_size,
                host,
                port,
                self._critic_config,
                total_training_steps=self._total_training_steps,
                max_model_len=self._max_model_len,
                device=self._device,
            )
            self._critic.init_model()
        freeze_heap()

    @profiled("actor_compute_log_prob", "actor")
    @spanned("compute_log_prob")
    def compute_log_prob(self, data: DataProto, extras: Sequence[str] = ()) -> DataProto:
        """Return `old_log_probs` and the `extras` of this rank's shard; see `ActorWorker.compute_log_prob`."""
        return self._actor.compute_log_prob(data, extras)

    @profiled("actor_compute_update_log_prob", "actor")
    @spanned("compute_update_log_prob")
    def compute_update_log_prob(self, data: DataProto) -> DataProto:
        """Return `old_log_probs` of this rank's shard in the mode of an update."""
        return self._actor.compute_log_prob(data, updating=True)

    @spanned("output_errors")
    def output_errors(self, data: DataProto) -> Errors:
        """Return the errors of a quantized engine by layer; see `ActorWorker.output_errors`."""
        return self._actor.output_errors(data)

    @profiled("ref_compute_log_prob", "ref")
    @spanned("compute_ref_log_prob")
    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """Return `ref_log_prob` of this rank's shard; see `ActorWorker.compute_ref_log_prob`."""
        return self._actor.compute_ref_log_prob(data)

    @profiled("actor_update", "actor")
    @spanned("update_actor")
    def update_actor(self, mini_batches: list[DataProto]) -> dict[str, float]:
        """Train the actor on this rank's share of each mini-batch; see `ActorWorker.update_actor`."""
        metrics = self._actor.update_actor(mini_batches)
        self._return_memory()
        return metrics

    @spanned("training_log_probs")
    def training_log_probs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sample indices and log-probabilities of the last update; see `ActorWorker.training_log_probs`."""
        return self._actor.training_log_probs()

    @profiled("compute_values", "critic")
    @spanned("critic: compute_values")
    def compute_values(self, data: DataProto) -> DataProto:
        """Return the critic's `values` of this rank's shard; see `CriticWorker.compute_values`."""
        return self._require_critic().compute_values(data)

    @profiled("critic_update", "critic")
    @spanned("critic: update_critic")
    def update_critic(self, mini_batches: list[DataProto]) -> dict[str, float]:
        """Train the critic on this rank's share of each mini-batch; see `CriticWorker.update_critic`."""
        metrics = self._require_critic().update_critic(mini_batches)
        self._return_memory()
        return metrics

    def save_checkpoint(self, directory: str) -> None:
        """Write the resumable states of the actor and the critic, if any, into subdirectories `actor` and `critic`."""
        with span("save_checkpoint"):
            self._actor.save_checkpoint(f"{directory}/actor")
        if self._critic is not None:
            with span("critic: save_checkpoint"):
                self._critic.save_checkpoint(f"{directory}/critic")

    def load_checkpoint(self, directory: str) -> None:
        """Read the state that `save_checkpoint` wrote."""
        with span("load_checkpoint"):
            self._actor.load_checkpoint(f"{directory}/actor")
        if self._critic is not None:
            with span("critic: load_checkpoint"):
                self._critic.load_checkpoint(f"{directory}/critic")

    @spanned("export_hf")
    def export_hf(self, directory: str) -> None:
        """Write `actor/huggingface` and `critic/huggingface` into a checkpoint, each if its `save_contents` asks."""
        self._actor.export_hf(f"{directory}/actor/{HF_DIRECTORY}")
        if self._critic is not None:
            self._critic.export_hf(f"{directory}/critic/{HF_DIRECTORY}")

    @spanned("checksum_files")
    def checksum_files(self, directory: str) -> None:
        """Flush this rank's files of a checkpoint and store their checksums; all ranks must have written theirs."""
        write_manifest_part(Path(directory), self._rank, self._world_size)

    @spanned("export_float32")
    def export_float32(self, path: str) -> None:
        """Write the actor's master weights as the Hugging Face directory `path` in float32."""
        self._actor.engine.export_hf(path, "float32")

    def start_profile(self, first_step: int, last_step: int) -> None:
        """Begin the profile of these training steps, if this rank is profiled."""
        start_profile(first_step, last_step)

    def stop_profile(self) -> None:
        """End the profile and write it."""
        stop_profile()

    def _require_critic(self) -> CriticWorker:
        assert self._critic is not None, "this run has no critic"
        return self._critic

    def check_base(self, base: int) -> None:
        """Check that this rank can send a delta against version `base`.

        Raises:
            WeightUpdateError: the weights that it sent last are not version `base`.
        """
        self._last_sent.check_base(base)

    def send_as(self, dtypes: Mapping[str, str]) -> None:
        """Send some tensors in other dtypes from the next full update on: checkpoint name -> dtype name."""
        self._exceptions |= {name: dtype_from_name(dtype) for name, dtype in dtypes.items()}

    @spanned("export: begin")
    def begin_export(self, version: int, base: int | None = None) -> None:
        """Start to send the weights as `version`; the other ranks must call `join_export` at the same time.

        Args:
            base: send a delta against this version; None for a full update.

        Raises:
            WeightUpdateError: the weights that this rank sent last are not version `base`.
        """
        if self._sender is None:
            engine = self._config.rollout.checkpoint_engine
            self._sender = WeightSender(engine.update_weights_bucket_megabytes * _MIB, engine.buckets_in_flight)
        self._exporting = version
        if base is None:
            self._sender.begin(version, self._export_full())
        else:
            self._sender.begin_delta(version, base, self._export_delta(base))

    @spanned("export: gather, encode and pack a bucket")
    def next_bucket(self) -> Bucket:
        """Fill the next bucket and return its description."""
        assert self._sender is not None, "begin_export first"
        return self._sender.next_bucket()

    @spanned("export: finish")
    def finish_export(self) -> RankExport:
        """Make the sent weights the base of the next delta. Called on every rank after the last bucket was sent.

        Returns:
            the `report` of the encoding. Rank 0 adds the `manifest` of the update, the `seconds` to gather, encode and
            pack it, and the `full_bytes` of a full update.
        """
        self._last_sent.commit(self._exporting)
        self._end_export()
        report, sender = self._pop_report(), self._sender
        if sender is None:
            return {"report": report}
        return {
            "report": report,
            "manifest": sender.manifest(),
            "seconds": sender.seconds,
            "full_bytes": sender.nbytes,
        }

    def abort_export(self) -> None:
        """Abort an export that was begun; the other ranks still take part in all of its gathers."""
        if self._sender is not None:
            self._sender.abort()
        self._end_export()

    @spanned("export: gather and encode")
    def join_export(self, version: int, base: int | None = None) -> None:
        """Take part in all gathers of the export that rank 0 started with `begin_export`."""
        self._exporting = version
        for _ in self._export_full() if base is None else self._export_delta(base):
            raise AssertionError("only rank 0 sends weights")
        self._end_export()

    def _end_export(self) -> None:
        self._actor.release()
        self._return_memory()

    def _return_memory(self) -> None:
        """Return memory that torch keeps for reuse to the device, if a replica needs it next."""
        if self._device != "cpu" and self._config.rollout.nnodes == 0:
            torch.get_device_module(self._device).empty_cache()

    def _pop_report(self) -> EncodeReportMessage:
        return EncodeReport().to_message() if self._scheme is None else self._scheme.pop_report().to_message()

    def _export_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._last_sent.export_full(self._units())

    def _export_delta(self, base: int) -> Iterator[PackedBlock | None]:
        self._last_sent.check_base(base)
        return self._last_sent.export_delta(self._units(), torch.device(self._device))

    def _units(self) -> Iterator[ExportUnit]:
        self._pop_report()  # drop the report of an update that failed
        return self._actor.export_units(dtype=self._send_dtype, exceptions=self._exceptions, encoder=self._scheme)
