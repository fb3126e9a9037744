import overhead
import pytest


def event(name: str, category: str, start: float, seconds: float, **args) -> dict:
    return {"ph": "X", "name": name, "cat": category, "ts": start * 1e6, "dur": seconds * 1e6, "pid": 1, "args": args}


def test_overhead_is_the_time_without_computation():
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "driver"}},
        event("step", "stage", 10, 10, step=1),
        event("gen", "stage", 10, 4),
        event("forward", "engine", 11, 2),
        event("forward", "engine", 12, 1.5),  # overlaps the one before from 12 to 13
        event("update_actor", "stage", 15, 3),
        event("forward", "train", 15, 1),
        event("backward", "train", 16, 2),
        event("forward", "engine", 19, 0.5),  # in no stage
        event("step", "stage", 20, 5, step=2),
        event("gen", "stage", 20, 5),
    ]
    shares = overhead.overhead_by_stage(events)
    # Overhead in step 1 of ten seconds: gen 10 to 11 and 13.5 to 14; between stages 14 to 15, 18 to 19, 19.5 to 20.
    assert shares[1] == pytest.approx({"gen": 0.15, "update_actor": 0.0, "between": 0.25})
    assert shares[2] == pytest.approx({"gen": 1.0, "between": 0.0})
