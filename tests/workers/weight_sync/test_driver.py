"""Tests of one update as the driver runs it: all receivers reach the version, or none serves."""

import asyncio

import pytest
import torch

from fixtures.updates import LocalReceiver, LocalSender, equal, weights
from verl.workers.weight_sync.driver import update_weights
from verl.workers.weight_sync.manifest import WeightUpdateError


async def test_update_brings_all_receivers_to_one_version():
    tensors = weights()
    receivers = [LocalReceiver(tensors) for _ in range(2)]
    result = await update_weights(LocalSender(tensors, 600), receivers, 5)
    assert result.accepts_delta
    assert [r.receiver.version for r in receivers] == [5, 5]
    assert all(equal(r.weights, tensors) for r in receivers)
    assert result.metrics["weight_update/buckets"] > 2
    assert result.metrics["weight_update/MiB"] == sum(t.nbytes for t in tensors.values()) / 2**20


@pytest.mark.parametrize("failing", ["sender", "receiver"])
async def test_no_receiver_serves_after_a_failure_during_the_update(failing):
    tensors = weights()
    receivers = [LocalReceiver(tensors), LocalReceiver(tensors, fail_at=1 if failing == "receiver" else None)]
    sender = LocalSender(tensors, 600, fail_at=2 if failing == "sender" else None)
    with pytest.raises(WeightUpdateError, match="went away" if failing == "sender" else "worker died"):
        await update_weights(sender, receivers, 5)
    assert [r.receiver.version for r in receivers] == [None, None]
    assert all("version 5 failed" in r.refusal for r in receivers)


async def test_no_more_buckets_are_in_flight_than_allowed():
    tensors = {f"w{i}": torch.zeros(100) for i in range(12)}
    in_flight, most = 0, 0

    class Counting(LocalSender):
        async def next_bucket(self):
            nonlocal in_flight, most
            in_flight, most = in_flight + 1, max(most, in_flight + 1)
            return await super().next_bucket()

    class Slow(LocalReceiver):
        async def load_bucket(self, bucket):
            nonlocal in_flight
            for _ in range(5):
                await asyncio.sleep(0)
            report = await super().load_bucket(bucket)
            in_flight -= 1
            return report

    await update_weights(Counting(tensors, 400), [Slow(tensors)], 0, buckets_in_flight=2)
    assert most == 2


async def test_a_tensor_that_an_engine_does_not_use_is_refused_by_name():
    tensors = weights()
    receivers = [LocalReceiver(tensors), LocalReceiver(tensors, skipped=["odd", "big"])]
    with pytest.raises(WeightUpdateError, match=r"no place for 2 tensors that the trainer sent: big, odd\."):
        await update_weights(LocalSender(tensors, 600), receivers, 5)
    assert [r.receiver.version for r in receivers] == [None, None]


async def test_tensors_are_sent_in_the_dtypes_of_the_engine():
    """The sender rounds everything to bfloat16; two parameters of the engines are wider, one is narrower."""
    generator = torch.Generator().manual_seed(3)
    exact = {name: torch.randn(4, 5, generator=generator) for name in ("plain", "bias", "gate", "half")}
    rounded = {name: tensor.bfloat16() for name, tensor in exact.items()}
    dtypes = {"bias": torch.float32, "gate": torch.float64, "half": torch.float16, "plain": torch.bfloat16}
    receivers = [LocalReceiver(exact, dtypes=dtypes) for _ in range(2)]
    sender = LocalSender(rounded, 100, exact=exact)
    result = await update_weights(sender, receivers, 5)
    expected = {name: tensor.to(dtypes[name]) for name, tensor in exact.items()}
    assert all(equal(r.weights, expected) for r in receivers)
    assert result.metrics["weight_update/MiB"] == sum(t.nbytes for t in expected.values()) / 2**20
    assert sender.bases == [None, None] and equal(sender.kept, expected)
    await update_weights(sender, receivers, 6)
    assert sender.bases == [None] * 3, "the dtypes are known: one transfer is enough"


async def test_a_sender_that_keeps_its_dtypes_is_an_error():
    class Stubborn(LocalSender):
        async def send_as(self, dtypes):
            pass

    receiver = LocalReceiver(["w"], dtypes={"w": torch.float32})
    with pytest.raises(WeightUpdateError, match="'w': 'float32'"):
        await update_weights(Stubborn({"w": torch.ones(3).bfloat16()}, 100), [receiver], 5)
    assert receiver.receiver.version is None
