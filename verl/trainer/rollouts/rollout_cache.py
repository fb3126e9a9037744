"""Cached rollouts (`skip.rollout`): the samples of chosen steps, in files that a later run trains on.

Each file holds the samples of one draw of prompts with everything that a step needs: tokens, response masks, the
rollout's log-probabilities, weight versions, rewards, and the columns of the rows. The pipeline treats samples of a
file like new ones, so a run with the settings of the run that wrote the files trains in the same way.

    DIRECTORY/EXPERIMENT_PROJECT/GBS<prompts>_N<samples>_in<limit>_out<limit>/<step>/samples_<draw>.safetensors

A file contains the settings that decide what is sampled and scored, and fingerprints of model, data and reward. A run
with others is refused by name. Weights and settings of the trainer are not compared: they may differ, because a change
of the trainer is what a cached rollout is for.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import ScoredSample
from verl.agent_loop.padding import pad_right
from verl.config import PPOConfig
from verl.config.schema import show, walk
from verl.preflight.inputs import RunInputs
from verl.protocol import DataProto
from verl.utils.proto_columns import object_array
from verl.utils.tracking.plain import mask_secrets, to_json
from verl.workers.reward import RewardResult

logger = logging.getLogger(__name__)

_FORMAT = 1
_MAX_SHOWN = 5
# Columns of a row that the batch of a step contains; see verl.agent_loop.generation.
_ROW_COLUMNS = ("uid", "data_source", "reward_model", "extra_info", "index", "raw_prompt")
_COMPARED = ("actor_rollout_ref.rollout.", "reward.", "data.max_prompt_length", "data.max_response_length")
_COMPARED_FILES = ("actor_rollout_ref.model.", "actor_rollout_ref.rollout.", "data.train_files", "reward.")
_PATHS = ("path", "file", "files", "lib")
# Settings of `actor_rollout_ref.rollout` and `reward` that change the speed, the place or the validation only.
_NOT_COMPARED = (
    *("nnodes", "n_gpus_per_node", "tensor_model_parallel_size", "expert_parallel_size", "gpu_memory_utilization"),
    *("free_cache_engine", "enforce_eager", "cudagraph_capture_sizes", "enable_chunked_prefill", "load_format"),
    *("enable_prefix_caching", "max_num_batched_tokens", "max_num_seqs", "disable_log_stats", "layered_summon"),
    *("log_prob_micro_batch_size_per_gpu", "log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu"),
    *("checkpoint_engine.", "server.", "val_kwargs.", "profiler.", "quantization_side", "quantization_self_test"),
    *("quantization_guard.", "prometheus.", "agent.num_workers", "num_workers"),
)


class RolloutCacheError(ValueError):
    """A file is damaged, or belongs to another run; the message names it and says what differs."""


class RolloutCache:
    """Files of samples, for the steps of `skip.rollout.steps`.

    Args:
        config: the whole config.
        inputs: fingerprints of the input files.
        with_baselines: True if each draw also has a greedy sample per row.

    Raises:
        RolloutCacheError: the first file that the run may read belongs to a run with other settings or inputs.
    """

    def __init__(self, config: PPOConfig, inputs: RunInputs, *, with_baselines: bool):
        skip, data = config.skip.rollout, config.data
        self._steps, self._repeats = frozenset(skip.steps), skip.action == "repeat"
        self._identity = _identity(config, inputs, with_baselines)
        prompts = data.gen_batch_size or data.train_batch_size
        limits = f"in{data.max_prompt_length}_out{data.max_response_length}"
        self.directory = (
            Path(skip.dump_dir)
            / f"{config.trainer.experiment_name}_{config.trainer.project_name}"
            / f"GBS{prompts}_N{config.actor_rollout_ref.rollout.n}_{limits}"
        )
        self._step, self._draws = 0, 0
        read = [step for step in self._kept_steps() if self._repeats or step in self._steps]
        if read:
            self._read(self._path(min(read), 0))

    def load(self, step: int, rows: Sequence[Mapping[str, Any]]) -> list[ScoredSample] | None:
        """Return the samples of the next draw of `step`; None if they have to be generated, and given to `save`.

        With `action=cache` they belong to `rows`. With `action=repeat` they may be those of another step, with its
        rows.

        Raises:
            RolloutCacheError: a file is damaged or belongs to another run, or to other prompts.
        """
        self._draws = self._draws + 1 if step == self._step else 0
        self._step = step
        if step not in self._steps:
            return None
        source = self._source(step)
        path = self._path(step if source is None else source, self._draws)
        if source is None or not path.is_file():
            logger.warning("step %d: no cached rollout in %s; the samples are generated and kept", step, path.parent)
            return None
        table = self._read(path)
        if source == step and table.meta_info["prompts"] != _prompts_hash(rows):
            raise RolloutCacheError(
                f"{path}: the samples belong to other prompts than those of step {step}; use the data, the seed and "
                f"the checkpoint of the run that wrote the file, or {self._way_out}"
            )
        logger.warning(
            "step %d trains on the cached samples of step %s, from the weights of the run that wrote %s",
            *(step, source, path),
        )
        return _samples(table, rows if source == step else None)

    def save(self, step: int, rows: Sequence[Mapping[str, Any]], samples: Sequence[ScoredSample]) -> None:
        """Keep the samples of the draw that `load` did not find; without effect in a step that is not kept.

        Raises:
            ValueError: a value of a sample cannot be stored; the message names it.
            OSError: the file cannot be written.
        """
        if step not in self._steps:
            return
        table = _table(samples)
        table.meta_info = {"format": _FORMAT, "step": step, "prompts": _prompts_hash(rows), **self._identity}
        table.save_to_disk(self._path(step, self._draws))

    @property
    def _way_out(self) -> str:
        return "choose another skip.rollout.dump_dir, or delete the directory to generate the samples again"

    def _path(self, step: int, draw: int) -> Path:
        return self.directory / str(step) / f"samples_{draw}.safetensors"

    def _kept_steps(self) -> list[int]:
        """Return the steps that have files."""
        found = [path.parent.name for path in self.directory.glob("*/samples_0.safetensors")]
        return [int(name) for name in found if name.isdecimal()]

    def _source(self, step: int) -> int | None:
        """Return the step whose files `step` reads; None without one."""
        kept = self._kept_steps()
        if step in kept or not self._repeats:
            return step if step in kept else None
        earlier = [other for other in kept if other < step]
        return max(earlier) if earlier else min(kept, default=None)

    def _read(self, path: Path) -> DataProto:
        """Read a file and compare its settings and inputs with those of this run."""
        try:
            table = DataProto.load_from_disk(path)
        except ValueError as error:
            raise RolloutCacheError(f"{error}; {self._way_out}") from error
        stored = table.meta_info
        if stored.get("format") != _FORMAT:
            raise RolloutCacheError(f"{path}: format {stored.get('format')}, expected {_FORMAT}; {self._way_out}")
        differing = [
            f"{name} ({show(stored[part].get(name))}, now {show(self._identity[part].get(name))})"
            if part == "settings"
            else f"the files of {name}"
            for part in ("settings", "files")
            for name in sorted({*stored[part], *self._identity[part]})
            if stored[part].get(name) != self._identity[part].get(name)
        ]
        if differing:
            more = f" and {len(differing) - _MAX_SHOWN} more" if len(differing) > _MAX_SHOWN else ""
            raise RolloutCacheError(
                f"{path}: a cached rollout of a run with other {', '.join(differing[:_MAX_SHOWN])}{more}; restore "
                f"them, or {self._way_out}"
            )
        return table


def make_rollout_cache(config: PPOConfig, inputs: RunInputs, *, with_baselines: bool) -> RolloutCache | None:
    """Return the cache of a run with `skip.rollout.enable`; None for other runs.

    Raises:
        RolloutCacheError: the files of a step belong to another run.
    """
    return RolloutCache(config, inputs, with_baselines=with_baselines) if config.skip.rollout.enable else None


def _identity(config: PPOConfig, inputs: RunInputs, with_baselines: bool) -> dict[str, dict[str, str]]:
    """Return what decides the samples and rewards of a prompt, except the weights: settings and hashes of files."""
    settings = {
        key: to_json(mask_secrets({key: value})[key])
        for key, _, value in walk(config)
        if key.startswith(_COMPARED) and not key.endswith(_PATHS) and not _without_effect(key)
    }
    settings["greedy baselines"] = to_json(with_baselines)
    files = {key: to_json(value) for key, value in inputs.files.items() if key.startswith(_COMPARED_FILES)}
    return {"settings": settings, "files": {key: _hash(text) for key, text in files.items()}}


def _without_effect(key: str) -> bool:
    name = key.removeprefix("actor_rollout_ref.rollout.").removeprefix("reward.")
    return any(name == other or (other.endswith(".") and name.startswith(other)) for other in _NOT_COMPARED)


def _prompts_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a hash of everything that a row gives to the agent loop and the reward."""
    return _hash("\n".join(to_json(dict(sorted(row.items()))) for row in rows))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _table(samples: Sequence[ScoredSample]) -> DataProto:
    """Return samples as columns; the tensors are padded on the right, and two columns hold the lengths."""
    outputs = [sample.output for sample in samples]
    prompts, responses = max(len(out.prompt_ids) for out in outputs), max(len(out.response_ids) for out in outputs)
    tensors = {
        "prompt_ids": pad_right([out.prompt_ids for out in outputs], prompts, 0, np.int32),
        "response_ids": pad_right([out.response_ids for out in outputs], responses, 0, np.int32),
        "response_mask": pad_right([out.response_mask for out in outputs], responses, 0, np.int8),
        "weight_versions": pad_right([out.weight_versions for out in outputs], responses, -1, np.int32),
        "response_logprobs": pad_right([out.response_logprobs for out in outputs], responses, 0.0, np.float64),
        "lengths": np.array(
            [
                [
                    len(values)
                    for values in (out.prompt_ids, out.response_ids, out.weight_versions, out.response_logprobs)
                ]
                for out in outputs
            ]
        ),
    }
    objects: dict[str, list[Any]] = {
        "stop_reason": [out.stop_reason for out in outputs],
        "num_turns": [out.num_turns for out in outputs],
        "extra_fields": [out.extra_fields for out in outputs],
        "metrics": [dict(out.metrics) for out in outputs],
        "reward_score": [out.reward_score for out in outputs],
        "reward": [asdict(sample.reward) for sample in samples],
        "row": [{name: sample.row[name] for name in _ROW_COLUMNS if name in sample.row} for sample in samples],
    }
    return DataProto.from_dict(
        tensors={name: torch.from_numpy(values) for name, values in tensors.items()},
        non_tensors={name: object_array(values) for name, values in objects.items()},
    )


