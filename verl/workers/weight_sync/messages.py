"""The messages of a weight update between the trainer, the driver and the engines.

They hold only numbers, strings, lists and dictionaries, so they can cross any transport and nothing is unpickled.
Tensor data never travels in them: a bucket names the shared memory that holds its bytes.

    trainer rank     --RankExport-->   driver (TrainerSender)
    sender           --Bucket-->       driver --> engine workers
    sender           --ExportReport--> driver
    driver           --manifest-->     engine workers
    engine workers   --BucketReport--> driver (after each bucket)
    engine workers   --EngineReport--> driver
"""

from __future__ import annotations

from typing import Generic, NotRequired, TypedDict, TypeGuard, TypeVar, final

from verl.utils.quantization.encode_report import EncodeReportMessage, Errors

R = TypeVar("R")


class SegmentHandle(TypedDict):
    """A shared memory segment: the process that owns it, its file descriptor there, and its size in bytes."""

    pid: int
    fd: int
    nbytes: int


class TensorSpecMessage(TypedDict):
    """Checkpoint name, shape and torch dtype name of a tensor."""

    name: str
    shape: list[int]
    dtype: str


class TensorEntry(TensorSpecMessage):
    """A tensor in a bucket; `offset` is the position of its first byte."""

    offset: int


class DeltaChunkMessage(TensorSpecMessage):
    """The fields of `delta.DeltaChunk`; name, shape and dtype are those of the full tensor."""

    start: int
    length: int
    encoding: str
    count: int
    indices_offset: int
    values_offset: int


class Bucket(TypedDict):
    """A bucket of a full update.

    `segment` is the memory that holds the first `nbytes` bytes; it may be None if `nbytes` is 0. `index` counts the
    buckets of an update from 0, and `last` is true for the final one. `checksum` is the result of
    `bucket.checksum` for the bytes.
    """

    version: int
    index: int
    last: bool
    nbytes: int
    segment: SegmentHandle | None
    checksum: int
    entries: list[TensorEntry]


class DeltaBucket(Bucket):
    """A bucket of a delta relative to the version `base`; it has no `entries`."""

    base: int
    chunks: list[DeltaChunkMessage]


def is_delta_bucket(bucket: Bucket) -> TypeGuard[DeltaBucket]:
    """Return whether a bucket belongs to a delta."""
    return "base" in bucket and "chunks" in bucket


@final
class FullManifest(TypedDict):
    """All tensors of a full update."""

    version: int
    num_buckets: int
    specs: list[TensorSpecMessage]


@final
class DeltaManifest(TypedDict):
    """Totals of a delta relative to the version `base`."""

    version: int
    base: int
    num_buckets: int
    num_chunks: int
    num_values: int


ManifestMessage = FullManifest | DeltaManifest


class RankExport(TypedDict):
    """The result of an export on one trainer rank; only rank 0 has the optional fields.

    `seconds` were spent gathering, encoding and packing. `full_bytes` is the size of a full update.
    """

    report: EncodeReportMessage
    manifest: NotRequired[ManifestMessage]
    seconds: NotRequired[float]
    full_bytes: NotRequired[int]


class ExportReport(TypedDict):
    """The sender's report of an update.

    `seconds` were spent gathering, encoding and packing; `encode` seconds of them encoding. `errors` are the
    quantization errors by weight. `full_bytes` is the size of a full update.
    """

    manifest: ManifestMessage
    seconds: float
    encode: float
    errors: Errors
    full_bytes: int


class BucketReport(TypedDict):
    """A receiver's report of a bucket. Both are empty for a delta, whose tensors are those of the last full update.

    `unused` names the tensors that the engine did not read. `dtypes` has the tensors that the engine holds in another
    dtype than that in which they were sent: checkpoint name -> name of the engine's dtype.
    """

    unused: list[str]
    dtypes: dict[str, str]


class EngineReport(TypedDict):
    """A receiver's report of an update.

    `load` and `finish` are seconds; `encode` seconds of `load` were spent encoding. `bytes` were received. `errors` are
    the quantization errors of the weights that the engine encoded. `accepts_delta`: a delta may follow.
    """

    load: float
    encode: float
    finish: float
    bytes: float
    errors: Errors
    accepts_delta: bool


class WorkerReply(TypedDict, Generic[R]):
    """The result of a call in an engine worker, or the text of its error. Exactly one of the two is None."""

    error: str | None
    result: R | None
