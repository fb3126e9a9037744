from verl.utils.network import interface_of, ray_cluster


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
