"""Agent loop of the benchmarks' runs: one response of the length that its prompt encodes, behind an optional gate."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pace
import task

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.config import PPOConfig


class StepGate:
    """Gate that holds the samples of each step until the benchmark opens it."""

    def __init__(self) -> None:
        self._gate = pace.Gate() if pace.GATE in os.environ else None
        self._opened: dict[str, asyncio.Future] = {}
        self.tokens = 0

    async def wait(self, step: str) -> None:
        """Wait until the gate has opened for this step; without a gate, return at once."""
        if self._gate is None:
            return
        if step not in self._opened:
            tokens, self.tokens = self.tokens, 0
            self._opened[step] = asyncio.ensure_future(asyncio.to_thread(self._gate.arrive, tokens))
        await asyncio.shield(self._opened[step])


class TaskLoop(SingleTurnAgentLoop):
    """Single-turn loop that requests exactly as many tokens as the prompt encodes."""

    def __init__(self, *arguments: Any, gate: StepGate):
        super().__init__(*arguments)
        self._gate = gate

    @classmethod
    def setup(cls, tokenizer: Any, config: PPOConfig) -> dict[str, Any]:
        return {"gate": StepGate()}

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        step, _, _ = row["uid"].partition(".")
        await self._gate.wait(step)
        exact_length = {"max_tokens": task.response_length(row["prompt_token_ids"]), "ignore_eos": True}
        output = await super().run({**sampling_params, **exact_length}, **row)
        self._gate.tokens += len(output.response_ids)
        return output
