"""Tests of the record of written parameters: complete or in part, by any loader."""

import pytest
import torch
from torch import nn

from verl.utils.vllm.write_log import WriteLog


def parameters():
    return {
        "a": nn.Parameter(torch.zeros(4, 6), requires_grad=False),
        "b": nn.Parameter(torch.zeros(4, 6).to(torch.float8_e4m3fn), requires_grad=False),
        "c": nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False),
    }


def values(shape):
    return torch.ones(shape).to(torch.float8_e4m3fn)


def test_partial_writes_add_up_and_repeated_ones_do_not():
    made = parameters()
    log = WriteLog(made)
    with log:
        made["a"].data.copy_(torch.ones(4, 6))
        made["b"].data[:2].copy_(values((2, 6)))
        made["b"].data[:2].copy_(values((2, 6)))
    assert log.unwritten() == ["b (in part)", "c"]
    with log:
        made["b"].data.narrow(0, 2, 2).copy_(values((2, 6)))
        made["c"].data.t().copy_(torch.ones(2, 4, dtype=torch.uint8))
    assert log.unwritten() == []


def test_copies_outside_the_context_or_into_other_tensors_are_not_recorded():
    made = parameters()
    log = WriteLog(made)
    made["a"].data.copy_(torch.ones(4, 6))
    with log:
        torch.zeros(4, 6).copy_(torch.ones(4, 6))
    assert log.unwritten() == ["a", "b", "c"]


def test_a_copy_of_a_parameter_onto_itself_is_not_a_write():
    """vLLM's reload does this at the end with every parameter that it did not replace."""
    made = parameters()
    log = WriteLog(made)
    with log:
        for parameter in made.values():
            parameter.data.copy_(parameter)
    assert log.unwritten() == ["a", "b", "c"]


@pytest.mark.parametrize(("name", "sent"), [("b", torch.bfloat16), ("c", torch.float32), ("c", torch.float8_e4m3fn)])
def test_conversion_into_quantized_memory_is_refused(name, sent):
    made = parameters()
    with pytest.raises(ValueError, match=f"{name} holds .*was sent {sent}"), WriteLog(made):
        made[name].data.copy_(torch.ones(made[name].shape).to(sent))


def test_conversion_into_other_parameters_is_allowed():
    made = parameters()
    log = WriteLog(made)
    with log:
        made["a"].data.copy_(torch.ones(4, 6, dtype=torch.bfloat16))
    assert log.unwritten() == ["b", "c"]
