"""Import errors for names of upstream verl that do not exist here, with advice.

Modules that do not exist here are found by a finder that `import verl` adds at the end of `sys.meta_path`. A module
that exists but lacks names of upstream verl has `__getattr__ = missing_names(__name__)`.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WORKERS = (
    "the processes of a run are not part of the public interface. Change the algorithm with register_adv_est and "
    "register_policy_loss, the samples with an agent loop, the data with data.custom_cls (docs/extending.md)"
)
_LOOP = (
    "the training loop cannot be replaced by parts. Start a run with `python3 -m verl.trainer.main_ppo`, and extend it "
    "with registered functions and classes (docs/extending.md)"
)
_MODULES = {
    "verl.single_controller.ray": _WORKERS,
    "verl.single_controller.base": _WORKERS,
    "verl.workers.fsdp_workers": _WORKERS,
    "verl.workers.megatron_workers": "Megatron is not supported; FSDP2 is the only training engine so far",
    "verl.workers.engine_workers": _WORKERS,
    "verl.workers.sharding_manager": _WORKERS,
    "verl.trainer.ppo.reward": "rewards are computed in the run. Set reward.custom_reward_function.path, or register a "
    "reward manager with verl.workers.reward_manager.register",
    "verl.trainer.constants_ppo": "set the environment of a run's processes in ray_kwargs.ray_init.runtime_env",
    **dict.fromkeys(
        ("verl.trainer.sft_trainer", "verl.trainer.fsdp_sft_trainer"),
        "supervised fine-tuning is not supported; this package trains with PPO and its variants",
    ),
    "verl.utils.tensordict_utils": "use the methods of verl.DataProto",
    "verl.utils.megatron_utils": "Megatron is not supported; FSDP2 is the only training engine so far",
    "verl.utils.fsdp_utils": _WORKERS,
    "verl.utils.debug": "`verl report` shows times and memory of a run",
    "verl.models": "models are loaded with transformers; nothing has to be registered",
    "verl.interactions": "simulated users are not supported; write an agent loop (docs/agent_loops.md)",
    "verl.experimental.fully_async_policy": _LOOP,
    "verl.experimental.one_step_off_policy": _LOOP,
    "verl.experimental.transfer_queue": _LOOP,
}
_NAMES = {
    "verl.trainer.ppo.utils": {
        **dict.fromkeys(("Role", "WorkerType"), _LOOP),
        "need_reward_model": "read config.reward.reward_model.enable",
        "create_rl_dataset": "call verl.utils.dataset.rl_dataset.create_rl_dataset(files, tokenizer, config.data)",
        "create_rl_sampler": "call verl.utils.dataset.sampler.create_rl_sampler(config.data, dataset)",
    },
    "verl.utils.config": {
        "validate_config": "call verl.preflight.check(config) with the result of verl.config.load_config(overrides)",
        "update_dict_with_config": "use verl.config: load_config(overrides) returns typed dataclasses that are "
        "mappings too",
    },
    "verl.trainer.ppo.ray_trainer": {
        **dict.fromkeys(("ResourcePoolManager", "Role", "WorkerType"), _LOOP),
    },
    "verl.trainer.main_ppo": {"TaskRunner": _LOOP},
    "verl.trainer.ppo.core_algos": {
        "compute_policy_loss": "call compute_policy_loss_vanilla(..., config=actor_config), and register your own loss "
        "with register_policy_loss",
        **dict.fromkeys(
            ("AdaptiveKLController", "FixedKLController", "get_kl_controller"),
            "set algorithm.kl_ctrl.type; verl.algorithms.kl_in_reward has the controllers",
        ),
    },
    "verl.utils": {"tensordict_utils": "use the methods of verl.DataProto"},
    "verl.protocol": {"DataProtoFuture": _WORKERS},
    "verl.experimental.agent_loop": dict.fromkeys(("AgentLoopManager", "AgentLoopWorker"), _LOOP),
    "verl.experimental.agent_loop.agent_loop": {
        **dict.fromkeys(("AgentLoopManager", "AgentLoopWorker", "AsyncLLMServerManager"), _LOOP),
    },
}


class MissingUpstreamModuleError(ModuleNotFoundError):
    """A module of upstream verl does not exist here; the message says what to use instead."""


class MissingUpstreamNameError(ImportError):
    """A name in a module of upstream verl does not exist here; the message says what to use instead."""


def missing_names(module: str) -> Callable[[str], Any]:
    """Return `__getattr__` of a module that lacks names of upstream verl."""

    def get(name: str) -> Any:
        advice = _NAMES[module].get(name)
        if advice is not None:
            raise MissingUpstreamNameError(
                f"{module}.{name} of upstream verl does not exist here: {advice}", name=module
            )
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get


class _Finder(importlib.abc.MetaPathFinder):
    """Raises the error for a module of upstream verl that no other finder has found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parts = fullname.split(".")
        for end in range(len(parts), 0, -1):
            if advice := _MODULES.get(".".join(parts[:end])):
                raise MissingUpstreamModuleError(
                    f"{fullname} of upstream verl does not exist here: {advice}", name=fullname
                )
        return None


def install_finder() -> None:
    """Add the finder behind all others; later calls do nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
