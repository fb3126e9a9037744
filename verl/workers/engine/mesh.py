"""The device meshes of a model: its ranks, those that hold one copy of its weights, and those that share samples."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from verl.utils.sequence_ranks import SequenceRanks
from verl.utils.tensor_ranks import TensorRanks
from verl.workers.engine.tensor_parallel import DATA, TENSOR, TensorParallel

REPLICATE, SHARD = "replicate", "shard"


@dataclass(frozen=True)
class EngineMesh:
    """The meshes of one model.

    Attributes:
        ranks: one-dimensional mesh of all ranks.
        weights: mesh of the parameters, over the same ranks: `ranks`, over which they are sharded, or with hybrid
            sharding two-dimensional, [copies, shards]. Neighboring ranks hold one copy.
        sequence: the neighboring ranks that share the sequences of this rank. Batches are split over these groups.
        tensor: the divided layers of the model, whose groups of ranks are neighbors too, and batches are split over
            them; None if each rank computes whole layers.
    """

    ranks: DeviceMesh
    weights: DeviceMesh
    sequence: SequenceRanks
    tensor: TensorParallel | None = None

    @property
    def layers(self) -> DeviceMesh:
        """The mesh of the parameters of the decoder layers."""
        return self.weights if self.tensor is None else self.tensor.grid[DATA]

    @property
    def counts_samples(self) -> bool:
        """True on the first of the ranks that share samples, which counts them."""
        return self.sequence.rank == 0 and (self.tensor is None or self.tensor.ranks.rank == 0)

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks: they run the same number of micro-batches, and sum losses and metrics."""
        return self.ranks.get_group()

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks that hold one copy of the weights: sums over parameters, such as a norm, are taken over these."""
        return self.ranks.get_group() if self.weights.ndim == 1 else self.weights.get_group(SHARD)


def make_mesh(ranks: DeviceMesh, fsdp_size: int, sequence_parallel: int = 1, tensor_parallel: int = 1) -> EngineMesh:
    """Return the meshes of a model. Collective.

    Args:
        ranks: one-dimensional mesh of all ranks.
        fsdp_size: ranks that hold one copy of the weights; negative, or at least all ranks: one copy over all ranks.
        sequence_parallel: ranks that share sequences.
        tensor_parallel: ranks that share layers.

    Raises:
        ValueError: a size does not divide the number of ranks, or layers are shared together with another size.
    """
    total, sequence = ranks.size(), _sequence_ranks(ranks, sequence_parallel)
    if tensor_parallel > 1:
        if sequence_parallel > 1 or 0 <= fsdp_size < total:
            raise ValueError(
                f"fsdp_config.tensor_parallel_size={tensor_parallel}: not supported with fsdp_size={fsdp_size} and "
                f"ulysses_sequence_parallel_size={sequence_parallel}; use fsdp_size=-1 and "
                "ulysses_sequence_parallel_size=1"
            )
        grid = _tensor_grid(ranks, tensor_parallel)
        return EngineMesh(ranks, ranks, sequence, TensorParallel(TensorRanks(grid.get_group(TENSOR)), grid))
    if fsdp_size < 0 or fsdp_size >= total:
        return EngineMesh(ranks, ranks, sequence)
    if fsdp_size == 0 or total % fsdp_size:
        raise ValueError(f"fsdp_config.fsdp_size={fsdp_size}: must divide the {total} ranks of the trainer; use -1")
    copies = DeviceMesh(ranks.device_type, ranks.mesh.view(-1, fsdp_size), mesh_dim_names=(REPLICATE, SHARD))
    return EngineMesh(ranks, copies, sequence)


@functools.cache  # one group for actor, reference model and critic, because each one takes memory on a device
def _sequence_ranks(ranks: DeviceMesh, size: int) -> SequenceRanks:
    if size == 1:
        return SequenceRanks()
    if ranks.size() % size:
        raise ValueError(f"ulysses_sequence_parallel_size={size}: must divide the {ranks.size()} ranks of the trainer")
    groups = DeviceMesh(ranks.device_type, ranks.mesh.view(-1, size), mesh_dim_names=("data", "sequence"))
    return SequenceRanks(groups.get_group("sequence"))


@functools.cache
def _tensor_grid(ranks: DeviceMesh, size: int) -> DeviceMesh:
    """Return the [tensor, data] mesh, in which neighboring ranks share layers."""
    if ranks.size() % size:
        raise ValueError(
            f"fsdp_config.tensor_parallel_size={size}: must divide the {ranks.size()} ranks of the trainer; use 1"
        )
    return DeviceMesh(ranks.device_type, ranks.mesh.view(-1, size).T.contiguous(), mesh_dim_names=(TENSOR, DATA))
