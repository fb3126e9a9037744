"""An agent loop in upstream verl's style, with a scripted client."""

import uuid

import pytest

from fixtures.chat import HERMES, ScriptedClient, byte_tokenizer
from verl.config import PPOConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register
from verl.extension.user_class import UserClassError
from verl.utils.dataset.prompts import prompt_token_ids
from verl.utils.rollout_trace import rollout_trace_op


class Upstream(AgentLoopBase):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.limit = self.rollout_config.get("response_length", self.response_length)

    @rollout_trace_op
    async def run(self, sampling_params, **kwargs):
        prompt_ids = await self.apply_chat_template(list(kwargs["raw_prompt"]), images=None)
        output = await self.server_manager.generate(
            request_id=uuid.uuid4().hex, prompt_ids=prompt_ids, sampling_params=sampling_params, image_data=None
        )
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=output.token_ids[: self.limit],
            response_mask=[1] * len(output.token_ids),
            response_logprobs=None,
            metrics=AgentLoopMetrics(generate_sequences=0.5),
        )


async def test_a_loop_in_upstream_style_runs():
    register("upstream_style_for_this_test")(Upstream)
    tokenizer, client = byte_tokenizer(HERMES), ScriptedClient([[11, 12]])
    messages = [{"role": "user", "content": "q"}]
    output = await Upstream(client, tokenizer, PPOConfig()).run({"max_tokens": 4}, raw_prompt=messages)
    assert output.prompt_ids == prompt_token_ids(tokenizer, messages, {}) == client.requests[0][0]
    assert output.response_ids == [11, 12] and output.response_logprobs == []
    assert output.metrics == {"generate_sequences": 0.5}


async def test_images_are_refused():
    loop = Upstream(ScriptedClient([]), byte_tokenizer(HERMES), PPOConfig())
    with pytest.raises(NotImplementedError, match="image_data"):
        await loop.server_manager.generate("r", prompt_ids=[1], sampling_params={}, image_data=["image"])
    with pytest.raises(NotImplementedError, match="images"):
        await loop.apply_chat_template([{"role": "user", "content": "q"}], images=["image"])


def test_an_override_that_is_never_called_is_refused():
    with pytest.raises(UserClassError, match="init_class: rename it to setup"):
        register("with_init_class")(type("Mine", (Upstream,), {"init_class": classmethod(lambda cls: None)}))
    with pytest.raises(TypeError, match="must be a subclass of AgentLoopBase"):
        register("no_loop")(dict)
