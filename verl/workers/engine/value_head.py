"""Turn a causal language model into a value model: a scalar head replaces the LM head."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from verl.utils.model_dir.index import SAFETENSORS_INDEX

# The name that transformers' models for token and sequence classification give their head.
HEAD = "score"
# Names of a scalar head in checkpoints: those of transformers, and those of TRL's models with a value head.
_CHECKPOINT_PREFIXES = (f"{HEAD}.", "v_head.summary.")
_SINGLE_FILE = "model.safetensors"


def output_head_keys(model: PreTrainedModel) -> set[str]:
    """Return the names of the LM head's weights, which a value model does not need."""
    name = _output_head_name(model)
    return {f"{name}.{key}" for key, _ in model.get_output_embeddings().named_parameters()}


def to_value_model(model: PreTrainedModel, head: dict[str, torch.Tensor] | None = None) -> None:
    """Replace the LM head by `score`, an untied `Linear(hidden, 1)` in float32.

    `model(input_ids, position_ids, rows)` then returns the values [N, 1] float32 at the flattened positions `rows` [N]
    of `input_ids` [b, S], right-padded or packed sequences. The backbone receives other keywords. Operations on logits
    (soft-capping, scaling) do not affect the values. The model is saved as a token classification model with one
    label, if transformers has one for this architecture.

    A new head starts at zero. With V = 0 the first advantages are plain returns, whereas a random head would add noise
    in the order of the model's hidden states. The hidden states differ from position to position, so a zero head has a
    gradient and changes in the first step; the backbone changes from the second step.

    Args:
        head: `weight` [1, hidden] and, optionally, `bias` [1] of a trained head.

    Raises:
        NotImplementedError: the model has no separate backbone.
    """
    if model.base_model is model:
        raise NotImplementedError(
            f"{type(model).__name__} has no backbone apart from its output head, so it is not supported as a critic; "
            "use another architecture for critic.model.path"
        )
    old, name = model.get_output_embeddings(), _output_head_name(model)
    new = torch.nn.Linear(old.weight.shape[-1], 1, dtype=torch.float32, device=old.weight.device)
    if new.weight.device.type != "meta":
        with torch.no_grad():
            for key, parameter in new.named_parameters():
                parameter.copy_((head or {}).get(key, torch.zeros(())))
    owner, _, attribute = name.rpartition(".")
    delattr(model.get_submodule(owner), attribute)
    model.add_module(HEAD, new)
    model.all_tied_weights_keys = {
        alias: kept for alias, kept in model.all_tied_weights_keys.items() if not alias.startswith(f"{name}.")
    }
    model.config.tie_word_embeddings = False
    model.config.num_labels = 1
    saved_as = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.get(model.config.model_type)
    if saved_as is not None:
        model.config.architectures = [saved_as]
    # Set on the instance, because the `forward` of each architecture's class computes logits.
    model.forward = functools.partial(_values, model)


def has_value_head(model: PreTrainedModel) -> bool:
    """Return True if `to_value_model` was called on the model."""
    return isinstance(model.forward, functools.partial) and model.forward.func is _values


def _values(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, rows: torch.Tensor, **options: Any
) -> torch.Tensor:
    states = model.base_model(
        input_ids=input_ids, attention_mask=None, position_ids=position_ids, use_cache=False, **options
    )
    hidden = states.last_hidden_state
    return model.get_submodule(HEAD)(hidden.reshape(-1, hidden.shape[-1])[rows].float())


def read_head(path: str, unexpected: Iterable[str]) -> dict[str, torch.Tensor] | None:
    """Return the scalar head of a checkpoint, None if it has none.

    Args:
        path: Hugging Face directory.
        unexpected: names of the checkpoint's weights that a causal language model does not use.

    Raises:
        ValueError: the head has more than one output, or is not stored as safetensors.
    """
    found = {
        key.removeprefix(prefix): _read_tensor(Path(path), key)
        for prefix in _CHECKPOINT_PREFIXES
        for key in unexpected
        if key in (f"{prefix}weight", f"{prefix}bias")
    }
    if "weight" not in found:
        return None
    if found["weight"].shape[0] != 1:
        raise ValueError(
            f"critic.model.path={path!r}: its head has {found['weight'].shape[0]} outputs, expected 1; use a "
            "checkpoint with num_labels=1, or a causal language model"
        )
    return found


def _read_tensor(folder: Path, key: str) -> torch.Tensor:
    file = folder / _SINGLE_FILE
    if (folder / SAFETENSORS_INDEX).is_file():
        file = folder / json.loads((folder / SAFETENSORS_INDEX).read_text(encoding="utf-8"))["weight_map"][key]
    if not file.is_file():
        raise ValueError(
            f"critic.model.path={str(folder)!r}: its head {key} is not stored as safetensors; convert the checkpoint "
            "with save_pretrained"
        )
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(key)


def _output_head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)
