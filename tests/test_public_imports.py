"""Imports of upstream verl that user code has most often: which work, and which errors the others give.

The names were counted over upstream verl's documents and examples, verl-recipe, agent-lightning and rllm (August 2026).
"""

import importlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import verl
from verl.extension.upstream_names import MissingUpstreamModuleError, MissingUpstreamNameError

MIGRATING = (Path(__file__).resolve().parents[1] / "docs/migrating.md").read_text(encoding="utf-8")
SENTENCES = " ".join(MIGRATING.split())

# The 40 most frequent imports, most frequent first; a module alone has no name.
TOP_40 = [
    "verl:DataProto",
    "verl.single_controller.ray:RayWorkerGroup",
    "verl.utils.hdfs_io:makedirs",
    "verl.utils.fs:copy_to_local",
    "verl.trainer.ppo.ray_trainer:ResourcePoolManager",
    "verl.utils.hdfs_io:copy",
    "verl.utils:hf_tokenizer",
    "verl.trainer.ppo.utils:Role",
    "verl.trainer.ppo.utils:need_reference_policy",
    "verl.utils.tracking:Tracking",
    "verl.single_controller.base.decorator:register",
    "verl.single_controller.base.decorator:Dispatch",
    "verl.utils:hf_processor",
    "verl.single_controller.ray:RayClassWithInitArgs",
    "verl.utils.config:omega_conf_to_dataclass",
    "verl.trainer.ppo.ray_trainer:RayPPOTrainer",
    "verl.utils.device:get_device_name",
    "verl.utils.dataset.rl_dataset:collate_fn",
    "verl.trainer.ppo.ray_trainer:Role",
    "verl.utils.config:validate_config",
    "verl.utils.metric:reduce_metrics",
    "verl.trainer.ppo.utils:WorkerType",
    "verl.trainer.ppo.core_algos:agg_loss",
    "verl.trainer.ppo.utils:need_critic",
    "verl.utils:tensordict_utils",
    "verl.utils.device:get_device_id",
    "verl.trainer.ppo.ray_trainer:compute_response_mask",
    "verl.utils.torch_functional:",
    "verl.trainer.ppo.metric_utils:compute_throughout_metrics",
    "verl.trainer.ppo.metric_utils:compute_timing_metrics",
    "verl.trainer.ppo.ray_trainer:apply_kl_penalty",
    "verl.trainer.constants_ppo:get_ppo_ray_runtime_env",
    "verl.utils.device:is_cuda_available",
    "verl.workers.fsdp_workers:RewardModelWorker",
    "verl.trainer.ppo.ray_trainer:compute_advantage",
    "verl.single_controller.base:Worker",
    "verl.protocol:DataProto",
    "verl.single_controller.ray.base:create_colocated_worker_cls",
    "verl.workers.fsdp_workers:ActorRolloutRefWorker",
    "verl.workers.megatron_workers:RewardModelWorker",
]
# Further imports of code that extends a run.
EXTENSIONS = [
    "verl.utils.dataset.rl_dataset:RLHFDataset",
    "verl.utils.dataset:RLHFDataset",
    "verl.trainer.ppo.core_algos:register_adv_est",
    "verl.trainer.ppo.core_algos:register_policy_loss",
    "verl.trainer.ppo.core_algos:AdvantageEstimator",
    "verl.trainer.ppo.core_algos:kl_penalty",
    "verl.trainer.ppo.core_algos:compute_policy_loss",
    "verl.utils.torch_functional:masked_mean",
    "verl.tools.base_tool:BaseTool",
    "verl.tools.base_tool:OpenAIFunctionToolSchema",
    "verl.tools.base_tool:ToolResponse",
    "verl.tools.schemas:ToolResponse",
    "verl.tools.schemas:OpenAIFunctionToolSchema",
    "verl.tools.function_tool:function_tool",
    "verl.utils.rollout_trace:rollout_trace_op",
    "verl.experimental.agent_loop.agent_loop:AgentLoopBase",
    "verl.experimental.agent_loop.agent_loop:AgentLoopOutput",
    "verl.experimental.agent_loop.agent_loop:register",
    "verl.experimental.agent_loop:AgentLoopManager",
    "verl.workers.reward_manager:register",
    "verl.workers.reward_manager.abstract:AbstractRewardManager",
    "verl.experimental.reward_loop.reward_manager:register",
    "verl.experimental.reward_loop.reward_manager.base:RewardManagerBase",
    "verl.experimental.dataset.sampler:AbstractCurriculumSampler",
    "verl.experimental.dataset.sampler:AbstractSampler",
    "verl.utils.reward_score:default_compute_score",
    "verl.utils.reward_score:gsm8k",
    "verl.utils.reward_score:math_dapo",
    "verl.utils.reward_score.math_reward:remove_boxed",
    "verl.utils.reward_score.math_reward:last_boxed_only_string",
    "verl.trainer.config.algorithm:RolloutCorrectionConfig",
    "verl.trainer.ppo.rollout_corr_helper:compute_rollout_correction_and_rejection_mask",
    "verl.trainer.ppo.rollout_corr_helper:compute_rollout_correction_and_add_to_batch",
    "verl.protocol:pad_dataproto_to_divisor",
    "verl.protocol:unpad_dataproto",
    "verl.utils.tokenizer:hf_tokenizer",
    "verl.trainer.main_ppo:run_ppo",
    "verl.trainer.ppo.reward:compute_reward",
]
# It exists with other arguments than upstream verl's: it is the training loop.
OTHER_ARGUMENTS = {"verl.trainer.ppo.ray_trainer:RayPPOTrainer"}


