"""The simplest loop: one prompt, one answer."""

from __future__ import annotations

from typing import Any

from verl.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register


@register("single_turn_agent")
class SingleTurnAgentLoop(AgentLoopBase):
    """Sends the row's prompt tokens and keeps the answer as it came."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        answer = await self.client.generate(row["prompt_token_ids"], sampling_params)
        tokens = answer.token_ids[: self.response_length]
        return AgentLoopOutput(
            prompt_ids=list(row["prompt_token_ids"]),
            response_ids=tokens,
            response_mask=[1] * len(tokens),
            response_logprobs=answer.log_probs[: len(tokens)],
            weight_versions=answer.weight_versions[: len(tokens)],
            stop_reason=answer.stop_reason,
        )
