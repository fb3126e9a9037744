"""The stand-in's operators compared with loops over single tokens and experts."""

import pytest
import torch
import torch_npu

E8M0 = torch_npu.float8_e8m0fnu


def dequantize(values, scales):
    """Multiply each value by two to the power of its block's byte minus 127."""
    flat = scales.flatten(-2)
    result = torch.empty(values.shape, dtype=torch.float64)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            result[row, column] = float(values[row, column]) * 2.0 ** (int(flat[row, column // 32]) - 127)
    return result


@pytest.mark.parametrize("k", [64, 96, 80, 32])
def test_quantized_product_equals_a_loop(k):
    torch.manual_seed(k)
    x, weight = torch.randn(3, k, dtype=torch.bfloat16), torch.randn(5, k, dtype=torch.bfloat16)
    xq, xs = torch_npu.npu_dynamic_mx_quant(x, dst_type=torch.float8_e4m3fn)
    wq, ws = torch_npu.npu_dynamic_mx_quant(weight, dst_type=torch.float8_e4m3fn)
    assert xs.shape == (3, -(-k // 64), 2) and ws.dtype == torch.uint8
    output = torch_npu.npu_quant_matmul(
        xq, wq.T, ws.transpose(0, 1), scale_dtype=E8M0, pertoken_scale=xs, pertoken_scale_dtype=E8M0,
        bias=torch.ones(5), output_dtype=torch.float32, group_sizes=[1, 1, 32],
    )  # fmt: skip
    torch.testing.assert_close(output.double(), dequantize(xq, xs) @ dequantize(wq, ws).T + 1, rtol=1e-5, atol=1e-5)


def test_quantizing_along_another_axis_equals_transposing():
    x = torch.randn(96, 4)
    values, scales = torch_npu.npu_dynamic_mx_quant(x, axis=0, dst_type=torch.float8_e4m3fn)
    rows, row_scales = torch_npu.npu_dynamic_mx_quant(x.T.contiguous(), dst_type=torch.float8_e4m3fn)
    assert torch.equal(values.T.view(torch.uint8), rows.view(torch.uint8))
    assert scales.shape == (2, 4, 2) and torch.equal(scales.transpose(0, 1), row_scales)


def test_unsupported_arguments_are_rejected():
    x = torch.randn(2, 64)
    with pytest.raises(NotImplementedError, match="dst_type=296"):
        torch_npu.npu_dynamic_mx_quant(x)
    values, scales = torch_npu.npu_dynamic_mx_quant(x, dst_type=torch.float8_e4m3fn)
    options = {"pertoken_scale": scales, "pertoken_scale_dtype": E8M0, "output_dtype": torch.float32}
    with pytest.raises(NotImplementedError, match="scale_dtype=None"):
        torch_npu.npu_quant_matmul(values, values.T, scales.transpose(0, 1), group_sizes=[1, 1, 32], **options)
    with pytest.raises(RuntimeError, match="need scales"):  # not in the kernel layout
        torch_npu.npu_quant_matmul(values, values.T, scales, scale_dtype=E8M0, group_sizes=[1, 1, 32], **options)
    assert not hasattr(torch_npu, "npu_rms_norm_dynamic_mx_quant")


def test_quantizing_routing_equals_routing_then_quantizing():
    torch.manual_seed(0)
    x, chosen = torch.randn(6, 80, dtype=torch.bfloat16), torch.randint(0, 4, (6, 2))
    options = {"active_num": 12, "expert_num": 4, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    rows, where, counts, _ = torch_npu.npu_moe_init_routing_v2(x, chosen, **options)
    values, same_where, same_counts, scales = torch_npu.npu_moe_init_routing_v2(x, chosen, quant_mode=3, **options)
    expected, expected_scales = torch_npu.npu_dynamic_mx_quant(rows, dst_type=torch.float8_e4m3fn)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scales, expected_scales)
    assert torch.equal(where, same_where) and torch.equal(counts, same_counts)


@pytest.mark.parametrize("group_list_type", [0, 1])
@pytest.mark.parametrize("quantized", [False, True])
def test_mixture_of_experts_equals_a_loop(group_list_type, quantized):
    """Routing, gate and up, down, unpermuting give the same as each token with each of its experts."""
    torch.manual_seed(0)
    tokens, experts, h, i, k = 6, 4, 64, 32, 2
    x = torch.randn(tokens, h)
    w13, w2 = torch.randn(experts, 2 * i, h) / 8, torch.randn(experts, h, i) / 6
    weights, chosen, _ = torch_npu.npu_moe_gating_top_k_softmax(torch.randn(tokens, experts), k=k)
    rows, where, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x, chosen, active_num=tokens * k, expert_num=experts, expert_tokens_num_type=group_list_type,
        expert_tokens_num_flag=True, active_expert_range=[0, experts],
    )  # fmt: skip
    groups = {"group_list": counts, "group_list_type": group_list_type}
    if quantized:
        fp8 = torch.float8_e4m3fn
        (q13, s13), (q2, s2) = (torch_npu.npu_dynamic_mx_quant(w, dst_type=fp8) for w in (w13, w2))
        rows, scales = torch_npu.npu_dynamic_mx_quant(rows, dst_type=fp8)
        hidden, hidden_scales = torch_npu.npu_grouped_matmul_swiglu_quant_v2(
            rows, [q13.transpose(1, 2)], [s13.transpose(1, 2)], scales, dequant_mode=2, quant_mode=2, quant_dtype=fp8,
            weight_scale_dtype=E8M0, x_scale_dtype=E8M0, **groups,
        )  # fmt: skip
        down = torch_npu.npu_grouped_matmul(
            x=[hidden], weight=[q2.transpose(1, 2)], scale=[s2.transpose(1, 2)], per_token_scale=[hidden_scales],
            scale_dtype=E8M0, per_token_scale_dtype=E8M0, split_item=2, group_type=0, output_dtype=torch.float32,
            **groups,
        )  # fmt: skip
    else:
        up = torch_npu.npu_grouped_matmul([rows], [w13.transpose(1, 2)], split_item=2, group_type=0, **groups)
        hidden = torch_npu.npu_swiglu(up[0])
        down = torch_npu.npu_grouped_matmul([hidden], [w2.transpose(1, 2)], split_item=2, group_type=0, **groups)
    output = torch_npu.npu_moe_token_unpermute(down[0], where, probs=weights)
    expected = torch.zeros(tokens, h)
    for token in range(tokens):
        for choice in range(k):
            expert = int(chosen[token, choice])
            gate, up = (w13[expert] @ x[token]).chunk(2)
            expected[token] += weights[token, choice] * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
    error = (output - expected).norm() / expected.norm()
    assert error < (0.1 if quantized else 1e-5)
    assert not quantized or error > 0.01  # it is quantized


@pytest.mark.parametrize("shape", [(64, 96), (33, 40), (3, 16, 32), (2, 20, 70)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_fractal_nz_permutes_memory(shape, dtype):
    """The documented position of each element, one at a time."""
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    blocked = torch_npu.npu_format_cast(plain, 29, customize_dtype=dtype)
    assert (torch_npu.get_npu_format(plain), torch_npu.get_npu_format(blocked)) == (2, 29)
    assert blocked.shape == plain.shape and blocked.stride() == plain.stride()
    assert torch_npu.get_npu_format(blocked.transpose(-1, -2)) == 29
    width, (rows, columns) = 32 // plain.element_size(), shape[-2:]
    row_blocks, column_blocks = -(-rows // 16), -(-columns // width)
    memory = torch.empty(0, dtype=dtype).set_(blocked.untyped_storage()).float()
    for matrix, expected in enumerate(plain.float().view(-1, rows, columns)):
        start = matrix * row_blocks * column_blocks * 16 * width
        for row in range(rows):
            for column in range(columns):
                block = column // width * row_blocks + row // 16
                assert memory[start + (block * 16 + row % 16) * width + column % width] == expected[row, column]
    assert torch.equal(torch_npu.npu_format_cast(blocked, 2).float(), plain.float())


def test_operators_read_fractal_nz_and_writes_through_views_corrupt_it():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(48, 64, dtype=torch.bfloat16)
    (xq, xs), (wq, ws) = (torch_npu.npu_dynamic_mx_quant(each, dst_type=torch.float8_e4m3fn) for each in (x, weight))

    def product(kernel_weight):
        return torch_npu.npu_quant_matmul(
            xq, kernel_weight, ws.transpose(0, 1), scale_dtype=E8M0, pertoken_scale=xs, pertoken_scale_dtype=E8M0,
            output_dtype=torch.float32, group_sizes=[1, 1, 32],
        )  # fmt: skip

    expected = product(wq.T)
    blocked = torch_npu.npu_format_cast(wq.T.contiguous(), 29)
    assert torch.equal(product(blocked), expected)
    blocked.transpose(0, 1).copy_(wq)
    assert not torch.equal(product(blocked), expected)


def packed_fp4(shape, seed):
    """Return random bytes [.., N, K / 2] and scales [.., N, K / 64, 2], and the values that they mean, one by one."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(124, 130, (*shape[:-1], shape[-1] // 64, 2), generator=generator, dtype=torch.uint8)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    exact = torch.zeros(shape, dtype=torch.float64)
    rows = zip(
        exact.view(-1, shape[-1]), packed.view(-1, shape[-1] // 2), scales.view(-1, shape[-1] // 32), strict=True
    )
    for row, codes, factors in rows:
        for column in range(shape[-1]):
            code = int(codes[column // 2]) >> 4 * (column % 2) & 15
            sign = -1 if code & 8 else 1
            row[column] = sign * magnitudes[code & 7] * 2.0 ** (int(factors[column // 32]) - 127)
    return packed, scales, exact


def in_blocks(packed):
    return torch_npu.npu_format_cast(
        packed, 29, customize_dtype=torch.float8_e4m3fn, input_dtype=torch_npu.float4_e2m1fn_x2
    )


@pytest.mark.parametrize("shape", [(64, 128), (40, 64), (2, 16, 192)])
def test_cast_of_fp4_weights_permutes_blocks_of_16_rows_and_32_values(shape):
    packed, _, _ = packed_fp4(shape, 1)
    blocked = in_blocks(packed)
    assert torch_npu.get_npu_format(blocked) == torch_npu.get_npu_format(blocked.transpose(-1, -2)) == 50
    assert blocked.shape == packed.shape and blocked.stride() == packed.stride()
    memory = torch.empty(0, dtype=torch.uint8).set_(blocked.untyped_storage())
    rows, columns = packed.shape[-2:]
    row_blocks, column_blocks = -(-rows // 16), -(-columns // 16)
    assert len(memory) == packed.numel() // (rows * columns) * row_blocks * column_blocks * 256
    for matrix, expected in enumerate(packed.view(-1, rows, columns)):
        start = matrix * row_blocks * column_blocks * 256
        for row in range(rows):
            for column in range(columns):
                block = column // 16 * row_blocks + row // 16
                assert memory[start + (block * 16 + row % 16) * 16 + column % 16] == expected[row, column]
    assert torch.equal(torch_npu.npu_format_cast(blocked, 2), packed)
    assert not torch.equal(memory[: packed.numel()], packed.flatten())
    with pytest.raises(RuntimeError, match="a view of a tensor in FRACTAL_NZ"):
        torch_npu.npu_format_cast(blocked.transpose(-1, -2), 2)


def test_products_with_fp4_weights_equal_loops():
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(2), dtype=torch.bfloat16)
    xq, xs = torch_npu.npu_dynamic_mx_quant(x, dst_type=torch.float8_e4m3fn)
    left = dequantize(xq, xs)
    packed, scales, exact = packed_fp4((48, 128), 3)
    fp4 = torch_npu.float4_e2m1fn_x2
    options = {"pertoken_scale": xs, "pertoken_scale_dtype": E8M0, "scale_dtype": E8M0, "output_dtype": torch.float32}
    kernel, kernel_scale = in_blocks(packed).transpose(0, 1), scales.transpose(0, 1)
    product = torch_npu.npu_quant_matmul(xq, kernel, kernel_scale, x2_dtype=fp4, group_sizes=[0, 0, 32], **options)
    torch.testing.assert_close(product.double(), left @ exact.T, rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="must be in FRACTAL_NZ"):
        torch_npu.npu_quant_matmul(xq, packed.t(), kernel_scale, x2_dtype=fp4, group_sizes=[0, 0, 32], **options)
    with pytest.raises(NotImplementedError, match="group_sizes"):
        torch_npu.npu_quant_matmul(xq, kernel, kernel_scale, x2_dtype=fp4, group_sizes=[1, 1, 32], **options)
    packed, scales, exact = packed_fp4((2, 48, 128), 4)
    [grouped] = torch_npu.npu_grouped_matmul(
        x=[xq], weight=[in_blocks(packed).transpose(1, 2)], antiquant_scale=[scales.transpose(1, 2)],
        per_token_scale=[xs], per_token_scale_dtype=E8M0, x_dtype=torch.float8_e4m3fn, weight_dtype=fp4,
        split_item=2, group_type=0, group_list=torch.tensor([4, 2]), group_list_type=1, output_dtype=torch.float32,
    )  # fmt: skip
    expected = torch.cat([left[:4] @ exact[0].T, left[4:] @ exact[1].T])
    torch.testing.assert_close(grouped.double(), expected, rtol=1e-5, atol=1e-4)


def test_fused_activation_equals_swiglu_then_quantizing():
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(5), dtype=torch.bfloat16)
    operator = torch.ops._C_ascend.npu_swiglu_group_quant
    values, scales, _ = operator(x, group_index=torch.tensor([1, 2]), dst_type=torch.float8_e4m3fn, quant_mode=2)
    hidden = torch_npu.npu_swiglu(x.float())
    hidden[3:] = 0
    expected, expected_scales = torch_npu.npu_dynamic_mx_quant(hidden, dst_type=torch.float8_e4m3fn)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scales, expected_scales)
