"""Tool responses as tokens: they match the template of the whole conversation and do not depend on the response."""

import pytest

from fixtures.chat import HERMES, MINIMAL, REFUSING, WITHOUT_TOOLS, byte_tokenizer
from verl.agent_loop.chat_template import ChatRenderer

QUESTION = [{"role": "user", "content": "What is 6 * 7?"}]
TOOLS = [{"type": "function", "function": {"name": "calculator", "description": "d", "parameters": {}}}]
RESPONSES = ["", "hello", " 42\n\n", "<tool_call>x</tool_call>", "</think> q </s", "0vErL", "(]="]


def render(tokenizer, response, tool_responses, **kwargs):
    """Render the whole conversation with the template."""
    tools = [{"role": "tool", "content": text} for text in tool_responses]
    messages = [*QUESTION, {"role": "assistant", "content": response}, *tools]
    return tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True, **kwargs)


@pytest.mark.parametrize("tool_responses", [["42"], ["42", "", " two\nlines "], ["= </tool_response> ü 数"]])
@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize(
    ("template", "kwargs"), [(HERMES, {}), (HERMES, {"enable_thinking": False}), (MINIMAL, {})], ids=str
)
def test_the_tokens_decode_to_the_rendered_conversation(template, kwargs, response, tool_responses):
    tokenizer = byte_tokenizer(template)
    renderer = ChatRenderer(tokenizer, kwargs)
    # The template adds an empty thought to the prompt, but not to that response when a later message follows it.
    prompt = ChatRenderer(tokenizer, {}).prompt(QUESTION, TOOLS)
    own = [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]
    tokens = prompt + own + renderer.tool_responses(own[-1], tool_responses, TOOLS)
    assert tokenizer.decode(tokens) == render(tokenizer, response, tool_responses, **kwargs)


@pytest.mark.parametrize("template", [HERMES, MINIMAL], ids=["hermes", "minimal"])
def test_the_joined_tokens_equal_the_tokens_of_the_whole_text(template):
    """This holds if the model generates the canonical tokens."""
    tokenizer = byte_tokenizer(template)
    renderer = ChatRenderer(tokenizer, {})
    own = [*tokenizer.encode("hello", add_special_tokens=False), tokenizer.eos_token_id]
    joined = renderer.prompt(QUESTION, TOOLS) + own + renderer.tool_responses(own[-1], ["42"], TOOLS)
    whole = tokenizer.encode(render(tokenizer, "hello", ["42"]), add_special_tokens=False)
    assert joined == whole


def test_a_turn_that_the_model_did_not_end_gets_its_end_token():
    tokenizer = byte_tokenizer(HERMES)
    renderer = ChatRenderer(tokenizer, {})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = tokenizer.convert_tokens_to_ids("</s>")
    ended, cut = (renderer.tool_responses(last, ["42"], TOOLS) for last in (end, other))
    assert cut == [end, *ended]


def test_the_prompt_shows_the_tools_and_the_start_of_the_response():
    tokenizer = byte_tokenizer(HERMES)
    text = tokenizer.decode(ChatRenderer(tokenizer, {"enable_thinking": False}).prompt(QUESTION, TOOLS))
    assert '"name": "calculator"' in text and text.endswith("<think>\n\n</think>\n\n")
    assert ChatRenderer(tokenizer, {}).shows_tools(TOOLS)
    blind = byte_tokenizer(MINIMAL.partition("{% endif %}")[2])
    assert not ChatRenderer(blind, {}).shows_tools(TOOLS)


@pytest.mark.parametrize(("template", "words"), [(WITHOUT_TOOLS, "ignores messages"), (REFUSING, "no tools")])
def test_a_template_without_tool_messages_is_rejected(template, words):
    with pytest.raises(ValueError, match=words):
        ChatRenderer(byte_tokenizer(template), {})


def test_a_template_that_drops_responses_is_rejected():
    template = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="the text of a response"):
        ChatRenderer(byte_tokenizer(template), {})