def attempt(name):
    """Import a name as `from module import name` does; return None, or the error."""
    module, _, attribute = name.partition(":")
    try:
        exec(f"from {module} import {attribute}" if attribute else f"import {module}", {})
    except ImportError as error:
        return error
    return None


@pytest.mark.parametrize("name", [*TOP_40, *EXTENSIONS])
def test_an_import_works_or_says_what_to_use_instead(name):
    error = attempt(name)
    if error is not None:
        assert isinstance(error, MissingUpstreamModuleError | MissingUpstreamNameError), error
        assert re.search(r"of upstream verl does not exist here: \w.{15,}", str(error))


def test_the_guide_lists_what_works_and_its_count():
    works = {name for name in [*TOP_40, *EXTENSIONS] if attempt(name) is None}
    table = MIGRATING.partition("<!-- imports -->")[2].partition("<!-- /imports -->")[0]
    listed = set()
    for line in table.strip().splitlines()[2:]:
        module, names = line.strip("| ").split(" | ")
        listed |= {f"{module.strip('`')}:{name}" for name in re.findall(r"`(\w+)`", names)}
    assert {name for name in works if not name.endswith(":")} - OTHER_ARGUMENTS <= listed
    assert not [name for name in listed if attempt(name) is not None]
    counts = [len([name for name in names if name in works - OTHER_ARGUMENTS]) for names in (TOP_40, EXTENSIONS)]
    assert f"{counts[0]} of the 40 most frequent imports" in SENTENCES, counts
    assert f"{counts[1]} of {len(EXTENSIONS)} further imports" in SENTENCES, counts


def test_a_missing_module_is_an_ordinary_import_error():
    with pytest.raises(ModuleNotFoundError, match=r"verl\.workers\.fsdp_workers of upstream verl does not exist here"):
        importlib.import_module("verl.workers.fsdp_workers")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'verl\.absent'"):
        importlib.import_module("verl.absent")
    with pytest.raises(ImportError, match="cannot import name 'absent'"):
        exec("from verl.trainer.ppo.ray_trainer import absent", {})


def test_import_verl_imports_no_torch():
    code = "import sys, verl, verl.utils, verl.utils.dataset; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", f"{code}; from verl import DataProto; assert 'torch' in sys.modules"], check=True
    )


def test_dataproto_is_the_class_of_verl_protocol():
    from verl.protocol import DataProto

    assert verl.DataProto is DataProto
    assert type(pickle.loads(pickle.dumps(verl.DataProto()))) is DataProto
    with pytest.raises(AttributeError, match="no attribute 'Absent'"):
        _ = verl.Absent
