"""`torch.npu`: one device that claims to be an Ascend 950 and is the CPU."""

import contextlib
import types

import torch

_SOC_ASCEND950 = 260


def is_available() -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device) -> None:
    """Do nothing: there is only one."""


def get_soc_version() -> int:
    return _SOC_ASCEND950


def get_device_name(device=None) -> str:
    return "Ascend950 (stand-in)"


def get_device_properties(device=None):
    return types.SimpleNamespace(
        name=get_device_name(), total_memory=mem_get_info()[1], cube_core_num=32, vector_core_num=64
    )


def mem_get_info(device=None) -> tuple[int, int]:
    """Return free and total bytes."""
    return 8 * 2**30, 8 * 2**30


def empty_cache() -> None:
    """Do nothing: there is no cache."""


def synchronize(device=None) -> None:
    """Do nothing: every operation is complete when its call returns."""


def memory_allocated(device=None) -> int:
    return 0


def memory_reserved(device=None) -> int:
    return 0


def max_memory_allocated(device=None) -> int:
    return 0


def memory_stats(device=None) -> dict:
    return {}


def reset_peak_memory_stats(device=None) -> None:
    """Do nothing: no statistics are kept."""


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    torch.manual_seed(seed)


def set_compile_mode(**_) -> None:
    """Do nothing: nothing is compiled."""


def is_current_stream_capturing() -> bool:
    return False


class Stream:
    """A stream without effect: operations run at once."""

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self) -> None:
        pass


class Event:
    """An event that has always occurred."""

    def __init__(self, *_, **__):
        pass

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


ExternalEvent = Event


class NPUGraph:
    """Not supported."""

    def __init__(self):
        raise NotImplementedError("the stand-in does not support graphs")


_stream = Stream()


def current_stream(device=None) -> Stream:
    return _stream


def default_stream(device=None) -> Stream:
    return _stream


def set_stream(stream) -> None:
    """Do nothing: there is only one."""


def stream(stream=None):
    return contextlib.nullcontext()


def device(device=None):
    return contextlib.nullcontext()


config = types.SimpleNamespace(allow_internal_format=False)
memory = types.SimpleNamespace(NPUPluggableAllocator=object, MemPool=object, memory_snapshot=list)
