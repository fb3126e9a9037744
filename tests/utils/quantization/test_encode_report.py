"""Errors of an update's weights: the largest one, and errors by depth."""

from verl.utils.quantization.encode_report import errors_by_depth, worst_error


def test_worst_error_of_zeros_and_of_nan():
    assert worst_error({"a": [0.0, 0.0], "b": [1.0, 4.0]}) == (0.5, "b")
    error, name = worst_error({"a": [float("nan"), 1.0], "b": [1.0, 4.0]})
    assert name == "a" and error != error


def test_errors_by_depth_combine_the_experts_of_a_layer():
    experts = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    errors = {
        experts.format(1, 0): [1.0, 100.0],
        experts.format(1, 12): [3.0, 300.0],
        experts.format(3, 0): [0.04, 1.0],
        "model.layers.0.self_attn.q_proj.weight": [1.0, 9.0],
        "lm_head.weight": [0.25, 1.0],
    }
    assert errors_by_depth(errors) == {
        "mlp.experts.up_proj": [None, 0.1, None, 0.2],
        "self_attn.q_proj": [0.333],
        "lm_head": [0.5],
    }
