"""Model FLOPs of the trainer's stages, and `perf/mfu/*`: achieved FLOP/s as a fraction of the devices' peak.

Counted are the products of matrices that the model needs, as in PaLM (arXiv 2204.02311, appendix B): two FLOPs for each
weight of a linear layer and token, and the attention scores. Differences to its formula: causal attention counts the
pairs of tokens that it needs, the embedding is a lookup, and the head is counted for the response tokens, because the
trainer computes no other logits. Work that is done twice (checkpointed activations, tiles of the head) counts once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from verl.config import CriticConfig, PPOConfig
from verl.config.lora import lora_options
from verl.protocol import DataProto
from verl.utils.model_dir.index import read_json_object
from verl.utils.model_dir.shapes_from_config import expert_count, index_of_config

# Forward pass and gradients: of weights and inputs, of inputs alone (frozen weights of LoRA).
_TRAINED, _FROZEN = 3, 2


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a forward pass.

    Attributes:
        per_token: linear layers of the decoder, for a token; of experts those that a token is sent to.
        per_pair: attention, for a token and a token that it attends to.
        head: output head, for a token.
    """

    per_token: int
    per_pair: int
    head: int

    def count(self, lengths: torch.Tensor, heads: int, *, linear: int = 1, attention: int = 1) -> int:
        """Return the FLOPs of sequences.

        Args:
            lengths: [B] int64, tokens of each sequence, which attend to themselves and to all earlier ones.
            heads: tokens for which the head is computed.
            linear, attention: factors for linear layers with the head, and for attention: 1 for a forward pass.
        """
        pairs = int((lengths * (lengths + 1) // 2).sum())
        products = self.per_token * int(lengths.sum()) + self.head * heads
        return linear * products + attention * self.per_pair * pairs


def model_flops(path: str | Path, override: Mapping[str, Any], *, max_length: int, values: bool) -> ModelFlops | None:
    """Return the FLOPs of a model by its config.json; None for an architecture that the formula is not known for.

    Args:
        path: directory of the model.
        override: fields that replace those of config.json.
        max_length: limit of a sequence in tokens; None is returned if an attention window may be shorter.
        values: the head is that of a critic.
    """
    directory = Path(path)
    config = {**read_json_object(directory / "config.json"), **override}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < max_length:
        return None
    try:
        tensors = index_of_config(directory, config).tensors
    except ValueError:
        return None
    sizes = {name: math.prod(info.shape) for name, info in tensors.items() if len(info.shape) == 2}
    embedding = sizes.pop("model.embed_tokens.weight")
    head = sizes.pop("lm_head.weight", embedding)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    linear = sum(sizes.values()) - experts
    if experts:
        linear += experts * config["num_experts_per_tok"] // expert_count(config)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = heads * (config.get("head_dim") or hidden // heads)
    return ModelFlops(2 * linear, 4 * config["num_hidden_layers"] * width, 2 * (hidden if values else head))


class Utilization:
    """Computes `perf/mfu/*` of a step.

    Args:
        config: the whole config.
        critic: the section `critic`, completed by `resolve_critic`; None without a critic.
        peak: peak of one device in FLOP/s; None if it is not known.
        compute_dtype: torch dtype name in which actor and critic compute.
        infers: all samples of a step go through the stage `old_log_prob`.
    """

    def __init__(
        self, config: PPOConfig, critic: CriticConfig | None, peak: int | None, *, compute_dtype: str, infers: bool
    ) -> None:
        trainer, roles = config.trainer, config.actor_rollout_ref
        self._peak = None if peak is None else peak * trainer.nnodes * trainer.n_gpus_per_node
        self._stages: dict[str, tuple[str, ModelFlops, int, int]] = {}
        if self._peak is None or compute_dtype != "bfloat16":
            return
        limit, model = config.max_model_len, roles.model
        assert model.path is not None
        found = model_flops(model.path, model.override_config, max_length=limit, values=False)
        if found is not None:
            linear = _TRAINED if lora_options(model) is None else _FROZEN
            epochs = roles.actor.ppo_epochs
            self._stages["actor"] = ("update_actor", found, epochs * linear, epochs * _TRAINED)
            if infers:
                self._stages["actor_infer"] = ("old_log_prob", found, 1, 1)
        if critic is None:
            return
        assert critic.model.path is not None
        found = model_flops(critic.model.path, critic.model.override_config, max_length=limit, values=True)
        if found is not None:
            epochs = critic.ppo_epochs or 1
            self._stages["critic"] = ("update_critic", found, epochs * _TRAINED, epochs * _TRAINED)

    def metrics(self, batch: DataProto, timing: Mapping[str, float]) -> dict[str, float]:
        """Return `perf/mfu/NAME` of the stages that ran; empty if peak, dtype or architecture is not known.

        Args:
            batch: columns attention_mask [B, P + T], response_mask [B, T].
            timing: seconds by stage.
        """
        if not self._stages:
            return {}
        assert batch.batch is not None and self._peak is not None
        lengths = batch.batch["attention_mask"].sum(-1).long()
        responses = int(batch.batch["response_mask"].sum())
        return {
            f"perf/mfu/{name}": flops.count(lengths, responses, linear=linear, attention=attention)
            / (timing[stage] * self._peak)
            for name, (stage, flops, linear, attention) in self._stages.items()
            if timing.get(stage, 0.0) > 0
        }
