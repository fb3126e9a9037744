"""The time model gives the results of a calculation by hand, on round numbers."""

import math
from dataclasses import replace

import pytest
import time_model
from shapes import Counts
from time_model import Device, Layout, Overheads, Work

DENSE = Counts(
    parameters=1000,
    body=800,
    experts=0,
    chosen=0.0,
    head=100,
    layers=2,
    attention=0,
    kv_elements=0,
    mxfp8_bytes=1200,
    tensors=10,
)
INF = math.inf
FREE = Device(
    train_flops=INF,
    generate_flops=INF,
    read_bandwidth=INF,
    copy_bandwidth=INF,
    link_bandwidth=INF,
    link_latency=0.0,
    overheads=Overheads(),
    itemsize=4,
    overlaps=False,
)
WORK = Work(
    prompts=2, n=4, prompt=10, lengths=(20, 40), micro_batch_tokens=100, updates=2, recomputes=False
)  # 8 samples of 30 tokens on average
ONE = Layout(1, 1)


def test_a_machine_with_overheads_only():
    over = Overheads(
        decode=1,
        decode_layer=0.5,
        sample=0.25,
        micro_batch=2,
        micro_batch_layer=1,
        update=3,
        update_layer=4,
        update_bucket=6,
        step=5,
    )
    times = time_model.predict(DENSE, WORK, replace(FREE, overheads=over), ONE, 4000, 4000)
    assert times.generation == pytest.approx(40 * (1 + 2 * 0.5) + 8 * 0.25)
    # 8 samples of 40 tokens fill four micro-batches of 100.
    assert time_model.micro_batches(WORK, ONE) == 4
    assert times.old_log_probs == pytest.approx(4 * (2 + 2 * 1))
    assert times.updates == pytest.approx(3 * times.old_log_probs)
    assert times.weight_update == pytest.approx(3 + 2 * 4 + 6)
    shared = time_model.weight_update_seconds(DENSE, replace(FREE, overheads=over), Layout(2, 2), 4000)
    assert shared == pytest.approx(1.5 * times.weight_update)
    # The sender cuts an update into buckets of 8 MiB, of a sixth of the update, or of the largest size allowed.
    for mebibytes, buckets in ((8, 1), (9, 2), (48, 6), (480, 6), (6144, 6), (12288, 12)):
        seconds = time_model.weight_update_seconds(
            DENSE, replace(FREE, overheads=over, bucket_bytes=1 << 30), ONE, mebibytes << 20
        )
        assert seconds == pytest.approx(3 + 2 * 4 + 6 * buckets)
    assert times.step == pytest.approx(times.generation + times.old_log_probs + times.updates + times.weight_update + 5)


def test_training_time_is_the_flops_of_its_passes():
    device = replace(FREE, train_flops=1000.0)
    forward = 2 * 8 * (40 * 800 + 30 * 100) / 1000
    assert time_model.pass_seconds(DENSE, WORK, device, ONE) == pytest.approx(forward)
    assert time_model.pass_seconds(DENSE, WORK, device, Layout(4, 4)) == pytest.approx(forward / 4)
    assert time_model.predict(DENSE, WORK, device, ONE, 0, 0).updates == pytest.approx(3 * forward)
    recomputed = time_model.predict(DENSE, replace(WORK, recomputes=True), device, ONE, 0, 0)
    assert recomputed.updates == pytest.approx(4 * forward)


def test_decoding_reads_all_weights_per_pass_and_multiplies_for_unfinished_samples():
    reading = replace(FREE, read_bandwidth=100.0)
    assert time_model.generation_seconds(DENSE, WORK, reading, ONE, 4000) == pytest.approx(40 * 4000 / 100)
    multiplying = replace(FREE, generate_flops=1000.0)
    prefill = 2 * 800 * 2 * 10 / 1000
    passes = (20 * 8 + 20 * 4) * 2 * (800 + 100) / 1000
    assert time_model.generation_seconds(DENSE, WORK, multiplying, ONE, 4000) == pytest.approx(prefill + passes)


def test_only_experts_chosen_by_a_token_are_read():
    moe = replace(DENSE, experts=500, chosen=0.5)
    reading = replace(FREE, read_bandwidth=100.0)
    single = replace(WORK, prompts=1, n=1, lengths=(1,))
    # One sample hits half of the experts, which are half of the weights.
    assert time_model.generation_seconds(moe, single, reading, ONE, 4000) == pytest.approx(0.75 * 4000 / 100)


def test_samples_wait_for_free_space_in_the_cache():
    reading = replace(FREE, read_bandwidth=100.0)
    one_length = replace(WORK, lengths=(40,))
    unlimited = time_model.generation_seconds(DENSE, one_length, reading, ONE, 4000)
    # Eight samples of 10 + 20 tokens on average; two of them fit.
    limited = time_model.generation_seconds(DENSE, one_length, reading, replace(ONE, cache_tokens=60), 4000)
    assert limited == pytest.approx(4 * unlimited)


def test_update_time_is_a_sum_on_one_processor_and_a_pipeline_if_parts_overlap():
    device = replace(FREE, copy_bandwidth=100.0, link_bandwidth=10.0, load_copies=3)
    alone = time_model.weight_update_seconds(DENSE, device, ONE, 4000)
    assert alone == pytest.approx(4000 / 100 + 3 * 4000 / 100)
    two = time_model.weight_update_seconds(DENSE, device, Layout(2, 2), 4000)
    assert two == pytest.approx(2000 / 100 + 2000 / 10 + 3 * 4000 / 100)
    collecting = replace(device, link_bandwidth=1.0, link_latency=1.0, collect_bandwidth=10.0, collect_latency=0.0)
    assert time_model.weight_update_seconds(DENSE, collecting, Layout(2, 2), 4000) == pytest.approx(two)
    piped = replace(device, overlaps=True, bucket_bytes=1024)
    assert time_model.weight_update_seconds(DENSE, piped, Layout(2, 2), 4000) == pytest.approx(
        400 + (20 + 200 + 120) / 4
    )


def test_a_delta_update_encodes_all_weights_and_sends_some():
    device = replace(FREE, copy_bandwidth=100.0)
    assert time_model.weight_update_seconds(DENSE, device, ONE, 4000, sent_share=0.01) == pytest.approx(40 + 0.4)


def test_the_layout_has_the_smallest_replica_that_fits():
    # A rank holds 16 * 1000 / 4 bytes of the trainer.
    layout = time_model.hybrid_layout(replace(DENSE, kv_elements=5), 3000, 10_000, 2, 4)
    assert (layout.ranks, layout.replicas, layout.tensor_parallel) == (4, 4, 1)
    assert layout.cache_tokens == pytest.approx(0.8 * 3000 / 10)
    assert time_model.hybrid_layout(replace(DENSE, kv_elements=5), 3001, 10_000, 2, 4).tensor_parallel == 2
    assert time_model.hybrid_layout(DENSE, 3000, 4_000, 2, 4) is None
