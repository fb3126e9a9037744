"""Memory formats. A format is a property of a storage, so views of a tensor have its format.

In FRACTAL_NZ a matrix [R, C] is divided into blocks of 16 rows and 32 bytes of a row, padded with zeros. The blocks of
one column of blocks are adjacent: the memory is [C / c, R / 16, 16, c] for c = 32 / element size. Leading dimensions
are kept. On an NPU the tensor keeps its shape and strides, which no longer describe its memory; the same is true here.
So code that reads or writes such a tensor by its strides, or through a view, gets other elements than the operators.

A weight of packed FP4 values (uint8, two in a byte), cast for activations in FP8, has blocks of 16 rows and 32 values,
which take 16 bytes of a row. By torch_npu's source (`FormatCastKernelNpu.cpp`) its format is FRACTAL_NZ_C0_16.
"""

import torch
import torch.nn.functional as F

from torch_npu._dtypes import float4_e2m1fn_x2

NCHW, ND, FRACTAL_NZ, FRACTAL_NZ_C0_16 = 0, 2, 29, 50
_ROWS = 16
# Bytes of a row of a block.
_ROW_BYTES = {FRACTAL_NZ: 32, FRACTAL_NZ_C0_16: 16}
_MARK = "standin_format"


def npu_format_cast(
    tensor: torch.Tensor, acl_format: int, customize_dtype: torch.dtype | None = None, input_dtype=None
) -> torch.Tensor:
    """Return the tensor in another format: itself if it has that format, else new memory.

    Args:
        acl_format: ND or FRACTAL_NZ.
        customize_dtype: the element type that determines the size of the blocks; that of the tensor, or float8_e4m3fn
            for FP4.
        input_dtype: float4_e2m1fn_x2 for a uint8 tensor of packed FP4 values.
    """
    packed = acl_format == FRACTAL_NZ and tensor.dtype == torch.uint8 and input_dtype == float4_e2m1fn_x2
    fits = customize_dtype == torch.float8_e4m3fn if packed else customize_dtype in (None, tensor.dtype)
    if acl_format not in (ND, FRACTAL_NZ) or not fits or (input_dtype is not None and not packed):
        raise NotImplementedError(f"npu_format_cast: {acl_format=}, {customize_dtype=}, {input_dtype=}")
    blocked = get_npu_format(tensor) in _ROW_BYTES
    if blocked and not tensor.is_contiguous():
        raise RuntimeError("npu_format_cast: a view of a tensor in FRACTAL_NZ")
    if acl_format == ND:
        return as_operators_read(tensor)
    if blocked:
        return tensor
    return _to_blocks(tensor, FRACTAL_NZ_C0_16 if packed else FRACTAL_NZ)


def get_npu_format(tensor: torch.Tensor) -> int:
    """Return the format of a tensor's storage. New tensors with four dimensions have NCHW, others ND."""
    plain = NCHW if tensor.ndim == 4 else ND
    return getattr(tensor.untyped_storage(), _MARK, plain)


def as_operators_read(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements that an operator reads: the tensor itself, or a copy in ND of one in blocks.

    Operators on FP4 weights also read the transposed view of a whole tensor.
    """
    found = get_npu_format(tensor)
    if found not in _ROW_BYTES:
        return tensor
    if found == FRACTAL_NZ_C0_16 and not tensor.is_contiguous():
        return as_operators_read(tensor.transpose(-1, -2)).transpose(-1, -2)
    if not tensor.is_contiguous() or tensor.storage_offset():
        raise RuntimeError("an operator got a view of a tensor in FRACTAL_NZ")
    *lead, rows, columns = tensor.shape
    column_blocks, row_blocks, width = _blocks(tensor, found)
    memory = _bytes(tensor).view(*lead, column_blocks, row_blocks, _ROWS, width)
    matrix = memory.movedim(-4, -2).reshape(*lead, row_blocks * _ROWS, column_blocks * width)
    return matrix[..., :rows, :columns].contiguous().view(tensor.dtype)


def _blocks(tensor: torch.Tensor, acl_format: int) -> tuple[int, int, int]:
    """Return the numbers of blocks in a row and in a column, and the elements in a row of a block."""
    width = _ROW_BYTES[acl_format] // tensor.element_size()
    return -(-tensor.shape[-1] // width), -(-tensor.shape[-2] // _ROWS), width


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return all elements of a tensor's storage as integers."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return torch.empty(0, dtype=integer).set_(tensor.untyped_storage())


def _to_blocks(tensor: torch.Tensor, acl_format: int) -> torch.Tensor:
    *lead, rows, columns = tensor.shape
    column_blocks, row_blocks, width = _blocks(tensor, acl_format)
    matrix = _bytes(tensor.contiguous().clone()).view(tensor.shape)
    padded = F.pad(matrix, (0, column_blocks * width - columns, 0, row_blocks * _ROWS - rows))
    blocks = padded.view(*lead, row_blocks, _ROWS, column_blocks, width).movedim(-2, -4).contiguous()
    setattr(blocks.untyped_storage(), _MARK, acl_format)
    strides = torch.empty(tensor.shape, device="meta").stride()
    return torch.empty(0, dtype=tensor.dtype).set_(blocks.untyped_storage(), 0, tensor.shape, strides)
