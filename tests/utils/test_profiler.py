"""Profiles of a rank: files, their names, and the stages inside."""

import gzip
import json
import pickle
from types import SimpleNamespace

import pytest
import torch

from verl.config.profiles import TrainerProfiles
from verl.utils import profiler
from verl.utils.profiler import install_profiler, profile_mark, profiled, start_profile, stop_profile


@pytest.fixture(autouse=True)
def no_profiler_remains():
    yield
    install_profiler(None, 0, 1, "cpu")


@profiled("actor_update", "actor")
def update(factor):
    for number in range(2):
        with profile_mark(f"mini_batch{number}"):
            torch.ones(4) @ torch.ones(4)
    return factor * 2


@profiled("ref_compute_log_prob", "ref")
def log_probs():
    return torch.ones(3).exp()


def train(steps, *, last=None):
    """Run steps 1 to 4 and profile each of `steps`, or all of them together up to `last`."""
    for step in range(1, 5):
        if step in steps:
            start_profile(step, last or step)
        log_probs()
        assert update(3) == 6
        if step == last or (last is None and step in steps):
            stop_profile()


def names(path):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event.get("cat") == "user_annotation"}


def operators(path):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event.get("cat") == "cpu_op"}


def stems(directory):
    return sorted(path.name.partition("_pid")[0] for path in directory.iterdir())


def test_profiled_ranks_write_one_trace_for_each_profiled_step(tmp_path):
    settings = TrainerProfiles("torch", str(tmp_path / "p"), {"actor": frozenset({1}), "ref": frozenset({1, 2})})
    for rank in range(4):
        install_profiler(settings, rank, 4, "cpu")
        train([2, 4])
    expected = [f"train_step{step}_rank{rank}-of-4" for step in (2, 4) for rank in (1, 2)]
    assert stems(tmp_path / "p") == expected
    for path in (tmp_path / "p").iterdir():
        assert names(path) == {"actor_update", "ref_compute_log_prob", "mini_batch0", "mini_batch1"}
        assert {"aten::exp", "aten::dot"} <= operators(path)


def test_steps_that_follow_each_other_share_a_trace(tmp_path):
    install_profiler(TrainerProfiles("torch", str(tmp_path), {"actor": frozenset({0})}), 0, 1, "cpu")
    train([2], last=3)
    (path,) = tmp_path.iterdir()
    assert stems(tmp_path) == ["train_step2-3_rank0-of-1"]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event["name"] == "actor_update" and event.get("cat") == "user_annotation" for event in events) == 2


def test_discrete_traces_hold_one_call_of_a_profiled_role(tmp_path):
    settings = TrainerProfiles("torch", str(tmp_path), {"ref": frozenset({0})}, discrete=True)
    install_profiler(settings, 0, 1, "cpu")
    train([3])
    start_profile(4, 4)
    log_probs(), log_probs()
    stop_profile()
    assert stems(tmp_path) == [
        "ref_compute_log_prob_step3_call1_rank0-of-1",
        "ref_compute_log_prob_step4_call1_rank0-of-1",
        "ref_compute_log_prob_step4_call2_rank0-of-1",
    ]
    assert all(names(path) == {"ref_compute_log_prob"} for path in tmp_path.iterdir())


def test_a_failed_stage_ends_its_trace(tmp_path):
    @profiled("actor_update", "actor")
    def fail():
        raise ValueError("bad batch")

    settings = TrainerProfiles("torch", str(tmp_path), {"actor": frozenset({0})}, discrete=True)
    install_profiler(settings, 0, 1, "cpu")
    start_profile(1, 1)
    with pytest.raises(ValueError, match="bad batch"):
        fail()
    update(1)  # torch allows one profile at a time
    assert len(stems(tmp_path)) == 2


def test_contents_choose_the_recorded_data(tmp_path):
    for contents in ((), ("shapes", "stack")):
        directory = tmp_path / "-".join(["c", *contents])
        settings = TrainerProfiles("torch", str(directory), {"actor": frozenset({0})}, contents)
        install_profiler(settings, 0, 1, "cpu")
        train([1])
        (path,) = directory.iterdir()
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        dot = next(event for event in events if event["name"] == "aten::dot")
        assert ("Input Dims" in dot.get("args", {})) == bool(contents)
        assert any(event.get("cat") == "python_function" for event in events) == bool(contents)


def test_the_npu_profiler_gets_its_settings(tmp_path, monkeypatch):
    """The stand-in has the signatures of torch_npu 2.7.1."""
    log = []

    class Profile:
        def __init__(
            self,
            *,
            activities,
            record_shapes,
            profile_memory,
            with_stack,
            with_modules,
            on_trace_ready,
            experimental_config,
        ):
            flags = (record_shapes, profile_memory, with_stack, with_modules)
            log.append((activities, flags, on_trace_ready, experimental_config))

        def start(self):
            log.append("start")

        def stop(self):
            log.append("stop")

    def handler(dir_name=None, worker_name=None, analyse_flag=True, async_mode=False):
        return dir_name, worker_name, analyse_flag

    def experimental_config(*, profiler_level, export_type, msprof_tx):
        return profiler_level, export_type, msprof_tx

    module = SimpleNamespace(
        profiler=SimpleNamespace(
            profile=Profile,
            tensorboard_trace_handler=handler,
            _ExperimentalConfig=experimental_config,
            ProfilerActivity=SimpleNamespace(CPU="cpu", NPU="npu"),
            ProfilerLevel=SimpleNamespace(Level_none=-1, Level0=0, Level1=1, Level2=2),
            ExportType=SimpleNamespace(Db="db"),
        ),
        npu=SimpleNamespace(
            mstx=SimpleNamespace(
                range_start=lambda message: log.append(message) or len(log), range_end=lambda range_id: None
            )
        ),
    )
    monkeypatch.setitem(__import__("sys").modules, "torch_npu", module)
    settings = TrainerProfiles(
        "npu", str(tmp_path), {"actor": frozenset({0})}, ("npu", "module"), level="level1", analysis=False
    )
    install_profiler(settings, 0, 8, "npu")
    train([2])
    made = (["cpu", "npu"], (False, False, False, True), (str(tmp_path), "train_step2_rank0-of-8", False))
    assert log == [
        (*made, (1, "db", True)),
        "start",
        "ref_compute_log_prob",
        "actor_update",
        "mini_batch0",
        "mini_batch1",
        "stop",
    ]


def test_a_memory_snapshot_is_complete_and_starts_a_new_history(tmp_path, monkeypatch):
    calls = []
    memory = SimpleNamespace(
        _record_memory_history=lambda **keywords: calls.append(keywords), _snapshot=lambda: {"segments": [1]}
    )
    monkeypatch.setattr(profiler.torch, "get_device_module", lambda device: SimpleNamespace(memory=memory))
    install_profiler(
        TrainerProfiles("torch_memory", str(tmp_path), {"actor": frozenset({0})}, max_entries=7), 0, 1, "cuda"
    )
    assert calls == [{"max_entries": 7}]
    train([2])
    (path,) = tmp_path.iterdir()
    assert stems(tmp_path) == ["train_step2_rank0-of-1"] and pickle.loads(path.read_bytes()) == {"segments": [1]}
    assert calls[1:] == [{"enabled": None}, {"max_entries": 7}]
