"""The parts of the backend that need no engine: messages, and the check of vLLM's API."""

from abc import ABC, abstractmethod

import pytest
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from verl.workers.rollout.vllm_rollout.weight_transfer import VerlInitInfo, VerlUpdateInfo, check_api, is_exact

BUCKET = {"version": 1, "index": 0, "last": True, "nbytes": 0, "segment": None, "checksum": 0, "entries": []}
MANIFEST = {"version": 1, "num_buckets": 1, "specs": []}


def without(message, key):
    return {name: value for name, value in message.items() if name != key}


def test_update_info_has_one_bucket_or_one_manifest():
    assert VerlUpdateInfo(bucket=BUCKET).bucket == BUCKET
    assert VerlUpdateInfo(manifest=MANIFEST).manifest == MANIFEST
    for info in ({}, {"bucket": BUCKET, "manifest": MANIFEST}):
        with pytest.raises(ValueError, match="one of the keys bucket and manifest"):
            VerlUpdateInfo(**info)


@pytest.mark.parametrize("key", BUCKET)
def test_missing_key_of_a_bucket_is_named(key):
    with pytest.raises(ValueError, match=rf"update_info\.bucket: missing key '{key}'"):
        VerlUpdateInfo(bucket=without(BUCKET, key))


@pytest.mark.parametrize("key", MANIFEST)
def test_missing_key_of_a_manifest_is_named(key):
    with pytest.raises(ValueError, match=rf"update_info\.manifest: missing key '{key}'"):
        VerlUpdateInfo(manifest=without(MANIFEST, key))


@pytest.mark.parametrize("value", [[], "x", 3])
def test_value_that_is_no_dictionary_is_named(value):
    with pytest.raises(ValueError, match=r"update_info\.bucket=.*must be a dictionary"):
        VerlUpdateInfo(bucket=value)


def test_unknown_side_is_refused():
    with pytest.raises(ValueError, match=r"init_info\.quantization_side='trainer': must be one of sender, receiver"):
        VerlInitInfo(quantization_side="trainer")


class Older(ABC):
    """A backend of vLLM 0.23."""

    def __init__(self, config, parallel_config):
        self.config, self.parallel_config = config, parallel_config

    @abstractmethod
    def trainer_send_weights(self): ...


def test_vllm_with_another_interface_is_refused_by_name():
    check_api(WeightTransferEngine)
    with pytest.raises(NotImplementedError, match=r"config, parallel_config and has the methods trainer_send_weights;"):
        check_api(Older)


@pytest.mark.parametrize(
    ("sent", "held", "exact"),
    [
        ("bfloat16", "float32", True),
        ("float16", "float32", True),
        ("float32", "bfloat16", False),
        ("float16", "bfloat16", False),
        ("bfloat16", "float16", False),
        ("float64", "float32", False),
    ],
)
def test_dtypes_that_would_round(sent, held, exact):
    assert is_exact(sent, held) == exact
