"""Tests of the manifest of a full update."""

import pytest

from verl.workers.weight_sync.manifest import Manifest, TensorSpec, WeightUpdateError, check_received


def test_manifest_survives_its_message_and_names_the_difference():
    manifest = Manifest(3, 2)
    manifest.add(TensorSpec("w", (2, 3), "bfloat16"))
    back = Manifest.from_message(manifest.to_message())
    assert back == manifest and back.nbytes == 12
    check_received(manifest, back)
    with pytest.raises(WeightUpdateError, match="finished version 3, but the engine was loading version 4"):
        check_received(manifest, Manifest(4, 2))


def test_manifest_of_a_delta_is_refused():
    message = {"version": 2, "base": 1, "num_buckets": 1, "num_chunks": 0, "num_values": 0}
    with pytest.raises(WeightUpdateError, match="manifest of a delta, expected that of a full update to version 2"):
        Manifest.from_message(message)
