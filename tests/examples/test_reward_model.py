"""The reward-model example with a small local endpoint, through real reward workers."""

import asyncio
import json
import logging
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from verl.config import CustomRewardFunctionConfig, RewardConfig
from verl.workers.reward import RewardLoop

KEY = "not-for-anyone-s-eyes"


class Endpoint(BaseHTTPRequestHandler):
    """Endpoint whose behavior depends on the answer to grade, which is part of the prompt."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        answer = prompt.split("Answer to grade:\n")[1].split("\n\nExplain")[0]
        server = self.server
        with server.lock:
            server.seen[answer] += 1
            server.running += 1
            server.most = max(server.most, server.running)
            server.requests.append((self.path, self.headers.get("Authorization"), body["model"], prompt))
            first = server.seen[answer] == 1
        status, reply = 200, f"Fine.\nScore: {answer.split()[-1]}"
        if answer.startswith("once 500") and first:
            status = 500
        elif answer.startswith("always 503"):
            status = 503
        elif answer.startswith("refuse"):
            status = 401
        elif answer.startswith("no grade"):
            reply = "I would rather not say."
        elif answer.startswith("slow"):
            server.pause.wait(0.2)
        text = json.dumps({"choices": [{"message": {"content": reply}}]})
        if status != 200:
            text = f"wrong key: {self.headers.get('Authorization')}"
        elif answer.startswith("garbage"):
            text = "<html>hello</html>"
        with server.lock:
            server.running -= 1
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.lock, server.seen, server.requests = threading.Lock(), Counter(), []
    server.running = server.most = 0
    server.pause = threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def grade(load_example, monkeypatch):
    """`grade(url, answers, **kwargs)`: results of the reward loop for the answers."""
    path = load_example("reward_model/reward.py").__file__
    monkeypatch.setenv("REWARD_MODEL_API_KEY", KEY)

    def run(url, answers, **kwargs):
        function = CustomRewardFunctionConfig(
            path=path, reward_kwargs={"base_url": url, "model": "judge", "backoff": 0.01, "retries": 2, **kwargs}
        )
        loop = RewardLoop(RewardConfig(custom_reward_function=function, num_workers=1, timeout=8.0))

        async def gather():
            return await asyncio.gather(*(loop.score("d", answer, "42", {"question": "6x7"}) for answer in answers))

        try:
            return asyncio.run(gather())
        finally:
            loop.close()

    return run


def test_grades_retries_and_errors(endpoint, grade, caplog):
    answers = ["good 7", "once 500 then 10", "always 503", "refuse", "garbage", "no grade", "too much 11"]
    with caplog.at_level(logging.DEBUG):
        results = dict(zip(answers, grade(endpoint.url, answers), strict=True))
    assert [result.score for result in results.values()] == [0.7, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert [result.error for result in results.values()] == [None, None, *["exception"] * 5]
    assert endpoint.seen == Counter(answers) + Counter({"once 500 then 10": 1, "always 503": 2})
    reasons = {
        "always 503": "in 3 attempts; the last: HTTP 503",
        "refuse": "in 1 attempts; the last: HTTP 401: 'wrong key: Bearer ***'",
        "garbage": "did not reply in the format of /chat/completions: '<html>hello</html>'",
        "no grade": "no line 'Score: <number>': 'I would rather not say.'",
        "too much 11": "grade is 11, it must be between 0 and 10",
    }
    for answer, reason in reasons.items():
        assert reason in results[answer].detail, results[answer].detail
    paths, keys, models, prompts = zip(*endpoint.requests, strict=True)
    assert (set(paths), set(keys), set(models)) == ({"/v1/chat/completions"}, {f"Bearer {KEY}"}, {"judge"})
    assert all("6x7" in prompt and "42" in prompt for prompt in prompts)
    assert KEY not in caplog.text + "".join(result.detail for result in results.values())
    assert caplog.records  # the first failure is logged


def test_an_endpoint_that_is_down_and_one_that_does_not_respond(grade):
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        # A password in the address must not appear in a log either.
        port = closed.getsockname()[1]
        (dead,) = grade(f"http://someone:{KEY}@127.0.0.1:{port}/v1", ["x 1"], api_key_env="NOT_SET")
        (mute,) = grade(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", ["x 1"], request_timeout=0.1, retries=1)
    assert (dead.score, dead.error) == (mute.score, mute.error) == (0.0, "exception")
    assert f"http://127.0.0.1:{port}/v1/chat/completions gave no reply in 3 attempts" in dead.detail
    assert KEY not in dead.detail
    assert "the last: ClientConnectorError: Cannot connect" in dead.detail
    assert "gave no reply in 2 attempts; the last: no response within 0.1 s" in mute.detail


def test_concurrent_requests_do_not_exceed_the_limit(endpoint, grade):
    results = grade(endpoint.url, [f"slow {i} 5" for i in range(9)], max_concurrency=3)
    assert [result.score for result in results] == [0.5] * 9
    assert 2 <= endpoint.most <= 3


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Score: 7", 0.7),
        ("It says Score: 3 somewhere.\n**Score: 8.5/10**", 0.85),
        ("Score: 2\nno, rather\nscore: 4.", 0.4),
        ("Score: 0", 0.0),
    ],
)
def test_the_last_grade_of_a_reply_is_used(load_example, reply, expected):
    assert load_example("reward_model/reward.py").parse_grade(reply) == pytest.approx(expected)


@pytest.mark.parametrize("reply", ["", "Score:", "Score: high", "Score: -1", "Score: 100", "my score is about 7 or so"])
def test_a_reply_without_a_grade_is_an_error(load_example, reply):
    module = load_example("reward_model/reward.py")
    with pytest.raises(module.RewardModelError):
        module.parse_grade(reply)
