"""The whole framework through its command line: Ray, vLLM, FSDP2, files."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixtures import trace_format
from fixtures.torchao import torchao_directory
from fixtures.training import TinyRun, alive, descendants, left_in_shared_memory, orphaned_shared_memory
from verl.utils.timeline_reader import read_events, stage_seconds, step_shares

pytestmark = pytest.mark.e2e


def prompts_of(directory):
    return {
        int(path.stem): [json.loads(line)["input"] for line in path.read_text().splitlines()]
        for path in directory.glob("*.jsonl")
    }


def check_timeline(path, metrics, ended=True):
    """Every process is in it, the stages are those of the log, and both sides compute for some of each step."""
    if ended:
        json.loads(path.read_text())
    events = read_events(path)
    trace_format.check(events)
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    spans = {(names[event["pid"]], event["name"]) for event in events if event["ph"] in "Xb"}
    assert {
        ("driver", "sample"),
        ("trainer rank 0", "backward"),
        ("trainer rank 0", "optimizer"),
        ("replica 0", "request"),
        ("replica 0 worker 0", "forward"),
        ("replica 0 worker 0", "update: load a bucket"),
        ("reward worker 0", "score"),
    } <= spans
    stages, shares = stage_seconds(events), step_shares(events)
    for step in metrics.keys() - {0}:
        logged = {name: value for name, value in metrics[step].items() if name.startswith("timing_s/")}
        logged.pop("timing_s/save_checkpoint", None)  # after the step
        assert {f"timing_s/{name}": value for name, value in stages[step].items()} == pytest.approx(logged, rel=0.02)
        share = shares[step]
        assert 0 < share.engine < 1 and 0 < share.train < 1 and 0 < share.overhead < 1
        assert share.engine + share.train + share.overhead == pytest.approx(1, abs=0.01)


def test_a_run_leaves_log_checkpoint_and_model_and_nothing_else(tmp_path):
    run = TinyRun(tmp_path)
    before = orphaned_shared_memory()
    text = run.run(
        trainer__val_before_train=True,
        trainer__test_freq=2,
        trainer__save_freq=2,
        trainer__rollout_data_dir=tmp_path / "dumps",
        trainer__timeline=tmp_path / "trace.json",
        actor_rollout_ref__actor__use_kl_loss=True,
        actor_rollout_ref__actor__checkpoint__save_contents="[model,optimizer,extra,hf_model]",
    )
    metrics = run.metrics()
    assert sorted(metrics) == [0, 1, 2]
    assert "val-core/letters/acc/mean@1" in metrics[0] or "val-core/letters/reward/mean@1" in metrics[0]
    assert any(name.startswith("val-core/") for name in metrics[2])
    for step in (1, 2):
        data = metrics[step]
        assert data["training/rollout_probs_diff_max"] < 1e-4
        assert data["training/global_step"] == step
        for name in (
            "actor/pg_loss",
            "actor/grad_norm",
            "actor/kl_loss",
            "critic/rewards/mean",
            "response_length/mean",
            "timing_s/gen",
            "timing_s/update_weights",
            "perf/throughput",
            "rollout_corr/kl",
        ):
            assert name in data, name
        assert data["actor/grad_norm"] > 0
    assert "prompts" in text and "step" in text
    model_dir = run.out / "global_step_2" / "actor" / "huggingface"
    trained = AutoModelForCausalLM.from_pretrained(model_dir)
    AutoTokenizer.from_pretrained(model_dir)
    initial = AutoModelForCausalLM.from_pretrained(run.model)
    moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), initial.parameters(), strict=True)]
    assert all(moved)
    assert (run.out / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    dumped = prompts_of(tmp_path / "dumps")
    assert sorted(dumped) == [1, 2] and all(len(set(rows)) == 8 and len(rows) == 32 for rows in dumped.values())
    assert left_in_shared_memory(before) == set()
    check_timeline(tmp_path / "trace.json", metrics)


def test_two_ranks_and_two_replicas_train_like_one(tmp_path):
    two = TinyRun(tmp_path)
    two.run(trainer__n_gpus_per_node=2, trainer__total_training_steps=2)
    data = two.metrics()
    assert sorted(data) == [1, 2]
    assert all(data[step]["training/rollout_probs_diff_max"] < 1e-4 for step in data)


@pytest.mark.parametrize("kind", ["qwen3_moe"])
def test_mixture_of_experts_trains(tmp_path, kind):
    run = TinyRun(tmp_path, kind=kind, tied=False)
    run.run()
    assert all(data["training/rollout_probs_diff_max"] < 1e-4 for data in run.metrics().values())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {"trainer__n_gpus_per_node": 2}),
        ("qwen3_moe", {"trainer__n_gpus_per_node": 2, "actor_rollout_ref__rollout__tensor_model_parallel_size": 2}),
        ("qwen3_moe", {"actor_rollout_ref__rollout__quantization_side": "receiver"}),
    ],
    ids=["two replicas", "tensor parallel", "receiver"],
)
def test_a_quantized_rollout_trains(tmp_path, kind, changes):
    run = TinyRun(tmp_path, kind=kind, tied=kind == "qwen3", std=0.02)
    text = run.run(actor_rollout_ref__rollout__quantization="ascend", trainer__total_training_steps=2, **changes)
    assert "MXFP8" in text
    for data in run.metrics().values():
        # A policy of its own, but a near one: rounding is in the third digit.
        assert 1e-5 < data["training/rollout_probs_diff_mean"] < 1e-2
        assert {"rollout_corr/kl", "rollout_corr/k3_kl", "training/rollout_probs_diff_max"} <= data.keys()
        seconds = [data[f"weight_update/{part}_s"] for part in ("encode", "send", "load", "finish")]
        assert all(part > 0 for part in seconds) and data["weight_update/total_s"] > max(seconds)
        assert 0.01 < data["weight_update/max_quantization_error"] < 0.06
        assert data["weight_update/max_quantization_error_layer"].startswith("model.layers.")


@pytest.mark.parametrize("quantization", ["fp8", "torchao"])
def test_other_quantizations_train(tmp_path, monkeypatch, quantization):
    changes = {"actor_rollout_ref__rollout__dtype": "bfloat16"}
    if quantization == "torchao":
        monkeypatch.setenv("PYTHONPATH", str(torchao_directory()), prepend=os.pathsep)
        file = tmp_path / "torchao.json"
        file.write_text('{"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}')
        changes["actor_rollout_ref__rollout__quantization_config_file"] = file
    # Blocks of 128 x 128 have to end where layers do.
    run = TinyRun(tmp_path, std=0.02, hidden_size=192, intermediate_size=256, num_key_value_heads=4)
    run.run(actor_rollout_ref__rollout__quantization=quantization, trainer__total_training_steps=2, **changes)
    for data in run.metrics().values():
        assert 1e-5 < data["training/rollout_probs_diff_mean"] < 2e-2
        assert ("weight_update/max_quantization_error" in data) == (quantization == "fp8")


def test_killed_at_any_moment_it_goes_on_from_the_last_whole_checkpoint_with_the_same_prompts(tmp_path):
    whole, broken = TinyRun(tmp_path / "whole"), TinyRun(tmp_path / "broken")
    common = dict(trainer__save_freq=1, trainer__total_training_steps=10, trainer__max_actor_ckpt_to_keep=2)
    whole.run(**common, trainer__rollout_data_dir=whole.root / "dumps")

    trace = tmp_path / "trace.json"
    process = broken.start(**common, trainer__rollout_data_dir=broken.root / "dumps", trainer__timeline=trace)
    broken.wait_for(lambda: (broken.out / "global_step_3").exists(), process)
    family = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert alive(family) == []
    check_timeline(trace, broken.metrics(), ended=False)
    saved = int((broken.out / "latest_checkpointed_iteration.txt").read_text())
    assert saved >= 3

    text = broken.run(**common, trainer__rollout_data_dir=broken.root / "dumps")
    assert f"at step {saved}" in text
    metrics = broken.metrics()
    assert sorted(metrics) == list(range(1, 11))
    assert prompts_of(broken.root / "dumps") == prompts_of(whole.root / "dumps")
    kept = sorted(path.name for path in broken.out.glob("global_step_*"))
    assert kept == ["global_step_10", "global_step_9"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_cleanly(tmp_path, number, status):
    run = TinyRun(tmp_path)
    before = orphaned_shared_memory()
    process = run.start(trainer__total_training_steps=1000)
    run.wait_for(lambda: (run.out / "metrics.jsonl").exists() and len(run.metrics()) >= 2, process)
    family = descendants(process.pid)
    assert len(family) > 3
    # A terminal sends Ctrl-C to the whole group, a scheduler SIGTERM to the process it started.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(60) == status, run.log.read_text()[-3000:]
    assert alive(family) == []
    assert left_in_shared_memory(before) == set()
    assert "Traceback" not in run.log.read_text()


def test_an_error_in_a_process_ends_the_run_with_that_error(tmp_path):
    run = TinyRun(tmp_path)
    run.reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 'good'\n"
    )
    process = run.start()
    family = set()

    def ended():
        if process.poll() is None:
            family.update(descendants(process.pid))
        return process.poll() is not None

    import time

    deadline = time.monotonic() + 240
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.3)
    assert process.poll() == 1
    text = run.log.read_text()
    assert "every sample" in text or "all" in text
    assert "good" in text
    assert alive(family) == []
