"""The config file of a Prometheus server: only the job of the replicas is replaced."""

import http.server
import threading

import pytest
import yaml

from verl.config.rollout import PrometheusConfig
from verl.trainer.ppo.prometheus_file import PrometheusFile


@pytest.fixture
def server():
    """A server that records its requests; `requests` and `port` are its attributes, `received` is set by each."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            made.requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            made.received.set()

        def log_message(self, *_):
            pass

    made = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    made.requests, made.received, made.port = [], threading.Event(), made.server_address[1]
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_the_job_of_the_replicas_is_replaced_and_read_again(tmp_path, server):
    path = tmp_path / "metrics" / "prometheus.yml"
    file = PrometheusFile(PrometheusConfig(enable=True, port=server.port, file=str(path)))
    file.add(1, "http://127.0.0.1:4001")
    assert server.received.wait(60) and server.requests == ["/-/reload"]
    ray = {"job_name": "ray", "file_sd_configs": [{"files": ["/x.json"]}]}
    content = yaml.safe_load(path.read_text())
    assert content["global"]["scrape_interval"] == "10s"
    content["scrape_configs"].insert(0, ray)
    path.write_text(yaml.safe_dump(content))
    file.add(0, "http://127.0.0.1:4000")
    file.add(1, "http://127.0.0.1:4002")  # restarted
    jobs = yaml.safe_load(path.read_text())["scrape_configs"]
    assert jobs == [
        ray,
        {
            "job_name": "rollout",
            "static_configs": [
                {"targets": ["127.0.0.1:4000"], "labels": {"replica": "0"}},
                {"targets": ["127.0.0.1:4002"], "labels": {"replica": "1"}},
            ],
        },
    ]


@pytest.mark.parametrize(("text", "words"), [("a: [", "invalid YAML"), ("- 1", "not a config of a Prometheus server")])
def test_other_files_are_not_overwritten(tmp_path, text, words):
    path = tmp_path / "other.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        PrometheusFile(PrometheusConfig(file=str(path))).add(0, "http://127.0.0.1:1")
    assert path.read_text() == text
