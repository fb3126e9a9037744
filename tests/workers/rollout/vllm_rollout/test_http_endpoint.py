"""The endpoint of a replica without the OpenAI API: metrics on loopback alone."""

import asyncio
import urllib.request

import pytest

from verl.config.rollout import ServerConfig
from verl.workers.rollout.vllm_rollout.http_endpoint import HttpEndpoint

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
