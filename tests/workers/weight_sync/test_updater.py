"""Tests of the choice between a delta and a full update over a run."""

import logging

import pytest

from fixtures.updates import LocalReceiver, LocalSender, contiguous, equal, flip_bits, weights
from verl.utils.tensor_diff import bits
from verl.workers.weight_sync.updater import WeightUpdater


async def test_deltas_follow_the_first_full_update_and_are_checked_in_intervals():
    tensors = weights()
    sender, receivers = LocalSender(tensors, 600), [LocalReceiver(tensors) for _ in range(2)]
    updater = WeightUpdater(delta=True, check_interval=3)
    seen = []
    for version in range(8):
        metrics = await updater.update(sender, receivers, version)
        seen.append((metrics["weight_update/delta"], metrics.get("weight_update/delta_mismatches")))
        expected = contiguous(sender.tensors)
        assert all(r.receiver.version == version and equal(r.weights, expected) for r in receivers)
        sender.tensors = flip_bits(sender.tensors, version)
    assert seen == [
        (0.0, None),
        (1.0, None),
        (1.0, None),
        (1.0, 0.0),
        (1.0, None),
        (1.0, None),
        (1.0, 0.0),
        (1.0, None),
    ]
    assert sender.bases == [None, 0, 1, 2, None, 3, 4, 5, None, 6]


async def test_check_finds_and_corrects_a_flipped_bit(caplog):
    tensors = weights()
    sender, receiver = LocalSender(tensors, 600), LocalReceiver(tensors)
    updater = WeightUpdater(delta=True, check_interval=1)
    await updater.update(sender, [receiver], 0)
    bits(receiver.weights["big"])[17, 3] ^= 4
    metrics = await updater.update(sender, [receiver], 1)
    assert metrics["weight_update/delta_mismatches"] == 1.0
    assert "the first is big" in caplog.text
    assert equal(receiver.weights, contiguous(tensors))


@pytest.mark.parametrize("cause", ["sender restarted", "replica restarted", "version gap", "died during the delta"])
async def test_full_update_follows_a_refused_delta(cause, caplog):
    tensors = weights()
    sender, receivers = LocalSender(tensors, 600), [LocalReceiver(tensors) for _ in range(2)]
    updater = WeightUpdater(delta=True)
    await updater.update(sender, receivers, 0)
    sender.tensors = flip_bits(tensors, 0)
    if cause == "sender restarted":
        sender.kept, sender.kept_version = {}, None
    elif cause == "replica restarted":
        receivers[1] = LocalReceiver(tensors)
    elif cause == "version gap":
        receivers[1].receiver.version = 7
    else:
        receivers[1].fail_at, receivers[1].fails = 1, 1
    metrics = await updater.update(sender, receivers, 1)
    assert metrics["weight_update/delta_refused"] == 1.0 and metrics["weight_update/delta"] == 0.0
    assert "sending a full update instead" in caplog.text
    expected = contiguous(sender.tensors)
    assert all(r.receiver.version == 1 and equal(r.weights, expected) for r in receivers)
    assert sender.aborted == 1
    assert (await updater.update(sender, receivers, 2))["weight_update/delta"] == 1.0


async def test_every_update_is_full_without_deltas():
    tensors = weights()
    sender, receivers = LocalSender(tensors, 600), [LocalReceiver(tensors)]
    updater = WeightUpdater(delta=False)
    for version in range(3):
        await updater.update(sender, receivers, version)
    assert sender.bases == [None, None, None]


async def test_full_updates_follow_a_large_delta_until_deltas_are_tried_again(caplog):
    caplog.set_level(logging.INFO)
    tensors = weights()
    sender, receivers = LocalSender(tensors, 600), [LocalReceiver(tensors)]
    updater = WeightUpdater(delta=True, pays_below=0.5)
    for version in range(21):
        await updater.update(sender, receivers, version)
        # All elements change between versions 1 and 2.
        sender.tensors = flip_bits(sender.tensors, version, share=1.0 if version == 1 else 0.1)
    assert sender.bases == [None, 0, 1] + [None] * 16 + [18, 19]
    assert "the next 16 updates are full updates" in caplog.text
    expected = contiguous(sender.tensors)
    await updater.update(sender, receivers, 21)
    assert equal(receivers[0].weights, expected)
