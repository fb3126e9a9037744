"""The HTTP endpoint of a replica: what it serves without the key, without weights, and without the OpenAI API."""

import asyncio
import urllib.request

import pytest

from fixtures.tiny import write_tiny_model
from verl.config.rollout import ServerConfig
from verl.utils.vllm.server import build_openai_app, call_app
from verl.workers.rollout.vllm_rollout.http_endpoint import HARMLESS, Guard, HttpEndpoint

prometheus_client = pytest.importorskip("prometheus_client")


@pytest.mark.slow
async def test_metrics_are_served_on_loopback_without_the_api():
    pytest.importorskip("vllm")
    gauge = prometheus_client.Gauge("verl_test_gauge", "a gauge")
    gauge.set(0.25)
    endpoint = HttpEndpoint(ServerConfig(), 0, refusal=lambda: "no weights yet")
    address = await endpoint.start(None, None)
    try:
        assert address.startswith("http://127.0.0.1:")
        with await asyncio.to_thread(urllib.request.urlopen, f"{address}/metrics", timeout=60) as answer:
            assert "verl_test_gauge 0.25" in answer.read().decode()
        with await asyncio.to_thread(urllib.request.urlopen, f"{address}/v1/models", timeout=60) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain"), "no API"
    finally:
        await endpoint.stop()
        prometheus_client.REGISTRY.unregister(gauge)


def routes(model):
    """Method and path of every route of vLLM's application, and the application."""
    app, _ = build_openai_app(str(model), ("generate",), None, api_key="secret")
    found = set()
    for route in app.routes:
        for method in getattr(route, "methods", None) or {"GET", "POST"}:
            found.add((method, route.path.replace("{response_id}", "r1")))
    return sorted(found), app


@pytest.mark.slow
@pytest.mark.parametrize("development", ["0", "1"])
async def test_every_route_needs_the_key_or_is_harmless(tmp_path, monkeypatch, development):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", development)
    found, app = routes(write_tiny_model(tmp_path))
    assert ("POST", "/invocations") in found and len(found) > 20
    assert not {"/collective_rpc", "/sleep", "/reset_prefix_cache", "/pause"} & {path for _, path in found}
    guard = Guard(app, "secret", lambda: None)
    for method, path in found:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer "},
        ):
            status, _, _ = await call_app(guard, method, path, headers, b"{}")
            assert (status != 401) == (path in HARMLESS), (method, path, headers, status)
    assert {path for _, path in found} >= HARMLESS


@pytest.mark.slow
async def test_no_route_answers_without_weights(tmp_path):
    pytest.importorskip("vllm")
    found, app = routes(write_tiny_model(tmp_path))
    guard = Guard(app, "secret", lambda: "no weights yet")
    for method, path in found:
        if method == "POST" and path not in HARMLESS:
            status, _, body = await call_app(guard, method, path, {"Authorization": "Bearer secret"}, b"{}")
            assert status == 503 and b"no weights yet" in body, path


async def test_the_key_opens_the_application():
    asked = []

    async def app(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(app, "secret", lambda: None)
    status, _, _ = await call_app(guard, "POST", "/v1/completions", {"Authorization": "Bearer secret"}, b"{}")
    assert status == 204 and asked == ["/v1/completions"]


async def test_other_connections_than_http_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    await Guard(None, "secret", lambda: None)({"type": "websocket", "path": "/v1/realtime"}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]
