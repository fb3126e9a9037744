"""The target of a check: a run that starts now on this machine, or a run that is planned for other hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from verl.utils.byte_size import GB, GIB

# Memory of one device in bytes, by device and model; None: the host's memory. GPUs: the whole GiB of the total that
# CUDA reports, which is more than the GB in their names (80 GiB of HBM, 79.1 of them usable). docs/performance.md gives
# the sources for Ascend 950.
_MEMORY = {
    "cpu": None,
    "cuda:a100": 79 * GIB,
    "cuda:h100": 79 * GIB,
    "cuda:h200": 139 * GIB,
    "npu:ascend950dt": 144 * GB,
    "npu:ascend950pr": 128 * GB,
    # The smaller one of the two models, so that a plan that fits here fits both.
    "npu:ascend950": 128 * GB,
}
HARDWARE = tuple(_MEMORY)


@dataclass(frozen=True)
class Hardware:
    """Hardware other than this machine.

    Attributes:
        name: one of `HARDWARE`.
        nodes: number of hosts; None for the number that the config needs.

    Raises:
        ValueError: the name is unknown, or `nodes` is below 1.
    """

    name: str
    nodes: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _MEMORY:
            raise ValueError(f"--device {self.name}: unknown device; use one of {', '.join(HARDWARE)}")
        if self.nodes is not None and self.nodes < 1:
            raise ValueError(f"--nodes {self.nodes}: must be at least 1")

    @property
    def device(self) -> str:
        """`cpu`, `cuda` or `npu`."""
        return self.name.partition(":")[0]

    @property
    def memory_bytes(self) -> int | None:
        """Memory of one device; None for a CPU, which uses the host's memory."""
        return _MEMORY[self.name]


@dataclass(frozen=True)
class Target:
    """The run that a config is checked for, and the resources that the check may use.

    Attributes:
        starting: True: the run starts now in this process, so the check may import torch, and the model needs its
            weights. False: neither is needed, and the check also reads the rows of the data files.
        hardware: hardware that the run is planned for; None for this machine.
        without_files: model and data may be on another machine, so that missing files are warnings.
        environment: environment variables of a planned run, as far as they are known.
    """

    starting: bool = True
    hardware: Hardware | None = None
    without_files: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
