"""Reading what a checkpoint holds without reading its weights."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from fixtures.header_checkpoint import write_header_checkpoint
from fixtures.tiny import write_tiny_model
from verl.utils.model_dir.index import read_checkpoint_index
from verl.utils.quantization.ascend_description import build_description

TENSORS = {"a.weight": ((3, 5), "BF16"), "b.weight": ((7,), "F32"), "c": ((2, 2, 2), "U8")}


def test_safetensors_agree_with_the_library(tmp_path):
    directory = write_tiny_model(tmp_path, kind="qwen3_moe", dtype="bfloat16")
    index = read_checkpoint_index(directory)
    with safe_open(directory / "model.safetensors", "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: info.shape for name, info in index.tensors.items()} == expected
    assert {info.dtype for info in index.tensors.values()} == {"BF16"}
    assert index.config["model_type"] == "qwen3_moe"


@pytest.mark.parametrize("shards", [1, 3])
def test_one_file_or_shards(tmp_path, shards):
    index = read_checkpoint_index(write_header_checkpoint(tmp_path, {}, TENSORS, shards=shards))
    assert {name: (info.shape, info.dtype) for name, info in index.tensors.items()} == TENSORS
    assert [index.tensors[name].nbytes for name in TENSORS] == [30, 28, 8]


def as_torch(directory, shards):
    from safetensors.torch import load_file

    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    weight_map = {}
    for shard in range(shards):
        names = list(state)[shard::shards]
        torch.save({name: state[name] for name in names}, directory / f"pytorch_model-{shard}.bin")
        weight_map |= dict.fromkeys(names, f"pytorch_model-{shard}.bin")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_files_give_the_same_description(tmp_path, shards):
    directory = write_tiny_model(tmp_path, dtype="bfloat16")
    expected = build_description(directory)
    as_torch(directory, shards)
    description = build_description(directory)
    assert sorted(description.layers, key=lambda la: la.name) == sorted(expected.layers, key=lambda la: la.name)
    assert description.to_json_dict() == expected.to_json_dict()


def test_pytorch_files_are_not_read(tmp_path):
    """64 MiB of zeros costs no memory, in a process that never had it."""
    torch.save({"model.embed_tokens.weight": torch.zeros(2**24)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import re, sys, torch\n"
        "from verl.utils.model_dir.index import read_checkpoint_index\n"
        # not getrusage: its maximum survives exec, and is the parent's
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "before, index = peak(), read_checkpoint_index(sys.argv[1])\n"
        "print(index.tensors['model.embed_tokens.weight'].shape[0], peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    elements, kib = map(int, done.stdout.split())
    assert elements == 2**24
    assert kib < 2**14  # a quarter of the tensor


def test_a_pytorch_file_that_is_no_state_dict(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02not a checkpoint")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: cannot be read .* convert the checkpoint to safetensors"):
        read_checkpoint_index(tmp_path)


def test_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        read_checkpoint_index(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        read_checkpoint_index(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint found; expected model.safetensors.index.json"):
        read_checkpoint_index(tmp_path)
    write_header_checkpoint(tmp_path, {}, TENSORS, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: missing"):
        read_checkpoint_index(tmp_path)


def test_an_index_that_promises_more_than_its_files_hold(tmp_path):
    write_header_checkpoint(tmp_path, {}, TENSORS, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["d.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"does not hold 'd.weight'"):
        read_checkpoint_index(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no 'weight_map'"):
        read_checkpoint_index(tmp_path)


def damage_header(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[:8] + b"[" + raw[9 : 8 + length] + raw[8 + length :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "cut short"),
        (lambda raw: raw[:20], "cut short in its header"),
        (lambda raw: raw[:3], "cut short in its header"),
        (lambda raw: b"", "cut short in its header"),
        (lambda raw: b"\xff" * 8 + raw[8:], "not a safetensors file"),
        (damage_header, "damaged safetensors header"),
        (lambda raw: raw.replace(b'"BF16"', b'"BF17"'), "dtype 'BF17'"),
        (lambda raw: raw.replace(b'"shape"', b'"shope"'), "damaged safetensors header"),
    ],
)
def test_damaged_safetensors(tmp_path, damage, message):
    write_header_checkpoint(tmp_path, {}, TENSORS)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"):
        read_checkpoint_index(tmp_path)
