from ray.runtime_env import RuntimeEnv

from verl.single_controller.session import ray_init_options


def test_environment_variables_are_text_for_ray():
    """A command line gives `env_vars.NAME=1` as a number, which Ray refuses."""
    given = {"num_cpus": None, "runtime_env": {"env_vars": {"A": 1, "B": "x"}, "working_dir": None}}
    options = ray_init_options(given)
    assert options == {"runtime_env": {"env_vars": {"A": "1", "B": "x"}, "working_dir": None}}
    assert RuntimeEnv(env_vars=options["runtime_env"]["env_vars"]).env_vars() == {"A": "1", "B": "x"}
    assert given["runtime_env"]["env_vars"]["A"] == 1
    assert ray_init_options({"num_cpus": 2, "runtime_env": {}}) == {"num_cpus": 2, "runtime_env": {}}
