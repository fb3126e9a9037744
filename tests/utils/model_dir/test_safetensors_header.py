"""Headers of safetensors files compared with the library, and damaged files."""

import struct

import pytest
from safetensors import safe_open

from fixtures.header_checkpoint import write_header_checkpoint
from fixtures.tiny import write_tiny_model
from verl.utils.model_dir.index import read_checkpoint_index

TENSORS = {"a.weight": ((3, 5), "BF16"), "b.weight": ((7,), "F32"), "c": ((2, 2, 2), "U8")}


def test_shapes_and_dtypes_agree_with_the_library(tmp_path):
    directory = write_tiny_model(tmp_path, kind="qwen3_moe", dtype="bfloat16")
    index = read_checkpoint_index(directory)
    with safe_open(directory / "model.safetensors", "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: info.shape for name, info in index.tensors.items()} == expected
    assert {info.dtype for info in index.tensors.values()} == {"BF16"}
    assert index.config["model_type"] == "qwen3_moe"


def damage_header(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[:8] + b"[" + raw[9 : 8 + length] + raw[8 + length :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw[:20], "its header should have"),
        (lambda raw: raw[:3], "too few for a header"),
        (lambda raw: b"", "too few for a header"),
        (lambda raw: b"\xff" * 8 + raw[8:], "its header should have"),
        (damage_header, "its header is not JSON"),
        (lambda raw: raw.replace(b'"BF16"', b'"BF17"'), "'dtype': 'BF17'"),
        (lambda raw: raw.replace(b'"shape": [3, 5]', b'"shape":[-3,-5]'), "its header contradicts itself"),
        (lambda raw: raw.replace(b"[30, 58]", b"[0 , 28]"), "the data of a.weight begins at byte 0, expected 28"),
        (lambda raw: raw.replace(b'"shape"', b'"shope"'), "its header does not describe"),
    ],
)
def test_damaged_file_is_rejected(tmp_path, damage, message):
    write_header_checkpoint(tmp_path, {}, TENSORS)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"model.safetensors is damaged: .*{message}"):
        read_checkpoint_index(tmp_path)
