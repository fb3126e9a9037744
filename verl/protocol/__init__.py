"""DataProto, the data type that flows between the stages of a step, and its serialization."""

from verl.protocol.data_proto import DataProto, DataProtoItem, pad_dataproto_to_divisor, unpad_dataproto

__all__ = ["DataProto", "DataProtoItem", "pad_dataproto_to_divisor", "unpad_dataproto"]
