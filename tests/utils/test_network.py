import socket

import pytest

from verl.utils.network import interface_of, ray_cluster, require_ray_cluster


def test_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


def test_ray_cluster_is_the_one_that_a_run_would_join(tmp_path):
    assert ray_cluster({}, root=tmp_path) is None
    (tmp_path / "tmp/ray").mkdir(parents=True)
    (tmp_path / "tmp/ray/ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert ray_cluster({}, root=tmp_path) == "10.0.0.1:6379"
    assert ray_cluster({"RAY_ADDRESS": "10.0.0.2:1"}, root=tmp_path) == "10.0.0.2:1"
    assert ray_cluster({"RAY_ADDRESS": "local"}, root=tmp_path) is None
    assert ray_cluster({"TMPDIR": str(tmp_path / "tmp")}) == "10.0.0.1:6379"
    assert ray_cluster({"RAY_TMPDIR": str(tmp_path / "elsewhere"), "TMPDIR": str(tmp_path / "tmp")}) is None


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]  # bound but not listening: connections are refused


def test_a_stale_ray_address_is_named(tmp_path, closed_port):
    address = f"127.0.0.1:{closed_port}"
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}.*RAY_ADDRESS={address} names"):
        require_ray_cluster({"RAY_ADDRESS": address}, seconds=0)
    with pytest.raises(ConnectionError, match=r"ray_kwargs\.ray_init\.address=ray://127"):
        require_ray_cluster({}, asked=f"ray://{address}", seconds=0)
    (tmp_path / "tmp/ray").mkdir(parents=True)
    (tmp_path / "tmp/ray/ray_current_cluster").write_text(address)
    for asked in (None, "auto"):
        with pytest.raises(ConnectionError, match=r"ray/ray_current_cluster .written by `ray start`. names"):
            require_ray_cluster({}, asked=asked, root=tmp_path, seconds=0)


def test_a_cluster_that_answers_and_none_at_all_are_accepted(tmp_path):
    require_ray_cluster({}, root=tmp_path)
    require_ray_cluster({"RAY_ADDRESS": "local"}, root=tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        require_ray_cluster({"RAY_ADDRESS": f"127.0.0.1:{server.getsockname()[1]}"})
