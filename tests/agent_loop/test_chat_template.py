"""Tool responses as tokens: what the whole conversation's template says, and none of it depending on the answer."""

import pytest

from fixtures.chat import HERMES, MINIMAL, REFUSING, WITHOUT_TOOLS, byte_tokenizer
from verl.agent_loop.chat_template import ChatRenderer

QUESTION = [{"role": "user", "content": "What is 6 * 7?"}]
TOOLS = [{"type": "function", "function": {"name": "calculator", "description": "d", "parameters": {}}}]
ANSWERS = ["", "hello", " 42\n\n", "<tool_call>x</tool_call>", "</think> q </s", "0vErL", "(]="]


def with_answer(tokenizer, answer, responses, **kwargs):
    """Text of the whole conversation by the template itself."""
    tools = [{"role": "tool", "content": response} for response in responses]
    messages = [*QUESTION, {"role": "assistant", "content": answer}, *tools]
    return tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True, **kwargs)


@pytest.mark.parametrize("responses", [["42"], ["42", "", " two\nlines "], ["= </tool_response> ü 数"]])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize(
    ("template", "kwargs"), [(HERMES, {}), (HERMES, {"enable_thinking": False}), (MINIMAL, {})], ids=str
)
def test_prompt_answer_and_responses_read_as_the_template_renders_them(template, kwargs, answer, responses):
    tokenizer = byte_tokenizer(template)
    renderer = ChatRenderer(tokenizer, kwargs)
    # The opening of an answer without thoughts is part of the prompt, not of later renderings of that answer.
    prompt = ChatRenderer(tokenizer, {}).prompt(QUESTION, TOOLS)
    own = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    tokens = prompt + own + renderer.tool_responses(own[-1], responses, TOOLS)
    assert tokenizer.decode(tokens) == with_answer(tokenizer, answer, responses, **kwargs)


@pytest.mark.parametrize("template", [HERMES, MINIMAL], ids=["hermes", "minimal"])
def test_the_seam_has_the_tokens_of_the_whole_text(template):
    """Where the model writes canonical tokens, nothing shows that the conversation was put together."""
    tokenizer = byte_tokenizer(template)
    renderer = ChatRenderer(tokenizer, {})
    own = [*tokenizer.encode("hello", add_special_tokens=False), tokenizer.eos_token_id]
    put_together = renderer.prompt(QUESTION, TOOLS) + own + renderer.tool_responses(own[-1], ["42"], TOOLS)
    whole = tokenizer.encode(with_answer(tokenizer, "hello", ["42"]), add_special_tokens=False)
    assert put_together == whole


def test_a_turn_that_the_model_did_not_end_itself_is_ended():
    tokenizer = byte_tokenizer(HERMES)
    renderer = ChatRenderer(tokenizer, {})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = tokenizer.convert_tokens_to_ids("</s>")
    ended, cut = (renderer.tool_responses(last, ["42"], TOOLS) for last in (end, other))
    assert cut == [end, *ended]


def test_the_prompt_shows_the_tools_and_the_openings_of_the_template():
    tokenizer = byte_tokenizer(HERMES)
    text = tokenizer.decode(ChatRenderer(tokenizer, {"enable_thinking": False}).prompt(QUESTION, TOOLS))
    assert '"name": "calculator"' in text and text.endswith("<think>\n\n</think>\n\n")
    assert ChatRenderer(tokenizer, {}).shows_tools(TOOLS)
    blind = byte_tokenizer(MINIMAL.partition("{% endif %}")[2])
    assert not ChatRenderer(blind, {}).shows_tools(TOOLS)


@pytest.mark.parametrize(("template", "words"), [(WITHOUT_TOOLS, "leaves out messages"), (REFUSING, "no tools")])
def test_a_template_without_tool_messages_is_refused(template, words):
    with pytest.raises(ValueError, match=words):
        ChatRenderer(byte_tokenizer(template), {})


def test_a_template_that_drops_answers_is_refused():
    template = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="an answer's text"):
        ChatRenderer(byte_tokenizer(template), {})
