"""KL divergences, compared with models that an independent implementation rounds."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.fake_quant import fake_quantized, mxfp4_round_trip, mxfp8_round_trip
from fixtures.tiny import write_tiny_model
from verl.precision.sensitivity import Sensitivity, load_model, mean_kl
from verl.utils.model_dir.index import read_checkpoint_index
from verl.utils.quantization.ascend_description.units import read_units

SLOW = pytest.mark.slow
W8, W4 = "W8A8_MXFP8", "W4A8_MXFP"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QKV = ("q_proj", "k_proj", "v_proj")


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 80, (length,), generator=generator).tolist() for length in (60, 1, 37, 90)]


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """Return a function that gives the directory and the `Sensitivity` of a tiny model; each is made once."""
    made = {}

    def make(kind):
        if kind not in made:
            directory = str(write_tiny_model(tmp_path_factory.mktemp(kind), kind=kind, dtype="bfloat16"))
            units = read_units(read_checkpoint_index(directory), [W8, W4])
            model = load_model(directory, torch.device("cpu"))
            made[kind] = directory, Sensitivity(model, directory, units, prompts())
        return made[kind]

    return make


def expected_kl(model_dir, quantized):
    """KL(original || quantized) of all tokens in float64, one prompt at a time."""
    original = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    divergences = []
    with torch.no_grad():
        for prompt in prompts():
            ids = torch.tensor([prompt])
            p, q = (model(ids).logits[0].double().log_softmax(-1) for model in (original, quantized))
            divergences += (p.exp() * (p - q)).sum(-1).tolist()
    return sum(divergences) / len(divergences)


def plan(sensitivity, part, scheme, layers=(0, 1)):
    chosen = {unit: scheme for unit, known in sensitivity._forwards if known == scheme and part in unit}
    return {unit: scheme for unit in chosen if any(f"layers.{layer}." in unit for layer in layers)}


def test_mean_kl_equals_float64():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 300, generator=generator) * 4
    for size in (1e-3, 0.1, 2.0):
        other = logits + size * torch.randn(50, 300, generator=generator)
        p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
        expected = float((p.exp() * (p - q)).sum())
        assert float(mean_kl(logits.log_softmax(-1), other)) == pytest.approx(expected, rel=1e-3)


# A number near a rounding boundary may fall on either side of it, as the order of sums differs; that changes the
# divergence of its sequence a little, whereas a layer that rounds otherwise changes all of them.
CLOSE = 0.05


@pytest.mark.parametrize(
    ("kind", "part", "rounded", "scheme", "round_weight"),
    [
        ("qwen3", "q_proj", QKV, W8, mxfp8_round_trip),
        pytest.param("qwen3", "down_proj", ("down_proj",), W8, mxfp8_round_trip, marks=SLOW),
        pytest.param("qwen3", "up_proj", ("gate_proj", "up_proj"), W4, mxfp4_round_trip, marks=SLOW),
        pytest.param("qwen3", "layers", PROJECTIONS, W8, mxfp8_round_trip, marks=SLOW),
        pytest.param("qwen3_moe", "experts", (), W8, mxfp8_round_trip, marks=SLOW),
        pytest.param("qwen3_moe", "experts", (), W4, mxfp4_round_trip, marks=SLOW),
    ],
)
def test_divergence_equals_that_of_an_independently_rounded_model(measure, kind, part, rounded, scheme, round_weight):
    directory, sensitivity = measure(kind)
    left_out = ("lm_head", "gate", *(name for name in PROJECTIONS if name not in rounded))
    expected = expected_kl(directory, fake_quantized(directory, left_out, lambda name: round_weight))
    assert sensitivity.kl(plan(sensitivity, part, scheme)) == pytest.approx(expected, rel=CLOSE)
    assert sensitivity.tokens == 188


def test_nothing_quantized_is_no_divergence(measure):
    _, sensitivity = measure("qwen3")
    assert sensitivity.kl({}) == pytest.approx(0, abs=1e-9)


@SLOW
def test_layers_after_the_first_quantized_one_are_enough(measure):
    _, sensitivity = measure("qwen3")
    assert sensitivity.reuses_layers
    last = plan(sensitivity, "o_proj", W8, layers=[1])
    reused = sensitivity.kl(last)
    sensitivity.reuses_layers = False
    try:
        assert sensitivity.kl(last) == pytest.approx(reused, rel=1e-3)
    finally:
        sensitivity.reuses_layers = True


@SLOW
@pytest.mark.parametrize("fails", [True, False])
def test_model_whose_layers_exchange_more_than_outputs_runs_completely(tmp_path, fails):
    """Without the first layer, the last one fails or computes something else."""
    directory = str(write_tiny_model(tmp_path, dtype="bfloat16"))
    units = read_units(read_checkpoint_index(directory), [W8])
    model, exchanged = load_model(directory, torch.device("cpu")), []
    first, last = model.model.layers[0].mlp, model.model.layers[1].mlp
    first.register_forward_hook(lambda _module, _inputs, output: exchanged.append(output))
    last.register_forward_hook(
        lambda _module, _inputs, output: output + exchanged.pop() if exchanged or fails else output
    )
    sensitivity = Sensitivity(model, directory, units, prompts())
    assert not sensitivity.reuses_layers
    assert 0 < sensitivity.kl(plan(sensitivity, "o_proj", W8, layers=[1])) < 1


@SLOW
def test_weights_that_are_not_finite_are_rejected(tmp_path):
    directory = str(write_tiny_model(tmp_path, dtype="bfloat16"))
    units = read_units(read_checkpoint_index(directory), [W8])
    model = load_model(directory, torch.device("cpu"))
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="unquantized model are not finite"):
        Sensitivity(model, directory, units, prompts())
