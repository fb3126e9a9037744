"""Checks of values and scales, before they are sent and on arrival."""

import pytest
import torch

from fixtures.scheme_models import EMBEDDING, Q_PROJ
from verl.workers.rollout.quantization import scheme_class
from verl.workers.rollout.quantization.scaled import ScaledWeights
from verl.workers.weight_sync.manifest import TensorSpec, WeightUpdateError

SCALED = ScaledWeights("_scale", "uint8", lambda shape: (*shape[:-1], -(-shape[-1] // 32)))
WEIGHT = ("a.weight", (6, 80), "float8_e4m3fn")


@pytest.mark.parametrize("name", ["ascend", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weight", [Q_PROJ, EMBEDDING])
def test_weights_that_are_not_finite_are_rejected_by_name(wide, scheme, weights_of, name, value, weight):
    weights = weights_of(wide)
    weights[weight][1, 2] = value
    with pytest.raises(WeightUpdateError, match=f"{weight}.*NaN or Inf"):
        list(scheme(name, wide).encode(weights.items()))


def specs(*entries):
    return {name: TensorSpec(name, shape, dtype) for name, shape, dtype in entries}


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (("a.weight_scale", (6, 4), "uint8"), r"'a\.weight_scale'.*\[6, 4\].*\[6, 3\]"),
        (("a.weight_scale", (6, 2), "uint8"), r"'a\.weight_scale'.*\[6, 2\].*\[6, 3\]"),
        (("a.weight_scale", (3, 6), "uint8"), r"'a\.weight_scale'.*\[3, 6\].*\[6, 3\]"),
        (("a.weight_scale", (6, 3), "float32"), r"'a\.weight_scale'.*float32.*uint8"),
    ],
)
def test_scales_that_do_not_fit_are_rejected_in_either_order(scale, message):
    both = specs(WEIGHT, scale)
    with pytest.raises(WeightUpdateError, match=message):
        SCALED.check_pair("a.weight_scale", both)
    if scale[2] == "uint8":
        with pytest.raises(WeightUpdateError, match=message):
            SCALED.check_pair("a.weight", both)


def test_plain_weight_with_scales_is_rejected():
    with pytest.raises(WeightUpdateError, match=r"'a\.weight': dtype .* is bfloat16, expected float8_e4m3fn"):
        SCALED.check_pair("a.weight", specs(("a.weight", (6, 80), "bfloat16"), ("a.weight_scale", (6, 3), "uint8")))


def test_fitting_tensors_do_not_raise():
    whole = specs(WEIGHT, ("a.weight_scale", (6, 3), "uint8"), ("norm.weight", (6,), "bfloat16"))
    for name in whole:
        SCALED.check_pair(name, whole)
    SCALED.check_complete(whole)


@pytest.mark.parametrize("left", [WEIGHT, ("a.weight_scale", (6, 3), "uint8")], ids=["weight", "scale"])
def test_half_a_pair_is_rejected(left):
    with pytest.raises(WeightUpdateError, match=r"'a\.weight.*did not arrive"):
        SCALED.check_complete(specs(left))


def test_checks_need_no_instance():
    nan = torch.tensor([[1, 255]], dtype=torch.uint8)
    received = specs(("a.weight_scale", (1, 2), "uint8"))
    with pytest.raises(WeightUpdateError, match=r"'a\.weight_scale'.*NaN"):
        scheme_class("ascend").check_tensor("a.weight_scale", nan, received)


PACKED = ScaledWeights("_scale", "uint8", lambda s: (*s[:-1], -(-s[-1] // 32)), {"float8_e4m3fn": 1, "uint8": 2})


def test_scales_of_packed_weights():
    """40 bytes of a row hold 80 values, which have 3 scales."""
    fitting = specs(("a.weight", (6, 40), "uint8"), ("a.weight_scale", (6, 3), "uint8"))
    for name in fitting:
        PACKED.check_pair(name, fitting)
    PACKED.check_complete(fitting)
    with pytest.raises(
        WeightUpdateError, match=r"scale shape is \[6, 2\], expected \[6, 3\] .* uint8 of shape \[6, 40\]"
    ):
        PACKED.check_pair("a.weight", specs(("a.weight", (6, 40), "uint8"), ("a.weight_scale", (6, 2), "uint8")))
    with pytest.raises(WeightUpdateError, match=r"'a\.weight': its scales \(a\.weight_scale\) did not arrive"):
        PACKED.check_complete(specs(("a.weight", (6, 40), "uint8")))
    with pytest.raises(WeightUpdateError, match="is bfloat16, expected float8_e4m3fn or uint8"):
        PACKED.check_pair("a.weight", specs(("a.weight", (6, 80), "bfloat16"), ("a.weight_scale", (6, 3), "uint8")))
    with pytest.raises(WeightUpdateError, match="is uint8, expected float8_e4m3fn"):
        SCALED.check_pair("a.weight", fitting)
