"""Async reward function that asks a reward model behind an OpenAI-compatible endpoint; see README.md.

The model grades the response from 0 to 10; the reward is the grade divided by 10.
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
# By value of `max_concurrency`; each reward worker has its own.
_limits: dict[int, asyncio.Semaphore] = {}


class RewardModelError(RuntimeError):
    """Error: the reward model gave no grade."""


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
    """Grade one response.

    Args:
        data_source, solution_str, ground_truth, extra_info: the sample; the reward model sees
            `extra_info["question"]`, if present, as the task.
        base_url: URL of the endpoint, including `/v1`.
        model: name of the model at the endpoint.
        api_key_env: environment variable with the API key; unset for an endpoint without a key.
        max_tokens: largest length of the reward model's reply.
        retries: further attempts after a lost connection, a timeout or a status such as 429 or 503.
        backoff: seconds before the first retry; doubled for each further one, plus a random part of up to the same
            size.
        request_timeout: seconds per attempt.
        max_concurrency: concurrent requests of each reward worker.

    Returns:
        `score` in [0, 1]. If grading raises, the caller counts the error and sets the score to 0.

    Raises:
        RewardModelError: no reply after all attempts, the endpoint refuses the request, or the reply has no grade.
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
    """Return the last grade in a reply, divided by 10.

    Raises:
        RewardModelError: the reply has no grade, or the grade is not between 0 and 10.
    """
    grades = _GRADE.findall(reply)
    if not grades:
        raise RewardModelError(f"the reward model's reply has no line 'Score: <number>': {reply[-200:]!r}")
    grade = float(grades[-1])
    if not 0 <= grade <= 10:
        raise RewardModelError(f"the reward model's grade is {grade:g}, it must be between 0 and 10")
    return grade / 10


async def _ask(url: str, body: dict, key: str, retries: int, backoff: float, seconds: float) -> str:
    """Post a request up to `retries` + 1 times and return the text of the reply."""
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
    last = _without_key(problem, key)
    raise RewardModelError(f"{_without_login(url)} gave no reply in {attempt + 1} attempts; the last: {last}")


async def _post(url: str, body: dict, key: str, seconds: float) -> tuple[int, str]:
    """Post once; return status and text, or status 0 and the reason if there was no response."""
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
        return 0, f"no response within {seconds:g} s"
    except aiohttp.ClientError as error:
        # Only the text: the full form of some of these errors contains the headers, and so the key.
        return 0, f"{type(error).__name__}: {error}"


def _content(text: str, url: str) -> str:
    import json

    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise RewardModelError(
            f"{_without_login(url)} did not reply in the format of /chat/completions: {text[:200]!r}"
        )
    return content


def _without_login(url: str) -> str:
    """Remove user name and password from a URL."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _without_key(text: str, key: str) -> str:
    return text.replace(key, "***") if key else text
