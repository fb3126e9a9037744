"""What a check may rely on: a run that starts here at once, or one that is planned for other hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GB = 10**9
# By device and model: published memory of one device, in bytes. docs/performance.md has the sources for Ascend 950.
_MEMORY = {
    "cpu": None,
    "cuda:a100": 80 * GB,
    "cuda:h100": 80 * GB,
    "cuda:h200": 141 * GB,
    "npu:ascend950dt": 144 * GB,
    "npu:ascend950pr": 128 * GB,
    # The smaller of the two: what fits there fits both.
    "npu:ascend950": 128 * GB,
}
HARDWARE = tuple(_MEMORY)


@dataclass(frozen=True)
class Hardware:
    """Hardware that is not here.

    Attributes:
        name: one of `HARDWARE`.
        nodes: hosts, None for as many as the config asks for.
    """

    name: str
    nodes: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _MEMORY:
            raise ValueError(f"--device {self.name}: use one of {', '.join(HARDWARE)}")
        if self.nodes is not None and self.nodes < 1:
            raise ValueError(f"--nodes {self.nodes}: give 1 or more")

    @property
    def device(self) -> str:
        """`cpu`, `cuda` or `npu`."""
        return self.name.partition(":")[0]

    @property
    def memory_bytes(self) -> int | None:
        """Of one device; None for a CPU, whose memory is the host's."""
        return _MEMORY[self.name]


@dataclass(frozen=True)
class Scope:
    """What a check may rely on.

    Attributes:
        starting: the run starts here, in this process: torch may be imported, the model has to have its weights. Else
            neither is needed, and data files are read for what a run would only meet on its way.
        hardware: where the run is to be; None for this machine.
        environment: variables that a run elsewhere would have, as far as they are known.
        without_files: the model and the data may be elsewhere; what is not here is a warning.
    """

    starting: bool = True
    hardware: Hardware | None = None
    without_files: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
