"""The agent loop of the benchmarks' runs: one answer, as long as its prompt says; behind a gate where there is one."""

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
    """Holds the first samples of each step until the benchmark lets the step through."""

    def __init__(self) -> None:
        self._gate = pace.Gate() if pace.GATE in os.environ else None
        self._passed: dict[str, asyncio.Future] = {}
        self.tokens = 0

    async def passed(self, step: str) -> None:
        """Wait for the gate, once a step."""
        if self._gate is None:
            return
        if step not in self._passed:
            tokens, self.tokens = self.tokens, 0
            self._passed[step] = asyncio.ensure_future(asyncio.to_thread(self._gate.arrive, tokens))
        await asyncio.shield(self._passed[step])


class TaskLoop(SingleTurnAgentLoop):
    """Asks for as many tokens as the prompt says."""

    def __init__(self, *arguments: Any, gate: StepGate):
        super().__init__(*arguments)
        self._gate = gate

    @classmethod
    def setup(cls, tokenizer: Any, config: PPOConfig) -> dict[str, Any]:
        return {"gate": StepGate()}

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        step, _, _ = row["uid"].partition(".")
        await self._gate.passed(step)
        exactly = {"max_tokens": task.answer_length(row["prompt_token_ids"]), "ignore_eos": True}
        output = await super().run({**sampling_params, **exactly}, **row)
        self._gate.tokens += len(output.response_ids)
        return output
