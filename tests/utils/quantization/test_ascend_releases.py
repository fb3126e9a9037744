"""Layers that a release of vllm-ascend cannot hold; the releases' own failures are in tests/contract."""

import pytest

from fixtures.tiny import write_tiny_model
from verl.utils.quantization.ascend_description import build_description
from verl.utils.quantization.ascend_releases import validate_unpaired_groups


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    def of(kind, tp_size=1, ignore=(), **sizes):
        directory = write_tiny_model(tmp_path_factory.mktemp("model"), kind=kind, **sizes)
        return build_description(directory, tp_size=tp_size, ignore=ignore).layers

    return of


@pytest.mark.parametrize("release", ["0.18.0", "0.18.1rc1", "0.23.0", "0.26.0rc1", "0.30.0"])
def test_even_numbers_of_groups_are_taken_by_all(layers, release):
    validate_unpaired_groups(layers("qwen3_moe"), 1, release)
    validate_unpaired_groups(layers("qwen3"), 1, release)


@pytest.mark.parametrize(("size", "taken"), [(96, False), (80, False), (192, True)])
def test_linear_layers_on_0_18(layers, size, taken):
    found = layers("qwen3", hidden_size=size)
    validate_unpaired_groups(found, 1, "0.23.0")
    if taken:
        validate_unpaired_groups(found, 1, "0.18.0")
        return
    message = rf"layers\.0\.\S+ \[\d+, {size}\] has {size} inputs .*0\.18\.0 takes multiples of 64 only: use .*0\.23\.0"
    with pytest.raises(ValueError, match=message):
        validate_unpaired_groups(found, 1, "0.18.0")


def test_what_a_rank_holds_counts(layers):
    found = layers("qwen3", tp_size=2, intermediate_size=192)
    validate_unpaired_groups(found, 1, "0.18.0")
    with pytest.raises(
        ValueError, match=r"down_proj \[64, 192\] has 96 inputs on a rank \(tensor_model_parallel_size=2"
    ):
        validate_unpaired_groups(found, 2, "0.18.0")


@pytest.mark.parametrize("release", ["0.18.0", "0.23.0", "0.26.0rc1", "0.26.0"])
@pytest.mark.parametrize("sizes", [{"moe_intermediate_size": 96}, {"moe_intermediate_size": 80}])
def test_experts_on_every_release_that_was_read(layers, release, sizes):
    found = layers("qwen3_moe", **sizes)
    with pytest.raises(
        ValueError, match=r"experts\.0\.down_proj .* takes multiples of 64 in experts only: leave it out"
    ):
        validate_unpaired_groups(found, 1, release)
    validate_unpaired_groups(layers("qwen3_moe", ignore=[r"re:.*\.experts\..*"], **sizes), 1, release)
    validate_unpaired_groups(found, 1, "0.27.0")
