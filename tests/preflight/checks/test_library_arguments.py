"""Arguments that a config passes on to vLLM and Ray."""

import dataclasses
import inspect

import pytest

from verl.preflight.checks.library_arguments import engine_argument_names, ray_argument_names

ENGINE = "actor_rollout_ref__rollout__engine_kwargs"
RAY = "ray_kwargs__ray_init"


def test_the_names_are_those_of_the_imported_packages():
    import ray
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert engine_argument_names() == {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    arguments = inspect.signature(inspect.unwrap(ray.init)).parameters.values()
    assert ray_argument_names() == {item.name for item in arguments if item.kind is not item.VAR_KEYWORD}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({ENGINE: {"vllm": {"max_num_seq": 4}}}, ["engine_kwargs.vllm.max_num_seq: ", "did you mean max_num_seqs?"]),
        ({ENGINE: {"vllm": {"zzz": 1}}}, ["engine_kwargs.vllm.zzz: ", "remove it"]),
        ({RAY: {"num_cpu": 2}}, ["ray_kwargs.ray_init.num_cpu: ", "did you mean num_cpus?"]),
        ({RAY: {"num_cpus": "lots"}}, ["ray_kwargs.ray_init.num_cpus=lots: must be a number"]),
        ({RAY: {"num_gpus": -1}}, ["ray_kwargs.ray_init.num_gpus=-1: must be a number"]),
        ({RAY: {"num_gpus": True}}, ["ray_kwargs.ray_init.num_gpus=True: must be a number"]),
    ],
)
def test_arguments_that_do_not_exist_are_errors(problem_of, changes, words):
    text = problem_of(**changes)
    assert all(word in text for word in words), text


def test_arguments_that_exist_are_accepted(plan_of):
    plan_of(**{ENGINE: {"vllm": {"max_logprobs": 30}}, RAY: {"num_cpus": 2, "_temp_dir": "/tmp/ray"}})