def _samples(table: DataProto, rows: Sequence[Mapping[str, Any]] | None) -> list[ScoredSample]:
    """Return the samples of `_table`.

    Args:
        rows: rows of this run that replace the stored ones, by `uid`; None keeps the stored ones.
    """
    assert table.batch is not None
    by_uid = {} if rows is None else {row["uid"]: dict(row) for row in rows}
    columns = {name: values.tolist() for name, values in table.batch.items()}
    columns |= {name: values.tolist() for name, values in table.non_tensor_batch.items()}
    samples = []
    for i, (prompt, response, versions, log_probs) in enumerate(columns["lengths"]):
        output = AgentLoopOutput(
            prompt_ids=columns["prompt_ids"][i][:prompt],
            response_ids=columns["response_ids"][i][:response],
            response_mask=columns["response_mask"][i][:response],
            response_logprobs=columns["response_logprobs"][i][:log_probs],
            weight_versions=columns["weight_versions"][i][:versions],
            stop_reason=columns["stop_reason"][i],
            num_turns=columns["num_turns"][i],
            extra_fields=columns["extra_fields"][i],
            metrics=columns["metrics"][i],
            reward_score=columns["reward_score"][i],
        )
        row = columns["row"][i]
        samples.append(ScoredSample(by_uid.get(row["uid"], row), output, RewardResult(**columns["reward"][i])))
    return samples
