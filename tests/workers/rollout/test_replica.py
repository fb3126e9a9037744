"""The calls that a replica sends to its server."""

from verl.workers.rollout.replica import vLLMReplica


async def test_an_update_wakes_the_weights_first_and_the_cache_last():
    """What upstream verl calls `multi_stage_wake_up`: the cache is not in memory together with an update's buckets."""
    replica, calls = object.__new__(vLLMReplica), []

    async def call(method, *arguments):
        calls.append((method.__name__, *arguments))

    replica._call = call
    await replica.begin_update(3)
    await replica.load_bucket("bucket")
    await replica.finish_update("manifest")
    assert calls == [
        ("wake_up", ["weights"]),
        ("begin_update", 3, None),
        ("load_bucket", "bucket"),
        ("wake_up", ["kv_cache"]),
        ("finish_update", "manifest"),
    ]
