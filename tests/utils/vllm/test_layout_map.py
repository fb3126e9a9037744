"""Tests of recorded loads: the recorded position of each element agrees with the memory after the load."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from verl.utils.tensor_diff import bits
from verl.utils.vllm.apply_delta import DeltaApplier
from verl.utils.vllm.layout_map import LoadTrace, Region, Target, parameters_by_storage, storage_of


class Layer(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))


def numbered(*shape, start=1.0):
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count).view(shape)


def traced(model, in_place, load, tensors):
    trace = LoadTrace(in_place, parameters_by_storage(dict(model.named_children())))
    trace.set_sources(tensors.items())
    with trace:
        load(tensors)
    trace.flush()
    return trace.map


def make_applier(model, layout, **over):
    options = dict(reloaded={}, derived={}, refresh=lambda indices: None, reload=lambda layers, tensors: None) | over
    return DeltaApplier(model, layout, **options)


def test_every_element_of_a_stacked_parameter_that_is_copied_in_at_the_end_is_mapped():
    model = nn.Module()
    model.qkv = Layer(weight=(10, 4))
    tensors = {"q": numbered(6, 4), "k": numbered(4, 8, start=100.0)}

    def load(tensors):
        made = torch.zeros(10, 4)
        made[:6].copy_(tensors["q"])
        made.narrow(0, 6, 4).copy_(tensors["k"].narrow(1, 4, 4))  # a tensor-parallel rank's half
        model.qkv.weight.data.copy_(made)

    layout = traced(model, {}, load, tensors)
    assert layout.opaque == set() and layout.mapped_elements() == {"qkv.weight": 40}
    applier = make_applier(model, layout)
    fresh = {name: tensor + 1000 for name, tensor in tensors.items()}
    for name, tensor in fresh.items():
        applier.apply_chunk(name, torch.arange(tensor.numel()), 0, tensor.view(-1))
    expected = torch.cat([fresh["q"], fresh["k"][:, 4:]])
    assert torch.equal(model.qkv.weight, expected)


def test_any_operation_other_than_a_copy_makes_a_name_opaque():
    model = nn.Module()
    model.a = Layer(weight=(2, 3), bias=(3,), scale=(3,))
    tensors = {name: numbered(*shape) for name, shape in [("w", (2, 3)), ("b", (3,)), ("s", (3,)), ("unused", (2,))]}

    def load(tensors):
        made = torch.zeros(2, 3)
        made.copy_(tensors["w"])
        made.mul_(2)  # the copied values are no longer the sent ones
        model.a.weight.data.copy_(made)
        model.a.bias.data.copy_(tensors["b"] + 1)
        dropped = torch.zeros(3)
        dropped.copy_(tensors["s"])  # such as packed by a kernel

    layout = traced(model, {}, load, tensors)
    assert layout.opaque == {"w", "b", "s"} and layout.regions == {}


def test_copy_that_converts_or_broadcasts_makes_a_name_opaque():
    model = nn.Module()
    model.a = Layer(weight=(2, 3), bias=(3,))
    tensors = {"w": numbered(2, 3).bfloat16(), "b": numbered(1)}

    def load(tensors):
        made = torch.zeros(2, 3)
        made.copy_(tensors["w"])
        model.a.weight.data.copy_(made)
        other = torch.zeros(3)
        other.copy_(tensors["b"])
        model.a.bias.data.copy_(other)

    assert traced(model, {}, load, tensors).opaque == {"w", "b"}


def test_transposed_parameter_that_is_loaded_in_place_is_written_in_its_kernel_layout():
    """MXFP8 linear layers are loaded as [N, K] into memory that kernels read as [K, N]."""
    model = nn.Module()
    model.a = Layer(weight=(5, 6))  # [K, N]
    kernel = model.a.weight.data
    view = kernel.transpose(0, 1)
    steps = zip((5, 1), (6, 5), view.stride(), strict=True)
    in_place = {storage_of(view): (view, Target.kernel_layout("a.weight", "a", kernel, steps))}
    tensors = {"up": numbered(4, 5), "gate": numbered(2, 5, start=50.0)}

    def load(tensors):
        view[:4].copy_(tensors["up"])
        view[4:].copy_(tensors["gate"])

    layout = traced(model, in_place, load, tensors)
    assert layout.opaque == set() and layout.mapped_elements() == {"a.weight": 30}
    expected = kernel.clone()
    kernel.zero_()
    seen = []
    applier = make_applier(model, layout, refresh=seen.append)
    for name, tensor in tensors.items():
        applier.apply_chunk(name, torch.arange(tensor.numel()), 0, tensor.view(-1))
    applier.finish()
    assert torch.equal(kernel, expected)
    assert sorted(seen[0]["a"]["weight"].tolist()) == list(range(30))


def test_elements_of_a_buffered_parameter_are_written_to_its_buffer():
    """MXFP4 weights: elements of the kernel layout cannot be written, so a refresh of the layer copies the buffer."""
    model = nn.Module()
    model.a = Layer(weight=(5, 6))
    kernel, buffer = model.a.weight.data, torch.zeros(6, 5)
    in_place = {storage_of(buffer): (buffer, Target.buffered("a.weight", "a", kernel, buffer))}
    tensors = {"up": numbered(4, 5), "gate": numbered(2, 5, start=50.0)}

    def load(tensors):
        buffer[:4].copy_(tensors["up"])
        buffer[4:].copy_(tensors["gate"])

    layout = traced(model, in_place, load, tensors)
    assert layout.opaque == set() and layout.mapped_elements() == {"a.weight": 30}
    seen, expected = [], buffer.clone()
    applier = make_applier(model, layout, refresh=seen.append)
    assert applier.moved_parameter() is None
    applier.apply_chunk("gate", torch.tensor([1, 7]), 0, torch.tensor([-1.0, -2.0]))
    applier.finish()
    expected[4, 1], expected[5, 2] = -1.0, -2.0
    assert torch.equal(buffer, expected) and not kernel.any()
    assert seen[0]["a"]["weight"].tolist() == [21, 27]
    model.a.weight.data = kernel.clone()
    assert applier.moved_parameter() == "a.weight"


def test_a_kernel_layout_with_two_dimensions_of_the_same_stride_is_refused():
    with pytest.raises(ValueError, match=r"a\.scale: two dimensions .* have the same stride"):
        Target.kernel_layout("a.scale", "a", torch.zeros(2, 4), [(1, 4, 2), (1, 2, 1)])


@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    data=st.data(),
)
def test_region_locates_the_same_elements_as_a_loop_over_the_box(shape, data):
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    box = full
    for dim in range(3):
        start = data.draw(st.integers(0, shape[dim] - 1))
        box = box.narrow(dim, start, data.draw(st.integers(1, shape[dim] - start)))
    order = data.draw(st.permutations([0, 1, 2]))
    box = box.permute(order)
    target = torch.full(box.shape, -1)
    region = Region.of(box.storage_offset(), 7, zip(box.stride(), box.size(), target.stride(), strict=True))
    indices = sorted(data.draw(st.sets(st.integers(0, full.numel() - 1), min_size=1)))
    located, positions = region.locate(torch.tensor(indices))
    kept = indices if positions is None else [indices[i] for i in positions]
    expected = {int(value): 7 + i for i, value in enumerate(box.flatten())}
    assert dict(zip(kept, located.tolist(), strict=True)) == {i: expected[i] for i in indices if i in expected}
    assert region.numel == box.numel()


def test_reloaded_layer_keeps_copies_changes_them_and_is_reloaded_completely():
    model = nn.Module()
    model.packed, model.plain = Layer(bias=(2,)), Layer(weight=(2,))
    tensors = {"w": numbered(2, 2), "b": numbered(2), "n": numbered(2)}

    def load(tensors):
        made = torch.zeros(2, 2)
        made.copy_(tensors["w"])
        for parameter, name in ((model.packed.bias, "b"), (model.plain.weight, "n")):
            other = torch.zeros(2)
            other.copy_(tensors[name])
            parameter.data.copy_(other)

    layout = traced(model, {}, load, tensors)
    reloads, repacked = [], []
    applier = make_applier(
        model,
        layout,
        reloaded={"packed": model.packed},
        derived={"plain": lambda: repacked.append("plain"), "packed": lambda: repacked.append("packed")},
        reload=lambda layers, given: reloads.append((list(layers), {name: t.clone() for name, t in given})),
    )
    assert not applier.complete
    applier.keep(tensors.items())
    assert applier.complete and applier.kept_bytes == 6 * 4
    applier.apply_chunk("w", torch.tensor([1]), 0, torch.tensor([9.0]))
    applier.finish()
    ((layers, given),) = reloads
    assert layers == ["packed"] and given["w"].tolist() == [[1.0, 9.0], [3.0, 4.0]] and set(given) == {"w", "b"}
    assert repacked == ["packed"]  # the weights of the other layer did not change
    applier.apply_chunk("n", None, 0, torch.tensor([5.0, 6.0]))
    applier.finish()
    assert len(reloads) == 1 and repacked == ["packed", "plain"] and model.plain.weight.tolist() == [5.0, 6.0]


def test_parameter_whose_memory_was_replaced_is_named():
    model = nn.Module()
    model.a = Layer(weight=(3,))

    def load(tensors):
        made = torch.zeros(3)
        made.copy_(tensors["w"])
        model.a.weight.data.copy_(made)

    applier = make_applier(model, traced(model, {}, load, {"w": numbered(3)}))
    assert applier.moved_parameter() is None
    model.a.weight.data = torch.zeros(3)
    assert applier.moved_parameter() == "a.weight"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_bytes_are_copied_and_never_converted(dtype):
    raw = torch.arange(64, dtype=torch.uint8).view(dtype)  # includes bytes that a conversion would change
    model = nn.Module()
    model.a = Layer()
    model.a.register_parameter("weight", nn.Parameter(torch.zeros(raw.shape, dtype=dtype), requires_grad=False))
    applier = make_applier(
        model,
        traced(model, {}, lambda t: _through(model.a.weight, t["w"]), {"w": torch.zeros_like(raw)}),
    )
    applier.apply_chunk("w", None, 0, raw)
    assert torch.equal(bits(model.a.weight.data), bits(raw))


def _through(parameter, tensor):
    made = torch.empty_like(tensor)
    made.copy_(tensor)
    parameter.data.copy_(made)


# ---- tensors that are used, and the dtypes in which they are held ---------------------------------------------------


def held_after(load, tensors):
    trace = LoadTrace({}, {})
    trace.set_sources(tensors.items())
    with trace:
        load(tensors)
    trace.flush()
    return trace.held


def test_a_tensor_that_no_operation_reads_is_not_held():
    def load(tensors):
        torch.zeros(2, 4).copy_(tensors["a"].narrow(0, 0, 2))
        torch.cat([tensors["b"], tensors["c"]])
        tensors["d"].view(8).narrow(0, 0, 4).t()  # views read nothing
        torch.empty(2, 4, device="meta").copy_(tensors["e"])
        torch.full((), tensors["f"].item())

    tensors = {name: numbered(2, 4) for name in "abcde"} | {"f": torch.tensor(1.0)}
    assert held_after(load, tensors).keys() == set("abcef")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_are_held_in_the_widest_dtype_that_they_are_copied_to(device):
    def target(dtype):
        return torch.empty(2, 4, dtype=dtype, device=device)

    def load(tensors):
        target(torch.bfloat16).copy_(tensors["same"])
        target(torch.float32).copy_(tensors["wide"])
        target(torch.float32).copy_(tensors["both"])
        target(torch.bfloat16).copy_(tensors["both"])
        target(torch.float32).copy_(torch.exp(tensors["computed"].float()))
        target(torch.float32).copy_(tensors["moved"].t().contiguous().t())
        tensors["converted"].float()
        tensors["read"].sum()

    names = ("same", "wide", "both", "computed", "moved", "converted", "read")
    held = held_after(load, {name: numbered(2, 4).bfloat16() for name in names})
    assert held == dict.fromkeys(names, torch.float32) | {"same": torch.bfloat16, "read": None}


def test_a_kept_copy_of_another_shape_or_dtype_is_replaced():
    """An update with a wrong tensor keeps a copy before the loader refuses it; the next update repairs the engine."""
    model = nn.Module()
    model.layer = Layer(weight=(2, 4))
    layout = traced(model, {}, lambda tensors: tensors["a"].float(), {"a": numbered(2, 4).bfloat16()})
    reloaded = []
    applier = make_applier(model, layout, reload=lambda layers, tensors: reloaded.extend(tensors))
    for wrong in (numbered(2, 3), numbered(2, 4).double()):
        applier.keep([("a", wrong)])
    right = numbered(2, 4)
    applier.keep([("a", right)])
    applier.apply_chunk("a", torch.tensor([5]), 0, torch.tensor([-1.0]))
    applier.finish()
    right.view(-1)[5] = -1.0
    assert len(reloaded) == 1 and torch.equal(reloaded[0][1], right)
