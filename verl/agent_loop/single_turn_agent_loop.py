"""The simplest loop: one prompt, one response."""

from __future__ import annotations

from typing import Any

from verl.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register


@register("single_turn_agent")
class SingleTurnAgentLoop(AgentLoopBase):
    """Sends the prompt tokens of the row and keeps the response unchanged."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        response = await self.client.generate(row["prompt_token_ids"], sampling_params)
        tokens = response.token_ids[: self.response_length]
        return AgentLoopOutput(
            prompt_ids=list(row["prompt_token_ids"]),
            response_ids=tokens,
            response_mask=[1] * len(tokens),
            response_logprobs=response.log_probs[: len(tokens)],
            weight_versions=response.weight_versions[: len(tokens)],
            sampling_masks=response.sampling_masks[: len(tokens)],
            stop_reason=response.stop_reason,
        )
