import pytest

from verl.config.errors import ConfigError

A, R, C = "actor_rollout_ref__actor__", "actor_rollout_ref__ref__", "critic__"


@pytest.mark.parametrize(
    ("section", "with_role"),
    [
        (f"{A}fsdp_config__", {}),
        (f"{R}fsdp_config__", {f"{A}use_kl_loss": True}),
        (f"{C}fsdp__", {"algorithm__adv_estimator": "gae", "critic__model__path": "model"}),
    ],
)
@pytest.mark.parametrize("size", [0, 3])
def test_an_fsdp_size_that_does_not_divide_the_ranks_is_an_error(plan_of, run_files, section, with_role, size):
    if "critic__model__path" in with_role:
        with_role = with_role | {"critic__model__path": run_files.model}
    name = f"{section.replace('__', '.')}fsdp_size"
    with pytest.raises(ConfigError, match=rf"{name}={size}: must divide the 4 ranks .* one of 1, 2, 4"):
        plan_of(trainer__n_gpus_per_node=4, **with_role, **{f"{section}fsdp_size": size})


@pytest.mark.parametrize("size", [-1, 1, 2, 4, 8])
def test_other_sizes_are_valid(plan_of, size):
    plan_of(trainer__n_gpus_per_node=4, **{f"{A}fsdp_config__fsdp_size": size})


def test_a_size_of_a_model_that_the_run_does_not_have_is_no_error(plan_of):
    plan_of(trainer__n_gpus_per_node=4, **{f"{R}fsdp_config__fsdp_size": 3, f"{C}fsdp__fsdp_size": 3})


@pytest.mark.parametrize("section", [f"{A}fsdp_config__", f"{C}fsdp__"])
def test_two_dtypes_of_the_computation_are_an_error(plan_of, run_files, section):
    critic = {"algorithm__adv_estimator": "gae", "critic__model__path": run_files.model}
    both = {f"{section}dtype": "float32", f"{section}mixed_precision__param_dtype": "bf16"}
    with pytest.raises(ConfigError, match=r"mixed_precision.param_dtype=bf16: differs from .*\.dtype=float32"):
        plan_of(**critic, **both)
    plan_of(**critic, **both | {f"{section}dtype": "bfloat16"})


def test_param_dtype_is_the_dtype_of_the_computation(plan_of):
    for name in ("bf16", "float32"):
        plan = plan_of(**{f"{A}fsdp_config__mixed_precision__param_dtype": name})
        assert plan.compute_dtype == {"bf16": "bfloat16"}.get(name, name)


@pytest.mark.parametrize("section", ["actor_rollout_ref__model__", "critic__model__"])
def test_activation_offload_needs_gradient_checkpointing(plan_of, run_files, section):
    critic = {"algorithm__adv_estimator": "gae", "critic__model__path": run_files.model}
    keys = {f"{section}enable_activation_offload": True}
    plan_of(**critic, **keys)
    name = section.replace("__", ".")
    with pytest.raises(ConfigError, match=rf"{name}enable_activation_offload=True: .*enable_gradient_checkpointing"):
        plan_of(**critic, **keys, **{f"{section}enable_gradient_checkpointing": False})
