"""A group of neighboring ranks that share the work on their samples."""

from __future__ import annotations

import torch.distributed as dist


class RankGroup:
    """The ranks that share work with this rank.

    Args:
        group: their process group; None if this rank shares nothing.

    Attributes:
        size: number of ranks.
        rank: this rank's number among them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
