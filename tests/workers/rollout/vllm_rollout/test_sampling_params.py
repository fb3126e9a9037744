"""Sampling parameters of a request: stop strings, and values that vLLM would change."""

import pytest

from verl.config.rollout import MIN_TEMPERATURE
from verl.workers.rollout.vllm_rollout.sampling_params import vllm_sampling_params


def build(given, **over):
    settings = {"max_tokens": 50, "room": 40, "num_generated": 0, "partial_rollout": False} | over
    return vllm_sampling_params(given, **settings)


@pytest.mark.parametrize("stop", ["</answer>", ["</answer>", "\n\n"]])
def test_stop_strings_reach_the_engine(stop):
    parameters = build({"temperature": 1.0, "stop": stop, "stop_token_ids": [7]})
    assert parameters.stop == ([stop] if isinstance(stop, str) else stop) and parameters.detokenize
    assert parameters.stop_token_ids == [7]


@pytest.mark.parametrize("given", [{}, {"stop": None}, {"stop": []}])
def test_without_stop_strings_the_engine_makes_no_text(given):
    assert not build(given).detokenize


def test_stop_strings_are_refused_with_partial_rollouts():
    with pytest.raises(ValueError, match="sampling parameters stop: not supported with partial rollouts"):
        build({"stop": "x"}, partial_rollout=True)


@pytest.mark.parametrize("given", [{"detokenize": True, "stop": "x"}, {"output_kind": 1}, {"n": 2}])
def test_parameters_with_one_right_value_cannot_be_set(given):
    with pytest.raises(ValueError, match=f"sampling parameter {next(iter(given))}=.* cannot be set"):
        build(given)


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"sampling parameters \['heat'\]"):
        build({"heat": 1})


@pytest.mark.parametrize("temperature", [0, 0.0, MIN_TEMPERATURE, 0.5, 1.0, 2.0])
def test_vllm_keeps_every_accepted_temperature(temperature):
    assert build({"temperature": temperature}).temperature == temperature


@pytest.mark.parametrize("temperature", [1e-6, 1e-5, 0.001, 0.00999])
def test_a_temperature_that_vllm_would_raise_is_an_error(temperature):
    with pytest.raises(ValueError, match=rf"temperature={temperature}: vLLM would sample at 0\.01"):
        build({"temperature": temperature})


def test_the_room_in_the_context_limits_the_tokens():
    assert build({}).max_tokens == 40 and build({"max_tokens": 9}).max_tokens == 9
    assert build({"max_tokens": 30}, num_generated=10).max_tokens == 20


def test_masks_need_the_log_probabilities_of_the_candidates():
    parameters = build({"logprobs": 0, "top_k": 20}, candidates=46, num_generated=3)
    assert parameters.logprobs == 46 and parameters.flat_logprobs
    without = build({"logprobs": 0, "top_k": 20})
    assert without.logprobs == 0 and not without.flat_logprobs
