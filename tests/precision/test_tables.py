"""Tables of a search, with known costs."""

import pytest

from fixtures.header_checkpoint import small_decoder, write_header_checkpoint
from verl.precision.budget import measure_options, search
from verl.precision.speed import Speed
from verl.precision.tables import render_costs, render_curve
from verl.utils.model_dir.index import read_checkpoint_index
from verl.utils.quantization.ascend_description.units import read_units

COSTS = {"q_proj": 1e-3, "o_proj": 2e-3, "up_proj": 4e-3, "down_proj": 1e-2}


def cost(name):
    return next(value for part, value in COSTS.items() if part in name) * (2 if ".1." in name else 1)


@pytest.fixture
def found(tmp_path):
    units = read_units(
        read_checkpoint_index(write_header_checkpoint(tmp_path / "model", *small_decoder())), ["W8A8_MXFP8"]
    )

    def kl(schemes):
        return sum(map(cost, schemes))

    steps = []
    options = measure_options(units, kl, lambda done, of: steps.append((done, of)))
    assert steps == [(number, 8) for number in range(1, 9)]
    return units, search(options, kl, 0.0125)


def test_costs_by_layer_and_kind(found):
    lines = [line.split() for line in render_costs(*found).splitlines()]
    assert lines[1] == ["layer", "self_attn.q,k,v", "self_attn.o", "mlp.gate,up", "mlp.down"]
    costs = [[cell.rstrip("*") for cell in line] for line in lines[2:]]
    assert costs[0] == ["0", "1.0e-03", "2.0e-03", "4.0e-03", "1.0e-02"]
    assert costs[1] == ["1", "2.0e-03", "4.0e-03", "8.0e-03", "2.0e-02"]
    assert costs[2] == ["sum", "3.0e-03", "6.0e-03", "1.2e-02", "3.0e-02"]
    chosen = found[1].chosen.plan.schemes
    assert sum(cell.endswith("*") for line in lines[2:] for cell in line) == len(chosen)
    assert lines[2][1].endswith("*"), "the cheapest layers are chosen"


def test_curve_has_the_measured_plans_and_marks_the_chosen_one(found):
    units, result = found
    lines = render_curve(units, result, Speed(units, 1e9)).splitlines()
    assert lines[2].split()[:3] == ["0", "of", "8"] and len(lines) == 3 + len(result.measured)
    assert lines[-1].split()[:3] == ["8", "of", "8"] and lines[-1].split()[-1] == "0.051"
    [marked] = [line for line in lines if line.endswith("<- chosen")]
    assert float(marked.split()[-3]) == pytest.approx(result.chosen.measured, rel=1e-2)
