"""Inputs of checkpointed layers on the host; the CPU stands for a device with memory of its own."""

import weakref
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fixtures.engine_cases import make_batch
from fixtures.memory_cases import assert_same_training, train_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.batching import split_mini_batches
from verl.workers.engine.activations import ActivationOffload, _Kept
from verl.workers.engine.host_memory import HostMemory

LAYERS = 5


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x, shift, scale=1.0):
        return x + torch.tanh(self.inner(x) + shift) * scale


def make_layers(offload):
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if offload is not None:
            layer.forward = offload.around(layer.forward)
    return layers


def test_gradients_are_the_same_for_several_micro_batches():
    """A layer also has an input that is not moved, and one by name."""
    results = []
    for offload in (None, ActivationOffload(HostMemory(torch.device("cpu")))):
        layers, start = make_layers(offload), torch.arange(16.0).view(2, 8).requires_grad_()
        for number in range(2):
            x, shift = start * (number + 1), torch.full((8,), 0.5, requires_grad=True)
            for layer in layers:
                x = layer(x, shift, scale=0.3)
            x.square().sum().backward()
        results.append([start.grad, shift.grad, *(parameter.grad for parameter in layers.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.any()


def test_after_the_forward_pass_no_input_is_on_the_device(monkeypatch):
    """In the backward pass the input of a layer and of the one before it are."""
    kept, restored = [], []
    create, restore = _Kept.__init__, _Kept.restore

    def note_created(self, *arguments):
        kept.append(weakref.ref(self))
        create(self, *arguments)

    def note_restored(self):
        tensor = restore(self)
        restored.append([number for number, other in enumerate(kept) if other() and other()._loading is not None])
        return tensor

    monkeypatch.setattr(_Kept, "__init__", note_created)
    monkeypatch.setattr(_Kept, "restore", note_restored)
    layers, inputs = make_layers(ActivationOffload(HostMemory(torch.device("cpu")))), []
    x, shift = torch.ones(2, 8, requires_grad=True) * 2, torch.zeros(8)
    for layer in layers:
        inputs.append(weakref.ref(x))
        x = layer(x, shift)
    assert [tensor() for tensor in inputs] == [None] * LAYERS
    assert all(each()._loading is None for each in kept) and len(kept) == LAYERS
    x.sum().backward()
    assert restored == [[3], [2], [1], [0], []]
    del x
    assert [each() for each in kept] == [None] * LAYERS


def test_passes_without_gradients_keep_nothing(monkeypatch):
    monkeypatch.setattr(_Kept, "__init__", None)
    layers, x = make_layers(ActivationOffload(HostMemory(torch.device("cpu")))), torch.ones(2, 8)
    with torch.no_grad():
        for layer in layers:
            x = layer(x, torch.zeros(8))


def test_an_input_by_name_is_an_error():
    layers = make_layers(ActivationOffload(HostMemory(torch.device("cpu"))))
    with pytest.raises(NotImplementedError, match="enable_activation_offload=True; set it to False"):
        layers[0](x=torch.ones(2, 8), shift=torch.zeros(8))


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_three_steps_equal_those_without_offloading(tmp_path, kind, ranks):
    model_dir = str(write_tiny_model(tmp_path, kind=kind))
    shards = split_mini_batches(make_batch(12), 4, ranks)
    model = {"enable_gradient_checkpointing": True}
    expected = run_ranks(ranks, train_program, model_dir, shards, {}, model)
    found = run_ranks(ranks, train_program, model_dir, shards, {}, model | {"enable_activation_offload": True})
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_training(ours, theirs)
