"""The directory in which a case runs: a model, data, and other inputs of a run that passes every check."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Snapshot = dict[str, tuple[int, ...]]

RUN = {
    "algorithm.adv_estimator": "grpo",
    "data.train_files": "{root}/train.parquet",
    "data.val_files": "{root}/val.parquet",
    "data.train_batch_size": 8,
    "data.max_prompt_length": 32,
    "data.max_response_length": 16,
    "actor_rollout_ref.model.path": "{root}/model",
    "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 2,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.n": 4,
    "trainer.device": "cpu",
    "trainer.n_gpus_per_node": 1,
    "trainer.default_local_dir": "{root}/run",
}
"""Overrides of a run that passes every check."""


def overrides(**changes: Any) -> list[str]:
    """Return the command line of the run with changes: `a__b=1` means `a.b=1`."""
    keys = RUN | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in keys.items()]


def write_template(root: Path) -> None:
    """Write the inputs of the run into a new directory."""
    from fixtures.tiny import write_tiny_model

    for name in ("home", "tmp", "work"):
        (root / name).mkdir(parents=True)
    write_tiny_model(root / "model")
    (root / "model" / "generation_config.json").write_text('{"eos_token_id": 2, "pad_token_id": 0}')
    _write_shards(root / "model", root / "sharded")
    _write_data(root, 16)
    _write_small_files(root)
    _write_adapter(root / "adapter")
    _write_run(root / "old")


def _write_shards(model: Path, target: Path) -> None:
    """Write a copy of a model with its tensors in two files and an index."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, target, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors, index = sorted(load_file(model / "model.safetensors").items()), {}
    for number in (1, 2):
        shard = dict(tensors[number - 1 :: 2])
        save_file(shard, target / f"model-0000{number}-of-00002.safetensors", {"format": "pt"})
        index |= dict.fromkeys(shard, f"model-0000{number}-of-00002.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _write_data(root: Path, rows: int) -> None:
    """Write the rows as Parquet, JSON and JSON lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {
        "prompt": [{"role": "user", "content": "what is 2+2?"}],
        "data_source": "openai/gsm8k",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 0, "split": "train"},
    }
    for name in ("train", "val"):
        pq.write_table(pa.Table.from_pylist([row] * rows), root / f"{name}.parquet")
        (root / f"{name}.json").write_text(json.dumps([row] * rows))
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(rows)))


def _write_small_files(root: Path) -> None:
    """Write descriptions of quantizations, and YAML files."""
    from verl.cli.entry import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(["describe", str(root / "model"), "-o", str(root / "description.json")])
    if status:
        raise RuntimeError(f"verl describe failed on the model of the campaign: {output.getvalue()}")
    (root / "ignore.json").write_text(json.dumps({"ignore": ["lm_head", "re:.*embed_tokens.*"]}))
    (root / "yaml").mkdir()
    (root / "yaml" / "own.yaml").write_text(
        "defaults:\n  - ppo_trainer\n  - _self_\n\ntrainer:\n  total_epochs: 3\n  logger: [console]\n"
    )
    (root / "loops.py").write_text(
        "from verl.agent_loop import AgentLoopBase\n\n\nclass Loop(AgentLoopBase):\n"
        "    async def run(self, sampling_params, **kwargs):\n        raise NotImplementedError\n"
    )
    (root / "loops.yaml").write_text("- name: own\n  _target_: loops.py:Loop\n  depth: 3\n")


def _write_adapter(folder: Path) -> None:
    """Write a LoRA adapter of rank 2 as peft does."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM", "lora_dropout": 0.0}))
    name, shapes = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight", {"A": (2, 64), "B": (128, 2)}
    tensors = {name.format(i, part): torch.zeros(shape) for i in range(2) for part, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _write_run(folder: Path) -> None:
    """Write the directory of a run, with a checkpoint after its second step."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    from verl.config import load_config
    from verl.config.record import write_record
    from verl.preflight.inputs import RunInputs, data_seed, write_inputs
    from verl.utils.checkpoint_files import TRACKER, write_manifest

    checkpoint = folder / "global_step_2"
    tensors = load_file(folder.parent / "model" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about a single process
        dcp.save(dict(tensors), checkpoint_id=checkpoint / "actor" / "model")
    (checkpoint / "actor" / "engine.json").write_text("{}")
    (checkpoint / "data.pt").write_bytes(bytes(64))
    words = [word.replace("{root}", str(folder.parent)) for word in overrides(trainer__default_local_dir=folder)]
    config = load_config(words)
    for place in (folder, checkpoint):
        write_record(config, place)
    write_inputs(RunInputs({}, {}, "", {"rows": 16, "shuffle": True, "seed": data_seed(config)}), checkpoint)
    write_manifest(checkpoint)
    (folder / TRACKER).write_text("2")
    metrics = {"critic/score/mean": 0.5, "actor/entropy": 1.0, "timing_s/step": 2.0, "actor/grad_norm": 0.1}
    lines = [{"step": step, "data": metrics} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"input": "prompt", "output": "answer", "gts": "42", "score": 0.5, "step": 4, "acc": 1}
    for kind in ("validation", "rollouts"):
        (folder / kind).mkdir()
        (folder / kind / "4.jsonl").write_text((json.dumps(sample) + "\n") * 3)
    span = {"ph": "X", "pid": 1, "tid": 1, "cat": "stage", "name": "step", "ts": 0, "dur": 5e6, "args": {"step": 4}}
    (folder / "timeline.json").write_text("[\n" + f"{json.dumps(span)},\n")


def reset(template: Path, root: Path) -> None:
    """Make a directory equal to the template."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root, symlinks=True)


def snapshot(root: Path) -> Snapshot:
    """Return size, time of change and inode of every file and directory below a directory, by relative path."""
    found: Snapshot = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content = (status.st_size, status.st_mtime_ns, status.st_ino) if name in files else (status.st_ino,)
            found[os.path.relpath(path, root)] = content
    return found


def changed(before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the paths that are new, missing or different."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
