"""Rows of a parameter that each checkpoint tensor consists of."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fixtures.ranks import run_ranks
from verl.workers.engine import export_rows
from verl.workers.engine.export_rows import LocalRows, RowRange, find_row_ranges, local_rows

SHAPES = {"packed": torch.Size([2, 6, 4]), "plain": torch.Size([3, 4]), "norm": torch.Size([5])}
CONVERTS = SimpleNamespace(_weight_conversions=[object()])


def split_experts(tensors):
    """Split two packed experts of six rows into tensors of three rows."""
    found = {name: t for name, t in tensors.items() if name != "packed"}
    for i, expert in enumerate(tensors["packed"]):
        found |= {f"gate{i}": expert[:3], f"up{i}": expert[3:]}
    return found


CUT = {
    "packed": tuple(RowRange(name, (3, 4), 3 * i) for i, name in enumerate(("gate0", "up0", "gate1", "up1"))),
    "plain": (RowRange("plain", (3, 4), 0),),
    "norm": (RowRange("norm", (5,), 0),),
}


def split_and_change(name, how):
    def convert(tensors):
        found = split_experts(tensors)
        return {**found, name: how(found[name])}

    return convert


@pytest.mark.parametrize(
    ("convert", "lost"),
    [
        (split_experts, ()),
        (split_and_change("up1", lambda t: t.flip(0)), ("packed",)),
        (split_and_change("up1", lambda t: t.flip(1)), ("packed",)),
        (split_and_change("gate0", lambda t: t.reshape(4, 3)), ("packed",)),
        (split_and_change("plain", lambda t: t.reshape(4, 3).t()), ("plain",)),
        (split_and_change("norm", lambda t: t.flip(0)), ("norm",)),
        (split_and_change("plain", lambda t: t[:2]), SHAPES),  # drops a row
        (split_and_change("norm", lambda t: torch.cat([t, t])), SHAPES),  # duplicates rows
        (lambda tensors: {**split_experts(tensors), "plain": tensors["packed"][0, :3], "gate0": tensors["plain"]}, ()),
    ],
)
def test_row_ranges_are_found_unless_the_conversion_changes_rows(monkeypatch, convert, lost):
    monkeypatch.setattr(export_rows, "revert_weight_conversion", lambda model, tensors: convert(tensors))
    found = find_row_ranges(CONVERTS, SHAPES)
    assert set(found) == set(SHAPES) - set(lost)
    # The ranges reproduce the conversion.
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    whole = convert(weights)
    for name, ranges in found.items():
        for part in ranges:
            shape, start = part.shape_and_offset(weights[name])
            flat = weights[name].reshape(-1)[start : start + whole[part.name].numel()]
            assert torch.equal(flat.view(shape), whole[part.name])


def test_parameters_that_the_conversion_joins_have_no_ranges(monkeypatch):
    def convert(model, tensors):
        return {"joined": torch.cat([tensors["a"], tensors["b"]]), "c": tensors["c"]}

    monkeypatch.setattr(export_rows, "revert_weight_conversion", convert)
    assert set(find_row_ranges(CONVERTS, {name: torch.Size([3, 4]) for name in "abc"})) == {"c"}


def test_row_ranges_of_packed_experts(monkeypatch):
    monkeypatch.setattr(export_rows, "revert_weight_conversion", lambda model, tensors: split_experts(tensors))
    assert find_row_ranges(CONVERTS, SHAPES) == CUT


def test_without_a_conversion_each_parameter_is_one_checkpoint_tensor():
    found = find_row_ranges(SimpleNamespace(), {**SHAPES, "scalar": torch.Size([])})
    assert {name: [part.shape for part in ranges] for name, ranges in found.items()} == {
        **{name: [tuple(shape)] for name, shape in SHAPES.items()},
        "scalar": [()],
    }


def local_program(rank):
    mesh = init_device_mesh("cpu", (2,))
    tensors = [torch.arange(5.0), torch.arange(12.0).view(3, 4), torch.arange(30.0).view(3, 5, 2)]
    cut = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors]
    found = []
    for tensor, shard in zip(tensors, cut, strict=True):
        held = local_rows(shard, rank)
        local, length = shard.to_local().reshape(-1), export_rows.row_length(tensor.shape)
        found.append((held.sends, torch.equal(local, tensor.reshape(-1)[held.first * length :][: local.numel()])))
    copied = DTensor.from_local(tensors[1], mesh, [Replicate()], run_check=False)
    columns = distribute_tensor(tensors[1], mesh, [Shard(1)])
    return found, [local_rows(copied, rank), local_rows(tensors[1], rank)], local_rows(columns, rank)


def test_rows_that_a_rank_holds_and_the_rank_that_sends_them():
    for rank, (cut, whole, columns) in enumerate(run_ranks(2, local_program)):
        assert cut == [(True, True)] * 3
        assert whole == [LocalRows(0, sends=rank == 0)] * 2
        assert columns is None
