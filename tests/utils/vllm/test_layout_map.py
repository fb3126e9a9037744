"""Loaders of every kind, watched: where each element went is what the memory itself says afterwards."""

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


def traced(model, loaded, load, tensors):
    trace = LoadTrace(loaded, parameters_by_storage(dict(model.named_children())))
    trace.bring(tensors.items())
    with trace:
        load(tensors)
    trace.settle()
    return trace.map


def patcher(model, layout, **over):
    options = dict(reloaded={}, derived={}, refresh=lambda places: None, reload=lambda layers, tensors: None) | over
    return DeltaApplier(model, layout, **options)


def test_a_packed_parameter_that_is_made_elsewhere_and_copied_in_is_known_element_by_element():
    model = nn.Module()
    model.qkv = Layer(weight=(10, 4))
    tensors = {"q": numbered(6, 4), "k": numbered(4, 8, start=100.0)}

    def load(tensors):
        made = torch.zeros(10, 4)
        made[:6].copy_(tensors["q"])
        made.narrow(0, 6, 4).copy_(tensors["k"].narrow(1, 4, 4))  # a tensor-parallel rank's half
        model.qkv.weight.data.copy_(made)

    layout = traced(model, {}, load, tensors)
    assert layout.opaque == set() and layout.filled() == {"qkv.weight": 40}
    patch = patcher(model, layout)
    fresh = {name: tensor + 1000 for name, tensor in tensors.items()}
    for name, tensor in fresh.items():
        patch.patch(name, torch.arange(tensor.numel()), 0, tensor.view(-1))
    expected = torch.cat([fresh["q"], fresh["k"][:, 4:]])
    assert torch.equal(model.qkv.weight, expected)


def test_what_a_loader_does_besides_copying_makes_a_name_opaque():
    model = nn.Module()
    model.a = Layer(weight=(2, 3), bias=(3,), scale=(3,))
    tensors = {name: numbered(*shape) for name, shape in [("w", (2, 3)), ("b", (3,)), ("s", (3,)), ("unused", (2,))]}

    def load(tensors):
        made = torch.zeros(2, 3)
        made.copy_(tensors["w"])
        made.mul_(2)  # what is copied in is no longer what was sent
        model.a.weight.data.copy_(made)
        model.a.bias.data.copy_(tensors["b"] + 1)
        dropped = torch.zeros(3)
        dropped.copy_(tensors["s"])  # packed by a kernel, say

    layout = traced(model, {}, load, tensors)
    assert layout.opaque == {"w", "b", "s"} and layout.regions == {}


def test_a_copy_that_converts_or_broadcasts_is_opaque():
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


def test_a_transposed_parameter_loaded_in_place_is_written_where_it_is_run():
    """As MXFP8 linear layers are: loaded as [N, K] into memory that is run as [K, N]."""
    model = nn.Module()
    model.a = Layer(weight=(5, 6))  # [K, N]
    run = model.a.weight.data
    view = run.transpose(0, 1)
    steps = zip((5, 1), (6, 5), view.stride(), strict=True)
    loaded = {storage_of(view): (view, Target.laid_out("a.weight", "a", run, steps))}
    tensors = {"up": numbered(4, 5), "gate": numbered(2, 5, start=50.0)}

    def load(tensors):
        view[:4].copy_(tensors["up"])
        view[4:].copy_(tensors["gate"])

    layout = traced(model, loaded, load, tensors)
    assert layout.opaque == set() and layout.filled() == {"a.weight": 30}
    expected = run.clone()
    run.zero_()
    seen = []
    patch = patcher(model, layout, refresh=seen.append)
    for name, tensor in tensors.items():
        patch.patch(name, torch.arange(tensor.numel()), 0, tensor.view(-1))
    patch.finish()
    assert torch.equal(run, expected)
    assert sorted(seen[0]["a"]["weight"].tolist()) == list(range(30))


@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    data=st.data(),
)
def test_a_region_finds_what_a_loop_over_the_box_finds(shape, data):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    box = whole
    for dim in range(3):
        start = data.draw(st.integers(0, shape[dim] - 1))
        box = box.narrow(dim, start, data.draw(st.integers(1, shape[dim] - start)))
    order = data.draw(st.permutations([0, 1, 2]))
    box = box.permute(order)
    target = torch.full(box.shape, -1)
    region = Region.of(box.storage_offset(), 7, zip(box.stride(), box.size(), target.stride(), strict=True))
    places = sorted(data.draw(st.sets(st.integers(0, whole.numel() - 1), min_size=1)))
    at, which = region.locate(torch.tensor(places))
    kept = places if which is None else [places[i] for i in which]
    expected = {int(value): 7 + i for i, value in enumerate(box.flatten())}
    assert dict(zip(kept, at.tolist(), strict=True)) == {p: expected[p] for p in places if p in expected}
    assert region.numel == box.numel()


def test_what_has_to_be_loaded_again_is_kept_patched_and_loaded_with_all_of_its_layer():
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
    patch = patcher(
        model,
        layout,
        reloaded={"packed": model.packed},
        derived={"plain": lambda: repacked.append("plain"), "packed": lambda: repacked.append("packed")},
        reload=lambda layers, given: reloads.append((list(layers), {name: t.clone() for name, t in given})),
    )
    assert not patch.complete
    patch.keep(tensors.items())
    assert patch.complete and patch.kept_bytes == 6 * 4
    patch.patch("w", torch.tensor([1]), 0, torch.tensor([9.0]))
    patch.finish()
    ((layers, given),) = reloads
    assert layers == ["packed"] and given["w"].tolist() == [[1.0, 9.0], [3.0, 4.0]] and set(given) == {"w", "b"}
    assert repacked == ["packed"]  # the other one's weights are as they were
    patch.patch("n", None, 0, torch.tensor([5.0, 6.0]))
    patch.finish()
    assert len(reloads) == 1 and repacked == ["packed", "plain"] and model.plain.weight.tolist() == [5.0, 6.0]


def test_a_parameter_whose_memory_was_replaced_is_named():
    model = nn.Module()
    model.a = Layer(weight=(3,))

    def load(tensors):
        made = torch.zeros(3)
        made.copy_(tensors["w"])
        model.a.weight.data.copy_(made)

    patch = patcher(model, traced(model, {}, load, {"w": numbered(3)}))
    assert patch.moved() is None
    model.a.weight.data = torch.zeros(3)
    assert patch.moved() == "a.weight"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_bytes_are_moved_and_never_converted(dtype):
    raw = torch.arange(64, dtype=torch.uint8).view(dtype)  # among them what a conversion would change
    model = nn.Module()
    model.a = Layer()
    model.a.register_parameter("weight", nn.Parameter(torch.zeros(raw.shape, dtype=dtype), requires_grad=False))
    patch = patcher(
        model,
        traced(model, {}, lambda t: _through(model.a.weight, t["w"]), {"w": torch.zeros_like(raw)}),
    )
    patch.patch("w", None, 0, raw)
    assert torch.equal(bits(model.a.weight.data), bits(raw))


def _through(parameter, tensor):
    made = torch.empty_like(tensor)
    made.copy_(tensor)
    parameter.data.copy_(made)
