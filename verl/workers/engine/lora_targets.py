"""Choose the layers of a model that get a LoRA adapter, by the rules of peft."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from verl.config import LoraOptions

if TYPE_CHECKING:
    from peft import LoraConfig

_TARGETS = "actor_rollout_ref.model.target_modules"


def target_names(model: PreTrainedModel, options: LoraOptions) -> list[str]:
    """Return the full names of the layers that get an adapter.

    Raises:
        ValueError: an unknown module, no layer is left, a layer is not linear, or it shares its weight with the
            embeddings.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = {name: module for name, module in model.named_modules() if name}
    head = model.get_output_embeddings()
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
    wanted = linear if options.target_modules == "all-linear" else options.target_modules
    rule = LoraConfig(
        target_modules=wanted,
        exclude_modules=options.exclude_modules,
        **{name: value for name, value in options.shaping.items() if name.startswith("layers_")},
    )
    found = [name for name in modules if check_target_module_exists(rule, name)]
    if options.adapter_path is None:
        _check_all_known(model, options, linear)
    if not found:
        raise ValueError(
            f"{_TARGETS}={options.target_modules}, exclude_modules={options.exclude_modules}: they select no layer of "
            f"{type(model).__name__}; it has {', '.join(_last_parts(linear))}"
        )
    aliases = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*aliases, *aliases.values()}
    for name in found:
        if not isinstance(modules[name], nn.Linear):
            raise ValueError(
                f"{_TARGETS}: {name} has type {type(modules[name]).__name__}, but only linear layers can have an "
                f"adapter: {', '.join(_last_parts(linear))}"
            )
        if f"{name}.weight" in tied:
            raise ValueError(
                f"{_TARGETS}: {name} shares its weight with the embeddings, which its adapter would also change; "
                "remove it"
            )
    return found


def shortest_names(model: nn.Module, targets: list[str]) -> list[str]:
    """Return the last parts of the target names if they select exactly these layers, else the full names."""
    parts = _last_parts(targets)
    selected = {
        name for name, _ in model.named_modules() if any(name == part or name.endswith(f".{part}") for part in parts)
    }
    return parts if selected == set(targets) else sorted(targets)


def check_peft_keeps(config: LoraConfig, model: PreTrainedModel) -> None:
    """Check that peft does not convert a target: it takes some names of mixture-of-experts models for packed experts.

    Raises:
        ValueError: peft would place adapters on packed experts.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    converted = copy.deepcopy(config)
    names = set(config.target_modules or ())
    try:
        convert_peft_config_for_transformers(converted, model=model, conversions=None)
        lost = names - set(converted.target_modules or ())
    except ValueError as error:
        raise ValueError(f"{_TARGETS}: {error}") from None
    if lost:
        raise ValueError(
            f"{_TARGETS}: peft takes {', '.join(_last_parts(lost))} of {type(model).__name__} for packed experts, for "
            "which adapters are not supported; set "
            f"actor_rollout_ref.model.exclude_modules=[{','.join(_last_parts(lost))}]"
        )


def _check_all_known(model: PreTrainedModel, options: LoraOptions, linear: list[str]) -> None:
    """Check that every listed name selects a module: peft ignores names that do not, and would train fewer layers."""
    for key in ("target_modules", "exclude_modules"):
        given = getattr(options, key)
        for wanted in given if isinstance(given, list) else ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name, _ in model.named_modules()):
                known = _last_parts(linear)
                near = difflib.get_close_matches(wanted.rpartition(".")[2], known, n=3, cutoff=0.5) or known
                raise ValueError(
                    f"actor_rollout_ref.model.{key}: unknown module {wanted} of {type(model).__name__}; did you mean "
                    f"{', '.join(near)}?"
                )


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
