"""One validation: generate responses to the validation prompts, score them, compute metrics."""

from __future__ import annotations

import logging
from typing import Any

from verl.agent_loop.generation import ScoredSample
from verl.agent_loop.metrics import summary
from verl.config import PPOConfig
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.ppo.validation import (
    flatten_validation_metrics,
    process_validation_metrics,
    repeated_prompts_note,
    samples_table,
    validation_variables,
)
from verl.trainer.rollouts.prompts import to_rows
from verl.trainer.rollouts.sample_files import dump_generations

logger = logging.getLogger(__name__)


class ValidationRun:
    """Validates with `rollout.val_kwargs` on `data.val_files`.

    Args:
        config: the whole config.
        runtime: must be started.
    """

    def __init__(self, config: PPOConfig, runtime: Runtime):
        self._config, self._loader, self._sampler = config, runtime.data.val_loader, runtime.sampler
        self._notes: set[str] = set()

    async def run(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return metrics `val-core/...` and `val-aux/...`, and at most `trainer.log_val_generations` samples."""
        trainer = self._config.trainer
        samples: list[ScoredSample] = []
        for number, batch in enumerate(self._loader):
            samples += await self._sampler.sample_validation(to_rows(batch, f"{step}.{number}"))
        sources = [sample.row["data_source"] for sample in samples]
        # A row is a prompt. Rows with the same text may have different answers.
        prompts = [sample.row["uid"] for sample in samples]
        variables, notes = validation_variables(
            sources,
            [s.reward.score for s in samples],
            [s.reward.extra for s in samples],
            failed=[s.reward.error is not None for s in samples],
        )
        texts_of_prompts = [(s.row["data_source"], str(s.row["raw_prompt"])) for s in samples]
        notes += repeated_prompts_note(dict(zip(prompts, texts_of_prompts, strict=True)))
        for note in notes:
            if note not in self._notes:
                logger.warning(note)
        self._notes.update(notes)
        metrics = flatten_validation_metrics(process_validation_metrics(sources, prompts, variables))
        metrics |= summary([sample.output.num_turns for sample in samples], "val-aux/num_turns")
        if trainer.validation_data_dir:
            dump_generations(trainer.validation_data_dir, step, [self._sampler.describe(s) for s in samples])
        texts = [self._sampler.describe(s) for s in samples] if trainer.log_val_generations > 0 else []
        table = samples_table(
            [text["input"] for text in texts],
            [text["output"] for text in texts],
            [text["score"] for text in texts],
            trainer.log_val_generations,
        )
        return metrics, table
