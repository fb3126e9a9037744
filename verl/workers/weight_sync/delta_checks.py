"""The reasons for which a delta is refused. `updater` then sends a full update of the same version.

| checked by | when and where | refused if |
|---|---|---|
| `check_trainer_base` | at the begin, every trainer rank | the rank did not send the base version last |
| `check_engine_base` | at the begin, engine | it does not serve the base version, or it encodes weights |
| verl/utils/vllm/delta.py | at the begin, engine | no full load was recorded, or a parameter was moved in memory |
| `QuantizationScheme.check_sent` | each chunk, trainer | a changed weight holds NaN or Inf |
| `check_bucket_base`, `check_chunk_spec` | each bucket and chunk, engine | it belongs to another version or tensor |
| `DeltaChunk.from_message`, `decode` | each chunk, engine | its numbers contradict one another |
| `check_totals` | at the end, engine | buckets, chunks or values are missing |
"""

from __future__ import annotations

from collections.abc import Mapping

from verl.workers.weight_sync.delta import DeltaChunk
from verl.workers.weight_sync.manifest import TensorSpec, WeightUpdateError
from verl.workers.weight_sync.messages import Bucket, DeltaBucket, DeltaManifest, ManifestMessage, is_delta_bucket


def check_trainer_base(last_sent: int | None, base: int) -> None:
    """Check that a trainer rank can build a delta against the version `base`.

    Args:
        last_sent: the version that it sent last; None if there is none.

    Raises:
        WeightUpdateError: it is another version.
    """
    if last_sent != base:
        reason = "no weights were sent yet" if last_sent is None else f"the last sent version is {last_sent}"
        raise WeightUpdateError(f"cannot build a delta against version {base}: {reason}")


def check_engine_base(serving: int | None, base: int, *, encodes: bool) -> None:
    """Check that the engine can apply a delta against the version `base`.

    Args:
        serving: the version that it serves; None if it serves none.
        encodes: the engine encodes the weights that it receives.

    Raises:
        WeightUpdateError: it serves another version, or it encodes.
    """
    if serving != base:
        has = "no version" if serving is None else f"version {serving}"
        raise WeightUpdateError(
            f"cannot apply a delta against version {base}: the engine serves {has}; send a full update"
        )
    if encodes:
        raise WeightUpdateError(
            "cannot apply a delta: the engine quantizes the weights that it receives (quantization_side=receiver)"
        )


def check_bucket_base(bucket: Bucket, base: int) -> DeltaBucket:
    """Return a bucket of a delta against the version `base`; WeightUpdateError if it belongs to another update."""
    if is_delta_bucket(bucket) and bucket["base"] == base:
        return bucket
    found = bucket["base"] if is_delta_bucket(bucket) else None
    raise WeightUpdateError(f"received a bucket relative to version {found}, expected version {base}")


def check_chunk_spec(chunk: DeltaChunk, specs: Mapping[str, TensorSpec]) -> None:
    """Check that a chunk fits the tensor that the engine was given.

    Args:
        specs: the tensors of the last full update, by checkpoint name.

    Raises:
        WeightUpdateError: unknown parameter, or another dtype or shape.
    """
    spec, sent = specs.get(chunk.name), TensorSpec(chunk.name, chunk.shape, chunk.dtype)
    if spec is None:
        raise WeightUpdateError(f"unknown parameter {chunk.name!r} in a delta: the last full update did not contain it")
    if spec != sent:
        raise WeightUpdateError(
            f"parameter {chunk.name!r}: the delta is for {sent.dtype}{list(sent.shape)}, "
            f"the engine has {spec.dtype}{list(spec.shape)}"
        )


def check_totals(manifest: ManifestMessage, received: DeltaManifest) -> None:
    """Compare the sender's manifest of a delta with the totals that were received; WeightUpdateError if they differ."""
    for key, value in received.items():
        sent = manifest.get(key)
        if sent != value:
            raise WeightUpdateError(
                f"delta from version {received['base']} to {received['version']}: sent {key}={sent}, received {value}"
            )
