"""Directories of runs, written by hand in the form that training leaves them."""

import json
from pathlib import Path

import pytest
import yaml

LAYERS = ("model.layers.0.self_attn.v_proj.weight", "model.layers.3.mlp.down_proj.weight")
CONFIG = {
    "data": {"max_response_length": 64, "train_batch_size": 8},
    "actor_rollout_ref": {"model": {"path": "/models/tiny/model"}, "rollout": {"quantization": "ascend"}},
    "algorithm": {"adv_estimator": "grpo"},
    "trainer": {"project_name": "p", "experiment_name": "e", "total_training_steps": 20},
}
CHANGES = {"data.train_batch_size": {"value": 8, "default": 1024}}


def metrics_of(step: int, level: float = 0.0) -> dict:
    data = {
        "critic/score/mean": 0.2 + 0.03 * step + level,
        "critic/rewards/mean": 0.2 + 0.03 * step + level,
        "response_length/mean": 30.0 - step,
        "response_length/max": 64.0,
        "response_length/clip_ratio": 0.25 / step,
        "actor/entropy": 2.0 / step,
        "actor/ppo_kl": 0.01,
        "actor/grad_norm": 1.5 - 0.01 * step,
        "actor/pg_clipfrac": 0.1,
        "actor/lr": 1e-6,
        "actor/perf/max_memory_allocated_gb": 3.5,
        "training/rollout_probs_diff_mean": 1e-3,
        "training/rollout_probs_diff_max": 0.3,
        "training/versions_behind/max": 0.0,
        "rollout_corr/k3_kl": 2e-4 * step,
        "rollout_corr/rollout_is_eff_sample_size": 0.97,
        "weight_update/max_quantization_error": 0.032 + 1e-4 * step,
        "weight_update/max_quantization_error_layer": LAYERS[step == 7],
        "weight_update/quantization_errors": {
            "self_attn.q_proj": [0.0301, 0.0302, 0.0299, 0.0303, 0.03, 0.0301],
            "self_attn.v_proj": [0.032 + 1e-4 * step, 0.0298, 0.0301, 0.0302, None, 0.0304, 0.0303],
            "mlp.down_proj": [0.0312, 0.0308, 0.0315, 0.0327, 0.0311, 0.0312],
            "lm_head": [0.03],
        },
        "timing_s/gen": 1.0,
        "timing_s/update_actor": 2.0,
        "timing_s/step": 3.5,
        "perf/throughput": 4321.0,
    }
    if step % 10 == 0:
        data["val-core/gym/spell/acc/mean@4"] = 0.04 * step
        data["val-aux/gym/spell/reward/mean@4"] = 0.045 * step
    return data


def timeline_events(step: int) -> list[dict]:
    def span(pid, category, name, begin, end, **args):
        times = {"ts": begin * 1e6, "dur": (end - begin) * 1e6}
        return {"ph": "X", "pid": pid, "tid": 1, "cat": category, "name": name, "args": args, **times}

    names = {1: "driver", 2: "replica 0", 3: "replica 0 worker 0", 4: "trainer rank 0", 5: "reward worker 0"}
    request = {**span(2, "request", "request", 0.1, 0.1), "id": "2.1"}
    return [
        *({"ph": "M", "pid": pid, "name": "process_name", "ts": 0, "args": {"name": names[pid]}} for pid in names),
        span(1, "stage", "gen", 0, 1),
        {**request, "ph": "b"},
        {**request, "ph": "e", "ts": 0.9e6},
        span(3, "engine", "forward", 0.2, 0.8),
        span(5, "call", "score", 0.8, 0.95),
        span(1, "stage", "update_actor", 1, 3),
        span(4, "train", "forward", 1.1, 1.6),
        span(4, "train", "backward", 1.6, 2.8),
        span(1, "stage", "update_weights", 3, 3.4),
        span(3, "call", "update: load a bucket", 3.1, 3.3),
        span(1, "stage", "step", 0, 3.5, step=step),
    ]  # fmt: skip


def samples_of(step: int) -> list[dict]:
    return [
        {"input": f"prompt {i // 2}", "output": f"answer {i}", "gts": "42", "score": i / 10, "step": step, "acc": i % 2}
        for i in range(12)
    ]


@pytest.fixture(scope="session")
def write_run():
    """`write_run(directory, steps=20, ...)` writes a run and returns its directory."""

    def write(
        directory: Path, steps: int = 20, level: float = 0.0, config: dict | None = CONFIG, samples=samples_of
    ) -> Path:
        (directory / "validation").mkdir(parents=True)
        (directory / "rollouts").mkdir()
        lines = [{"step": step, "data": metrics_of(step, level)} for step in range(1, steps + 1)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for kind in ("validation", "rollouts"):
            rows = "".join(json.dumps(row) + "\n" for row in samples(steps))
            (directory / kind / f"{steps}.jsonl").write_text(rows)
        events = "".join(json.dumps(event) + ",\n" for event in timeline_events(steps))
        (directory / "timeline.json").write_text("[\n" + events)
        if config is not None:
            (directory / "config.yaml").write_text(yaml.safe_dump(config))
            (directory / "config_changes.yaml").write_text(yaml.safe_dump(CHANGES))
        return directory

    return write


@pytest.fixture
def make_run(tmp_path, write_run):
    """`make_run("name", ...)` writes a run into the temporary directory of the test."""
    return lambda name, **given: write_run(tmp_path / name, **given)
