"""Comparison of the engine's log-probabilities with the trainer's, at the start of a run and after its first update.

A run is on policy only if engine and trainer compute the same function of the same weights. Settings, tensors and
attention features can get lost on either side without an error; all of these show in the log-probabilities of a few
random tokens:

    random prompts --every replica--> responses, log-probabilities
                   --trainer: one batch, one by one, in the mode of the update--> log-probabilities

If engine and trainer differ by more than rounding, both are compared with an eager float32 model of the same weights.
"""

from __future__ import annotations

import asyncio
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from verl.agent_loop.padding import pad_right, pad_samples
from verl.config import names
from verl.protocol import DataProto
from verl.timeline.spans import spanned
from verl.trainer.ppo.eager_reference import ReferenceLogProbs, ReferenceUnavailable, reference_log_probs
from verl.trainer.ppo.runtime import Runtime
from verl.utils.asyncio_utils import gather_all
from verl.utils.host import available_memory_bytes
from verl.workers.rollout.replica import vLLMReplica
from verl.workers.rollout.types import ReplicaUnavailable

logger = logging.getLogger(__name__)

# Mean |difference of log-probabilities| up to which nothing needs an explanation, and above which the run stops if no
# reference is available. bf16 rounds logits of 16 to 32 by up to 0.06; a quantized engine computes another policy.
_FLOAT32 = (1e-3, 1e-3)
_BFLOAT16 = (0.02, 0.1)
_QUANTIZED = (0.02, 0.5)
# A side is wrong if it differs from the reference by more than this multiple of what its number format explains.
_FACTOR = 4.0

# Parameters of the largest model that is computed as a reference: 8 GB in float32, and seconds on a host.
_LARGEST_REFERENCE = 2 * 10**9

_RESPONSE_TOKENS = 16
_LONGEST_PROMPT = 1024
_PROMPTS_PER_RANK = 4


class ConsistencyError(RuntimeError):
    """Engine and trainer compute different policies from the same weights."""


@dataclass(frozen=True)
class _Sample:
    prompt: list[int]
    response: list[int]
    log_probs: list[float]


@spanned("check consistency")
async def check_consistency(runtime: Runtime, version: int) -> None:
    """Compare every replica with the trainer, and the trainer with itself.

    Args:
        runtime: all replicas serve `version`, the trainer's weights.

    Raises:
        ConsistencyError: they differ by more than their number formats explain.
    """
    prompts = _random_prompts(runtime, seed=version)
    replicas = runtime.processes.replicas.serving
    by_replica = await gather_all(*(_sample(runtime, replica, prompts) for replica in replicas))
    for number, (replica, samples) in enumerate(zip(replicas, by_replica, strict=True)):
        batch = _to_batch(samples, runtime.config.actor_rollout_ref.rollout.temperature)
        trainer = (await runtime.old_log_probs(batch)).batch["old_log_probs"]
        if number == 0:
            await _check_trainer(runtime, batch, trainer)
        await _check_engine(runtime, version, replica.rank, batch, trainer)


def _random_prompts(runtime: Runtime, seed: int) -> list[list[int]]:
    tokenizer = runtime.data.tokenizer
    ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    count = max(2, runtime.plan.trainer_ranks) * _PROMPTS_PER_RANK
    longest = min(runtime.config.data.max_prompt_length, _LONGEST_PROMPT)
    return random_prompts(ordinary, count=count, longest=longest, seed=seed)


def random_prompts(tokens: Sequence[int], *, count: int, longest: int, seed: int) -> list[list[int]]:
    """Return `count` prompts of random tokens, from a single token to `longest`, with equal ratios of lengths."""
    lengths = np.geomspace(1, longest, count).round().astype(int)
    generator = np.random.default_rng(seed)
    return [generator.choice(tokens, size=length).tolist() for length in lengths]


