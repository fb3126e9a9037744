"""Reading the tensors of a checkpoint without reading its weights."""

import json
import subprocess
import sys

import pytest
import torch

from fixtures.header_checkpoint import write_header_checkpoint
from fixtures.tiny import write_tiny_model
from verl.utils.model_dir.index import read_checkpoint_index
from verl.utils.quantization.ascend_description import build_description

TENSORS = {"a.weight": ((3, 5), "BF16"), "b.weight": ((7,), "F32"), "c": ((2, 2, 2), "U8")}


@pytest.mark.parametrize("shards", [1, 3])
def test_single_file_and_shards_give_the_same_index(tmp_path, shards):
    index = read_checkpoint_index(write_header_checkpoint(tmp_path, {}, TENSORS, shards=shards))
    assert {name: (info.shape, info.dtype) for name, info in index.tensors.items()} == TENSORS
    assert [index.tensors[name].nbytes for name in TENSORS] == [30, 28, 8]


def convert_to_torch(directory, shards):
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
    convert_to_torch(directory, shards)
    description = build_description(directory)
    assert sorted(description.layers, key=lambda la: la.name) == sorted(expected.layers, key=lambda la: la.name)
    assert description.to_json_dict() == expected.to_json_dict()


def test_pytorch_weights_are_not_read(tmp_path):
    """A file with 64 MiB of zeros costs no memory in a fresh process."""
    torch.save({"model.embed_tokens.weight": torch.zeros(2**24)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import re, sys, torch\n"
        "from verl.utils.model_dir.index import read_checkpoint_index\n"
        # Not getrusage: its maximum survives exec and is that of the parent.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "before, index = peak(), read_checkpoint_index(sys.argv[1])\n"
        "print(index.tensors['model.embed_tokens.weight'].shape[0], peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    elements, kib = map(int, done.stdout.split())
    assert elements == 2**24
    assert kib < 2**14  # a quarter of the tensor


def test_pytorch_file_without_a_state_dict_is_rejected(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02not a checkpoint")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: cannot be read .* convert the checkpoint to safetensors"):
        read_checkpoint_index(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
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


def test_index_with_more_tensors_than_the_files_is_rejected(tmp_path):
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
