"""TRL's side of `grpo_step.py`. Runs in the environment `.cache/trl` (scripts/setup_trl.sh), without verl and vLLM.

    .cache/trl/bin/python benchmarks/trl_side.py LOAD.json MODEL_DIR OUTPUT_DIR

Uses an unmodified `GRPOTrainer` with two additions from outside: a callback that waits at the gate before each step,
and a logits processor that ends every response at the length that its prompt encodes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import task
import torch
from datasets import Dataset
from pace import Gate
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class EndAtLength(LogitsProcessor):
    """Force the end of sequence at each sample's length, and forbid it before."""

    def __init__(self, prompts: torch.Tensor, eos: int):
        self._lengths = torch.tensor([task.response_length(row) for row in prompts.tolist()])
        self._prompt, self._eos = prompts.shape[1], eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self._eos] = -torch.inf
        ends = self._lengths == input_ids.shape[1] - self._prompt + 1
        scores[ends] = -torch.inf
        scores[ends, self._eos] = 0.0
        return scores


def with_lengths(generate: Callable, eos: int) -> Callable:
    """Wrap `generate` to add `EndAtLength`."""

    def generate_to_length(**arguments: Any) -> torch.Tensor:
        return generate(**arguments, logits_processor=LogitsProcessorList([EndAtLength(arguments["input_ids"], eos)]))

    return generate_to_length


class WaitAtGate(TrainerCallback):
    """Wait at the gate before the first optimizer step of each generation."""

    def __init__(self, gate: Gate, updates: int):
        self._gate, self._updates, self.tokens = gate, updates, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._updates == 0:
            tokens, self.tokens = self.tokens, 0
            self._gate.arrive(tokens)


def settings(load: dict[str, Any], output: str) -> GRPOConfig:
    """Convert a load (the fields of `runs.Load`) to TRL's config."""
    per_generation = load["prompts"] * load["n"] // load["micro_batch"]
    return GRPOConfig(
        output_dir=output,
        max_steps=1000,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=load["micro_batch"],
        steps_per_generation=per_generation,
        gradient_accumulation_steps=per_generation // load["updates"],
        num_generations=load["n"],
        max_completion_length=load["longest"],
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def main(load_file: str, model_dir: str, output: str) -> None:
    load = json.loads(Path(load_file).read_text())
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.generate = with_lengths(model.generate, tokenizer.eos_token_id)
    gate = WaitAtGate(Gate(), load["updates"])

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        gate.tokens += sum(map(len, completion_ids))
        return [task.score(completion) for completion in completions]

    GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        args=settings(load, output),
        train_dataset=Dataset.from_dict({"prompt": load["texts"]}),
        callbacks=[gate],
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