async def _sample(runtime: Runtime, replica: vLLMReplica, prompts: Sequence[list[int]]) -> list[_Sample]:
    rollout = runtime.config.actor_rollout_ref.rollout
    parameters = {
        "temperature": rollout.temperature,
        "max_tokens": min(_RESPONSE_TOKENS, runtime.config.data.max_response_length),
        "ignore_eos": True,
        "logprobs": 0,
    }
    while True:
        changes = runtime.recovery.changes
        try:
            outputs = await gather_all(
                *(
                    replica.generate(prompt, parameters, f"consistency-{number}", [])
                    for number, prompt in enumerate(prompts)
                )
            )
            break
        except ReplicaUnavailable:
            # It is restarted with the same weights: nothing trains meanwhile.
            if not await runtime.recovery.wait_for_replica(changes):
                raise
    return [
        _Sample(prompt, output.token_ids, output.log_probs) for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _to_batch(samples: Sequence[_Sample], temperature: float) -> DataProto:
    """Return the columns of a forward pass, and the engine's `rollout_log_probs` [B, T] float32."""
    columns = pad_samples([sample.prompt for sample in samples], [sample.response for sample in samples], 0)
    width = columns["responses"].shape[1]
    columns["response_mask"] = columns["attention_mask"][:, -width:].copy()
    columns["rollout_log_probs"] = pad_right([sample.log_probs for sample in samples], width, 0, np.float32)
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    return DataProto.from_dict(tensors=tensors, meta_info={"temperature": temperature})


async def _check_trainer(runtime: Runtime, batch: DataProto, together: torch.Tensor) -> None:
    """Check that the trainer's result depends neither on the micro-batch nor on the mode of the update."""
    limit = _limits(runtime.plan.compute_dtype)[0]
    mask = batch.batch["response_mask"].bool()
    updating = (await runtime.update_log_probs(batch)).batch["old_log_probs"]
    gap = _gap(updating, together, mask)
    if gap > limit:
        raise ConsistencyError(
            f"the trainer computes other log-probabilities in an update than before it: mean |difference| {gap:.2g}, "
            f"expected at most {limit:g} in {runtime.plan.compute_dtype}. A part of the model behaves differently "
            "while it is trained (dropout, jitter, batch statistics): set it to 0 in "
            f"actor_rollout_ref.model.override_config. {_HOW_TO_SKIP}"
        )
    # As many samples at a time as there are shards, so that each of them is alone in its micro-batch.
    count = runtime.plan.data_parallel
    for rows in (np.arange(count), np.arange(len(batch) - count, len(batch))):
        alone = await runtime.old_log_probs(batch[rows], [np.array([i]) for i in range(count)])
        gap = _gap(alone.batch["old_log_probs"], together[rows], mask[rows])
        if gap > limit:
            raise ConsistencyError(
                "the trainer computes other log-probabilities of a sample alone than beside other samples: mean "
                f"|difference| {gap:.2g}, expected at most {limit:g} in {runtime.plan.compute_dtype}. The model "
                f"computes something from the shape of the batch; this architecture is not supported. {_HOW_TO_SKIP}"
            )


async def _check_engine(runtime: Runtime, version: int, replica: int, batch: DataProto, trainer: torch.Tensor) -> None:
    mask, engine = batch.batch["response_mask"].bool(), batch.batch["rollout_log_probs"]
    gap, tokens = _gap(engine, trainer, mask), int(mask.sum())
    explained, tolerated = _engine_limits(runtime)
    found = f"mean |difference of log-probabilities| of replica {replica} and the trainer: {gap:.2g} ({tokens} tokens)"
    if gap <= explained:
        logger.info("%s, version %d", found, version)
        return
    try:
        reference = await _reference(runtime, version, batch)
    except ReferenceUnavailable as error:
        if gap > tolerated:
            raise ConsistencyError(
                f"{found}, expected at most {tolerated:g} for {_formats(runtime)}. No reference tells which of the two "
                f"is wrong: {error}. {_HOW_TO_SKIP}"
            ) from error
        logger.warning("%s, version %d; no reference tells whether rounding explains it: %s", found, version, error)
        return
    engine_gap, trainer_gap = (_gap(side, reference.log_probs, mask) for side in (engine, trainer))
    engine_limit = _FACTOR * _gap(reference.as_engine, reference.log_probs, mask) + _FLOAT32[0]
    trainer_limit = _FACTOR * _gap(reference.as_trainer, reference.log_probs, mask) + _FLOAT32[0]
    compared = (
        f"against an eager float32 model of the same weights the engine differs by {engine_gap:.2g} (its number format "
        f"explains {engine_limit:.2g}), the trainer by {trainer_gap:.2g} (explained: {trainer_limit:.2g})"
    )
    wrong = [
        name
        for name, side, limit in (("engine", engine_gap, engine_limit), ("trainer", trainer_gap, trainer_limit))
        if side > limit or not math.isfinite(side)
    ]
    if wrong:
        raise ConsistencyError(
            f"{found}: the {' and the '.join(wrong)} computes another model. {compared[0].upper()}{compared[1:]}. This "
            f"model, or a setting of it, is not supported as it is configured. {_HOW_TO_SKIP}"
        )
    logger.info("%s, version %d; %s", found, version, compared)


_HOW_TO_SKIP = "To train all the same, set trainer.check_consistency=False"


def _gap(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the mean |a - b| over the tokens of `mask`, all [B, T]; infinite if a value is not finite."""
    value = (a - b).abs()[mask].mean().item()
    return value if math.isfinite(value) else math.inf


def _limits(dtype: str) -> tuple[float, float]:
    return _FLOAT32 if dtype == "float32" else _BFLOAT16


def _engine_limits(runtime: Runtime) -> tuple[float, float]:
    """Return the mean difference that needs no explanation, and the one that is tolerated without a reference."""
    sides = [_limits(runtime.plan.compute_dtype), _limits(runtime.plan.rollout_dtype)]
    if runtime.plan.rollout_weights is not None and runtime.plan.qat in (None, names.QAT_WEIGHTS_ONLY):
        sides.append(_QUANTIZED)
    return max(sides)


def _formats(runtime: Runtime) -> str:
    quantized = f", {runtime.plan.rollout_weights} weights" if runtime.plan.rollout_weights else ""
    return f"a trainer in {runtime.plan.compute_dtype} and an engine in {runtime.plan.rollout_dtype}{quantized}"


async def _reference(runtime: Runtime, version: int, batch: DataProto) -> ReferenceLogProbs:
    """Return the log-probabilities of an eager float32 model of the trainer's current weights.

    Raises:
        ReferenceUnavailable: the model is too large for this host, or cannot be exported or loaded.
    """
    parameters = runtime.plan.parameters
    if parameters is None or parameters > _LARGEST_REFERENCE:
        raise ReferenceUnavailable(
            f"it is computed for models of at most {_LARGEST_REFERENCE / 1e9:g} billion parameters"
        )
    available = available_memory_bytes()
    if available is not None and 8 * parameters > available:
        raise ReferenceUnavailable(
            f"it needs {8 * parameters / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"
        )
    config = runtime.config
    directory = Path(config.trainer.default_local_dir)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".consistency-") as exported:
        await runtime.export_float32(exported)
        return await asyncio.to_thread(
            reference_log_probs,
            exported,
            batch,
            trainer_dtype=runtime.plan.compute_dtype,
            engine_dtype=runtime.plan.rollout_dtype,
            trainer_quantized=runtime.plan.qat is not None,
            weight_error=runtime.plan.weight_error,
            max_model_len=config.max_model_len,
            trust_remote_code=bool(config.actor_rollout_ref.model.trust_remote_code),
        )
