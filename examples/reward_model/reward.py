"""A reward model behind an OpenAI-compatible endpoint, as an async reward function; see README.md beside it.

The model is asked to grade the answer from 0 to 10; the reward is its grade divided by 10.
"""

import asyncio
import os
import random
import re
from typing import Any
from urllib.parse import urlsplit

PROMPT = """Grade the answer to the task below from 0 (useless) to 10 (perfect).

Task:
{question}

Reference answer:
{reference}

Answer to grade:
{answer}

Explain in one or two sentences, then end with a line of its own: Score: <number from 0 to 10>"""

_GRADE = re.compile(r"^\W*score\W*?\s*(-?\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*$", re.IGNORECASE | re.MULTILINE)
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
# One for each limit that is asked for, in each reward worker.
_limits: dict[int, asyncio.Semaphore] = {}


class RewardModelError(RuntimeError):
    """The reward model gave no grade."""


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None,
    *,
    base_url: str = "http://127.0.0.1:8000/v1",
    model: str = "",
    api_key_env: str = "REWARD_MODEL_API_KEY",
    max_tokens: int = 512,
    retries: int = 3,
    backoff: float = 0.5,
    request_timeout: float = 60.0,
    max_concurrency: int = 32,
) -> dict[str, Any]:
    """Grade one answer.

    Args:
        data_source, solution_str, ground_truth, extra_info: the sample; `extra_info["question"]` is shown to the
            reward model as the task where it is there.
        base_url: of the endpoint, up to and with `/v1`.
        model: the name that the endpoint serves.
        api_key_env: environment variable that holds the key; unset for an endpoint that wants none.
        max_tokens: of the reward model's reply.
        retries: further attempts after one that failed on the way or with a status such as 429 or 503.
        backoff: seconds before the first of them, doubled each time, and up to as much again by chance.
        request_timeout: seconds for one attempt.
        max_concurrency: requests at a time in each reward worker.

    Returns:
        `score` in [0, 1]. The caller counts a sample whose grading raises, and gives it 0.

    Raises:
        RewardModelError: no reply after all attempts, the endpoint refuses, or the reply holds no grade.
    """
    question = (extra_info or {}).get("question", "(not given)")
    content = PROMPT.format(question=question, reference=ground_truth, answer=solution_str)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0.0,
        "max_tokens": max_tokens,
    }
    limit = _limits.setdefault(max_concurrency, asyncio.Semaphore(max_concurrency))
    async with limit:
        url = f"{base_url.rstrip('/')}/chat/completions"
        reply = await _ask(url, body, os.environ.get(api_key_env, ""), retries, backoff, request_timeout)
    return {"score": parse_grade(reply)}


def parse_grade(reply: str) -> float:
    """The last grade in a reply, as a share of 10.

    Raises:
        RewardModelError: there is none, or it is not between 0 and 10.
    """
    grades = _GRADE.findall(reply)
    if not grades:
        raise RewardModelError(f"the reward model's reply has no line 'Score: <number>': {reply[-200:]!r}")
    grade = float(grades[-1])
    if not 0 <= grade <= 10:
        raise RewardModelError(f"the reward model gave {grade:g}, which is not between 0 and 10")
    return grade / 10


async def _ask(url: str, body: dict, key: str, retries: int, backoff: float, seconds: float) -> str:
    """The reply's text, after as many attempts as it takes."""
    problem = ""
    for attempt in range(retries + 1):
        if attempt:
            await asyncio.sleep(backoff * 2 ** (attempt - 1) * (1 + random.random()))
        status, text = await _post(url, body, key, seconds)
        if status == 200:
            return _content(text, url)
        problem = f"HTTP {status}: {text[:200]!r}" if status else text
        if status and status not in _TRY_AGAIN:
            break
    raise RewardModelError(f"{_shown(url)} gave no reply in {attempt + 1} attempts; the last: {_hidden(problem, key)}")


async def _post(url: str, body: dict, key: str, seconds: float) -> tuple[int, str]:
    """Status and text of one attempt; status 0 with the reason where there was no answer."""
    import aiohttp

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        timeout = aiohttp.ClientTimeout(total=seconds)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, json=body, headers=headers) as response,
        ):
            return response.status, await response.text(errors="replace")
    except TimeoutError:
        return 0, f"no answer within {seconds:g} s"
    except aiohttp.ClientError as error:
        # Its text only: the full form of some of these holds the headers, and so the key.
        return 0, f"{type(error).__name__}: {error}"


def _content(text: str, url: str) -> str:
    import json

    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise RewardModelError(f"{_shown(url)} did not answer as /chat/completions does: {text[:200]!r}")
    return content


def _shown(url: str) -> str:
    """A URL without a user's name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _hidden(text: str, key: str) -> str:
    return text.replace(key, "***") if key else text
