"""DataProto, the data type that flows between the stages of a step, and its serialization."""

from verl.extension.upstream_names import missing_names
from verl.protocol.data_proto import (
    DataProto,
    DataProtoConfig,
    DataProtoItem,
    pad_dataproto_to_divisor,
    unpad_dataproto,
)

__all__ = ["DataProto", "DataProtoConfig", "DataProtoItem", "pad_dataproto_to_divisor", "unpad_dataproto"]
__getattr__ = missing_names(__name__)
