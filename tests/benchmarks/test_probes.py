import math
from dataclasses import replace

import models
import probes
import pytest
import shapes
from time_model import Device, Overheads

from verl.workers.weight_sync.sender import bucket_capacity

KNOWN = Overheads(
    decode=0.01, decode_layer=0.002, sample=0.003, micro_batch=0.02, micro_batch_layer=0.004, update=0.05,
    update_layer=0.006, update_bucket=0.007, step=0.1,
)  # fmt: skip


def parts(layers: int, samples: int, buckets: int = 1) -> dict[str, float]:
    one_pass = probes._MICRO_BATCHES * (KNOWN.micro_batch + layers * KNOWN.micro_batch_layer)
    found = {
        "generation": 32 * (KNOWN.decode + layers * KNOWN.decode_layer) + samples * KNOWN.sample,
        "old_log_probs": one_pass,
        "updates": 3 * one_pass,
        "weight_update": KNOWN.update + layers * KNOWN.update_layer + buckets * KNOWN.update_bucket,
    }
    return {**found, "step": sum(found.values()) + KNOWN.step, "buckets": buckets}


def test_overheads_are_solved_from_four_runs():
    found = probes.solve(parts(4, 16), parts(24, 16, 3), parts(4, 64), parts(24, 16, 20), 4, 24)
    assert vars(found) == pytest.approx(vars(KNOWN))


def test_noise_makes_no_overhead_negative():
    shallow = parts(4, 16)
    half = {name: 0.5 * value for name, value in shallow.items()}
    found = probes.solve(shallow, half, parts(4, 64), half | {"weight_update": 0.0, "buckets": 9}, 4, 24)
    assert min(vars(found).values()) >= 0
    assert found.update_layer == found.update_bucket == 0


def test_calibration_finds_the_overheads_of_a_known_machine(monkeypatch):
    """Predictions of the time model for a known machine replace the measured runs."""
    import scale_model

    rates = dict(train_flops=1e11, generate_flops=1e11, read_bandwidth=1e10, copy_bandwidth=1e10, link_bandwidth=1e9)
    bare = Device(**rates, link_latency=0.0, overheads=Overheads(), itemsize=4, overlaps=False)
    known = replace(bare, overheads=KNOWN, load_copies=5.5)
    monkeypatch.setattr(probes, "this_machine", lambda config, load, ranks: bare)

    def measure(size, load, bucket_megabytes=2048):
        device = replace(known, bucket_bytes=bucket_megabytes << 20)
        counts = shapes.count(models.config(size))
        sent = counts.unquantized_bytes(4)
        buckets = math.ceil(sent / bucket_capacity(device.bucket_bytes, sent))
        return scale_model.predicted(size, load, device, 1) | {"buckets": buckets}

    # A run counts its buckets; a prediction without overheads has no buckets.
    overheads, copies = probes.calibrate(measure, scale_model.predicted)
    assert copies == pytest.approx(5.5, rel=1e-3)
    assert vars(overheads) == pytest.approx(vars(KNOWN), rel=1e-3)


def test_both_loads_make_the_same_number_of_passes():
    for load in (probes.FEW, probes.MANY):
        assert load.samples // load.micro_batch == probes._MICRO_BATCHES
        assert load.longest == probes.FEW.longest == 32


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_probes_its_share_of_the_machine(ranks):
    device = probes.this_machine(models.config("shallow"), probes.FEW, ranks, at_least=0.05)
    rates = (device.train_flops, device.generate_flops, device.read_bandwidth, device.copy_bandwidth)
    assert all(1e6 < rate < 1e14 for rate in rates)
    if ranks == 1:
        assert (device.link_bandwidth, device.link_latency) == (float("inf"), 0.0)
        assert (device.collect_bandwidth, device.collect_latency) == (float("inf"), 0.0)
    else:
        assert 1e6 < device.link_bandwidth < 1e13 and 0 < device.link_latency < 10
        assert 1e6 < device.collect_bandwidth < 1e13 and 0 < device.collect_latency < 10
