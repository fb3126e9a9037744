"""Bytes that an engine reads for one token, counted by hand."""

import pytest

from fixtures.header_checkpoint import small_decoder, write_header_checkpoint
from verl.precision.plans import Option, Plan
from verl.precision.speed import Speed
from verl.utils.model_dir.index import read_checkpoint_index
from verl.utils.quantization.ascend_description.units import read_units

W8 = "W8A8_MXFP8"
NORMS, ATTENTION, EXPERT, ROUTER, HEAD = 64, 4 * 64 * 64 + 64, 3 * 64 * 128, 4 * 64, 128 * 64


def read(model):
    return read_units(read_checkpoint_index(model), [W8])


def plan_of(units, part):
    options = [Option(unit.name, W8, unit.saved[W8], 0.0) for unit in units.units if part in unit.name]
    plan = Plan()
    for option in options:
        plan = Plan(plan.saved + option.saved, 0.0, option, plan)
    return plan


def test_dense_model_reads_all_weights_but_the_embedding(tmp_path):
    units = read(write_header_checkpoint(tmp_path / "model", *small_decoder()))
    speed = Speed(units, 1e9)
    layers = 2 * (ATTENTION + EXPERT)
    assert speed.bytes_per_token(Plan()) == 2 * (layers + HEAD + NORMS)
    quantized = 2 * 3 * 64 * 128 * 33 // 32
    assert speed.bytes_per_token(plan_of(units, "mlp")) == 2 * (2 * ATTENTION + HEAD + NORMS) + quantized
    assert speed.tokens_per_second(Plan()) == pytest.approx(1e9 / (2 * (layers + HEAD + NORMS)))


def test_tied_embedding_is_read_as_the_head(tmp_path):
    config, tensors = small_decoder()
    del tensors["lm_head.weight"]
    speed = Speed(read(write_header_checkpoint(tmp_path / "model", config, tensors)), 1e9)
    assert speed.bytes_per_token(Plan()) == 2 * (2 * (ATTENTION + EXPERT) + HEAD + NORMS)


def test_only_chosen_experts_are_read(tmp_path):
    units = read(write_header_checkpoint(tmp_path / "model", *small_decoder(experts=4, num_experts_per_tok=2)))
    speed = Speed(units, 1e9)
    others = 2 * (2 * (ATTENTION + ROUTER) + HEAD + NORMS)
    assert speed.bytes_per_token(Plan()) == others + 2 * 2 * 2 * EXPERT
    assert speed.bytes_per_token(plan_of(units, "experts")) == others + 2 * 2 * EXPERT * 33 / 32
