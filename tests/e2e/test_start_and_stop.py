"""Start and stop of runs through the command line: files and processes that they leave, kills, signals, errors."""

import contextlib
import json
import os
import re
import signal
import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixtures import trace_format
from fixtures.training import (
    TinyRun,
    alive,
    descendants,
    left_in_shared_memory,
    orphaned_shared_memory,
    prompts_of,
)
from verl.timeline.reader import read_events, stage_seconds, step_shares

pytestmark = pytest.mark.e2e


def check_timeline(path, metrics, ended=True):
    """Check that a timeline has every process, the stages of the log, and engine and trainer at work in each step."""
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
        logged.pop("timing_s/save_checkpoint", None)  # it runs after the step
        assert {f"timing_s/{name}": value for name, value in stages[step].items()} == pytest.approx(logged, rel=0.02)
        share = shares[step]
        assert 0 < share.engine < 1 and 0 < share.train < 1 and 0 < share.overhead < 1
        assert share.engine + share.train + share.overhead == pytest.approx(1, abs=0.01)


@pytest.mark.smoke
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
    assert re.search(r"^plan\n(  .+\n)*  prompts \w+ step +8\n", text, re.MULTILINE)
    assert re.findall(r"^step (\d)/2  score \d\.\d+ ", text, re.MULTILINE) == ["1", "2"]
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


def test_a_killed_run_resumes_from_its_last_complete_checkpoint_with_the_same_prompts(tmp_path):
    run = TinyRun(tmp_path)
    settings = dict(
        trainer__save_freq=1,
        trainer__total_training_steps=10,
        trainer__max_actor_ckpt_to_keep=2,
        trainer__rollout_data_dir=tmp_path / "dumps",
    )
    trace = tmp_path / "trace.json"
    saved = run.killed_after(3, **settings, trainer__timeline=trace)
    check_timeline(trace, run.metrics(), ended=False)
    assert saved >= 3

    secrets = {"HF_TOKEN": "hf_planted1", "WANDB_API_KEY": "planted2", "AWS_SECRET_ACCESS_KEY": "planted3"}
    text = run.run(**settings, environment=secrets, actor_rollout_ref__rollout__server__enable_http=True)
    key_file = run.out / "http_replica_0.json"
    key = json.loads(key_file.read_text())["api_key"]
    assert files_with([*secrets.values(), key], tmp_path) == {key_file} and key_file.stat().st_mode & 0o077 == 0
    assert f"at step {saved}" in text
    metrics = run.metrics()
    assert sorted(metrics) == list(range(1, 11))
    assert prompts_of(tmp_path / "dumps") == run.expected_prompts(10)
    kept = sorted(path.name for path in run.out.glob("global_step_*"))
    assert kept == ["global_step_10", "global_step_9"]


def files_with(words, directory):
    """Files below `directory` that contain one of the words."""
    found = set()
    for path in directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found |= {path for word in words if word.encode() in content}
    return found


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_ctrl_c_and_sigterm_end_cleanly(tmp_path, number, status):
    run = TinyRun(tmp_path)
    before = orphaned_shared_memory()
    process = run.start(trainer__total_training_steps=1000)
    run.wait_for(lambda: (run.out / "metrics.jsonl").exists() and len(run.metrics()) >= 2, process)
    family = descendants(process.pid)
    assert len(family) > 3
    assert listening(process.pid) <= {"127.0.0.1", "::1"}, "docs/security.md lists the sockets of a run"
    # A terminal sends Ctrl-C to the whole group, a scheduler SIGTERM to the process it started.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(60) == status, run.log.read_text()[-3000:]
    assert alive(family) == []
    assert left_in_shared_memory(before) == set()
    assert "Traceback" not in run.log.read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_whose_engine_is_loading_ends_cleanly(tmp_path, number, status):
    run = TinyRun(tmp_path)
    before = orphaned_shared_memory()
    process = run.start()
    run.wait_for(lambda: any("EngineCore" in title for title in titles(process.pid)), process)
    family = descendants(process.pid)
    os.kill(process.pid, number)
    assert process.wait(60) == status, run.log.read_text()[-3000:]
    assert alive(family) == []
    assert left_in_shared_memory(before) == set()
    text = run.log.read_text()
    assert "Traceback" not in text and "did not stop by itself" not in text


def listening(pid):
    """Addresses on which `pid` and its descendants listen."""
    main, found = psutil.Process(pid), set()
    for process in (main, *main.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            found |= {item.laddr.ip for item in process.net_connections("inet") if item.status == psutil.CONN_LISTEN}
    return {address.removeprefix("::ffff:") for address in found}


def titles(pid):
    """Command lines of all descendants of `pid`, empty for those that have just ended."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(child.cmdline()))
    return found


def test_an_error_in_a_process_ends_the_run_with_that_error(tmp_path):
    run = TinyRun(tmp_path)
    run.reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    raise OSError('no service')\n"
    )
    process = run.start()
    family = set()
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        try:
            family |= descendants(process.pid)
        except psutil.NoSuchProcess:  # it ended between the two lines
            break
        time.sleep(0.3)
    assert process.wait(10) == 1
    text = run.log.read_text()
    assert re.search(r"scoring failed for all 32 samples", text)
    assert "OSError: no service" in text
    assert alive(family) == []
