"""The Ray cluster of a run: who can reach it, and at which priority its processes run."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

from verl.single_controller import local_cluster

SCRIPT = """
import json, os, stat
import grpc, psutil, ray
from ray._private import services
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from verl.single_controller.local_cluster import local_cluster

# A host with a network: Ray takes this address for its own, unless it is told not to.
services.node_ip_address_from_perspective = lambda address: "127.0.0.2"

def status(metadata):
    channel = grpc.insecure_channel(ray.get_runtime_context().gcs_address)
    stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
    try:
        stub.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), timeout=60, metadata=metadata)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"

@ray.remote
def nice():
    return os.nice(0)

def listening():
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield connection.laddr.ip

before = dict(os.environ)
with local_cluster({"num_cpus": 1, "include_dashboard": False, "log_to_driver": False}):
    path = os.environ["RAY_AUTH_TOKEN_PATH"]
    found = {
        "nice": ray.get(nice.remote()),
        "addresses": sorted(set(listening())),
        "mode": oct(stat.S_IMODE(os.stat(path).st_mode)),
        "without token": status([]),
        "wrong token": status([("authorization", "Bearer " + "0" * 64)]),
        "token": status([("authorization", "Bearer " + open(path).read())]),
    }
found["left"] = os.path.exists(os.path.dirname(path)) or dict(os.environ) != before
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("niceness", [None, "3"])
def test_only_this_user_of_this_host_can_use_the_cluster_of_a_run(niceness):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    if niceness is not None:
        environment["RAY_worker_niceness"] = niceness
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found.pop("addresses")) <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert found == {
        "nice": int(niceness or 0) + os.nice(0),
        "mode": "0o600",
        "without token": "UNAUTHENTICATED",
        "wrong token": "UNAUTHENTICATED",
        "token": "OK",
        "left": False,
    }


def test_folders_of_killed_runs_are_removed(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = [f"verl-ray-{os.getpid()}-abc", "verl-ray-abc", "verl-ray-x-abc", f"other-{ended.pid}-abc"]
    for name in [*kept, f"verl-ray-{ended.pid}-abc"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text("secret")
    local_cluster._remove_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
