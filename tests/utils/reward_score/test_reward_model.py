"""The conversation that a discriminative reward model reads, and its replies."""

import asyncio

import pytest
from aiohttp import web
from transformers import AutoTokenizer

from fixtures.tiny import CHARS, write_char_tokenizer
from verl.utils.reward_score.reward_model import RewardModelScorer

PROMPT = [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]


@pytest.fixture
def tokenizer(tmp_path):
    template = "<s>{% for m in messages %}{{ m['role'][0] + m['content'] + '</s>' }}{% endfor %}"
    return AutoTokenizer.from_pretrained(write_char_tokenizer(tmp_path, template))


def test_the_models_own_template_puts_prompt_and_response_together(tokenizer):
    def ids(text):
        return [4 + CHARS.index(character) for character in text]

    found = RewardModelScorer("", "", tokenizer).token_ids(PROMPT, "cd")
    assert found == [1, *ids("ss"), 2, *ids("uab"), 2, *ids("acd"), 2]


@pytest.mark.parametrize("prompt", [None, "text"])
def test_a_row_without_messages_is_an_error(tokenizer, prompt):
    with pytest.raises(ValueError, match="needs the messages of the prompt"):
        RewardModelScorer("", "", tokenizer).token_ids(prompt, "cd")


@pytest.mark.parametrize(
    ("status", "reply", "words"),
    [
        (200, {"data": [{"probs": [-1.25]}]}, None),
        (400, {"error": "too long"}, "HTTP 400: .*too long"),
        (200, {"data": [{"probs": [0.5, 0.5]}]}, "2 values"),
    ],
)
def test_the_score_is_the_value_of_the_head_and_anything_else_an_error(tokenizer, status, reply, words):
    seen = []

    async def classify(request):
        seen.append(await request.json())
        return web.json_response(reply, status=status)

    async def run():
        app = web.Application()
        app.router.add_post("/classify", classify)
        runner = web.AppRunner(app, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = site._server.sockets[0].getsockname()
        scorer = RewardModelScorer(f"{host}:{port}", "name", tokenizer)
        try:
            return await scorer("d", "cd", None, {}, PROMPT)
        finally:
            await scorer._session.close()
            await runner.cleanup()

    if words is None:
        assert asyncio.run(run()) == {"score": -1.25}
    else:
        with pytest.raises(RuntimeError, match=words):
            asyncio.run(run())
    (request,) = seen
    assert request["use_activation"] is False and request["model"] == "name"
    assert request["input"] == RewardModelScorer("", "", tokenizer).token_ids(PROMPT, "cd")
