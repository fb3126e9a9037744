"""Choose a model's attention by comparison: a small copy of the model must compute the same as eager attention.

transformers' faster implementations ignore the parts of a model's attention that they do not know: sdpa drops
soft-capped scores, and a packed row drops any mask that is not causal or a sliding window. No error tells so. Therefore
every model is tried before it is loaded: a copy with its config but few layers and a small vocabulary, with random
weights, in float32 on the CPU. The reference is transformers' eager attention on one sequence at a time.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from verl.protocol import DataProto
from verl.utils.hf_config import COMPARED_BACKENDS
from verl.workers.engine.micro_batch import AlignedBatch, Layout, MicroBatching, call_model
from verl.workers.engine.packed_attention import pack_attention
from verl.workers.engine.rope import fix_rope_length

logger = logging.getLogger(__name__)

EAGER = "eager"
# Tokens of the sequences: neighbors of equal length form one run of a packed row, and one is shorter than the window.
_LENGTHS = (13, 9, 9, 3)
_WINDOW = 4
_ORIGINAL_LENGTH = 8
# Lengths up to which a model was trained, as its code names them; beyond them, rotary embeddings may be scaled.
_TRAINED_LENGTHS = ("original_max_position_embeddings", "seq_length")
_VOCABULARY = 64
_FEED_FORWARD = 16
_NOISE = 100_003  # random numbers, repeated to fill the weights; a prime, so that rows differ
_TOLERANCE = 1e-3  # relative; float32 rounding gives about 1e-6, a feature that is ignored 1e-2 and more


class AttentionChoice(NamedTuple):
    """An attention implementation of transformers, and True if sequences may be packed into a row."""

    implementation: str | None
    packs: bool


def choose_attention(
    config: PreTrainedConfig, requested: str | None, *, packs: bool, section: str, trust_remote_code: bool
) -> AttentionChoice:
    """Return the fastest attention that computes the same as eager attention.

    Args:
        config: the model's config; not changed.
        requested: `attn_implementation` of the config section; None: transformers' choice.
        packs: pack sequences if the model can.
        section: config section of the model, for error messages.

    Raises:
        ValueError: the requested implementation computes something else, or the model is not causal.
    """
    if requested not in (None, *COMPARED_BACKENDS):
        logger.warning("%s: attention %s cannot be compared with eager attention on a CPU", section, requested)
        return AttentionChoice(requested, packs=False)
    try:
        eager = small_model(config, EAGER, trust_remote_code)
        causal, expected = _is_causal(eager), _alone(eager)
        model = eager if requested == EAGER else small_model(config, requested, trust_remote_code)
    except Exception as error:  # noqa: BLE001  (code of any model, with sizes for which it was not written)
        logger.warning(
            "%s: a small %s does not run (%s: %s), so its attention is not compared with eager attention, and its "
            "sequences are not packed",
            *(section, type(config).__name__, type(error).__name__, error),
        )
        return AttentionChoice(requested, packs=False)
    first = model.config._attn_implementation
    if causal:
        if _equal(_together(model, Layout.ROWS), expected):
            packed = packs and pack_attention(model) and _equal(_together(model, Layout.PACKED), expected)
            return AttentionChoice(first, packs=packed)
        if requested not in (None, EAGER):
            raise ValueError(
                f"{section}.override_config.attn_implementation={requested}: it ignores a part of the attention of "
                f"{type(model).__name__}; leave it out, or use eager"
            )
        if first != EAGER and _equal(_together(eager, Layout.ROWS), expected):
            logger.warning(
                "%s: %s attention ignores a part of the attention of %s; eager attention is used, which takes more "
                "memory",
                *(section, first, type(model).__name__),
            )
            return AttentionChoice(EAGER, packs=False)
    raise ValueError(
        f"{section}.path: {type(model).__name__} computes a token from tokens after it or from other sequences, so its "
        "log-probabilities cannot be trained; use a causal language model. If its own code scales rotary embeddings "
        "by the longest sequence, use a model that transformers implements"
    )


def small_model(config: PreTrainedConfig, attention: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """Return a model with random weights, the same for any attention, of a size that a test needs."""
    config = copy.deepcopy(config)
    for part in _parts(config):
        _shrink(part)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation=attention
        )
    model.tie_weights()  # the parameters without storage are new, hence not tied
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))
    filled: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in filled:
                # Large enough for attention scores at which soft caps and sinks count.
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
                shifted = noise.roll(len(filled)) * (2.0 / fan_in**0.5)
                values = shifted.repeat(-(-parameter.numel() // _NOISE))[: parameter.numel()].view(parameter.shape)
                filled[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
            setattr(module, name, filled[id(parameter)])
    fix_rope_length(model, max(_LENGTHS))
    return model.eval()


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Iterate over a config and the configs in it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _shrink(config: PreTrainedConfig) -> None:
    """Keep one layer of each kind, at least two, and reduce vocabulary, feed-forward layers and windows in place."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int):
        lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == layers}
        kinds = [tuple(map(str, values)) for values in zip(*lists.values(), strict=True)] or [()] * layers
        kept = sorted({kinds.index(kind) for kind in kinds})
        kept += [i for i in range(layers) if i not in kept][: max(0, 2 - len(kept))]
        for name, value in lists.items():
            setattr(config, name, [value[i] for i in kept])
        config.num_hidden_layers = len(kept)
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if name in fields or hasattr(config, name):
            setattr(config, name, _VOCABULARY)
    for name, value in fields.items():
        if name.endswith("intermediate_size") or name in ("ffn_dim", "n_inner", "ffn_hidden_size"):
            new = [_FEED_FORWARD] * len(getattr(config, name)) if isinstance(value, list) else _FEED_FORWARD
            setattr(config, name, value if value is None else new)
        elif name in ("sliding_window", "attention_chunk_size") and isinstance(value, int):
            setattr(config, name, _WINDOW)
        elif name.endswith("_token_id"):
            setattr(config, name, 0)  # the sequences have larger ones
    if "quantization_config" in fields:
        del config.quantization_config
    _shorten_rope(config)


def _shorten_rope(config: PreTrainedConfig) -> None:
    """Let rotary embeddings whose frequencies depend on the length change them within the test's lengths.

    `fix_rope_length` makes those of transformers independent of it again. Those in the model's own code, which it does
    not know, then fail the comparison.
    """
    for name in _TRAINED_LENGTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, _ORIGINAL_LENGTH)
    for parameters in (getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")):
        given = parameters if isinstance(parameters, dict) else {}
        for rope in (given, *given.values()):
            if not isinstance(rope, dict):
                continue
            kind = rope.get("rope_type", rope.get("type"))
            if kind in ("longrope", "su"):
                rope["original_max_position_embeddings"] = _ORIGINAL_LENGTH
            elif kind == "dynamic":
                config.max_position_embeddings = _ORIGINAL_LENGTH


def _sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, _VOCABULARY, (length,), generator=generator) for length in _LENGTHS]


@torch.no_grad()
def _logits(model: PreTrainedModel, sequence: torch.Tensor) -> torch.Tensor:
    return model(input_ids=sequence.unsqueeze(0), use_cache=False).logits[0]


def _is_causal(model: PreTrainedModel) -> bool:
    sequence = _sequences()[0]
    half = len(sequence) // 2
    return _equal(_logits(model, sequence[:half]), _logits(model, sequence)[:half])


def _alone(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits [N, V] of each sequence by itself, without its last token."""
    return torch.cat([_logits(model, sequence)[:-1] for sequence in _sequences()])


@torch.no_grad()
def _together(model: PreTrainedModel, layout: Layout) -> torch.Tensor | None:
    """Return the logits as `_alone`, of all sequences together in the trainer's layout; None if the call fails."""
    width = max(_LENGTHS)
    ids, mask = torch.zeros(len(_LENGTHS), width, dtype=torch.int64), torch.zeros(len(_LENGTHS), width)
    for row, sequence in enumerate(_sequences()):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    columns = {"input_ids": ids, "attention_mask": mask, "responses": ids[:, 1:], "response_mask": mask[:, 1:]}
    aligned = AlignedBatch(DataProto.from_dict(tensors=columns), torch.device("cpu"), layout)
    [micro_batch] = aligned.micro_batches(MicroBatching(size=len(ids)), None)
    try:
        logits = call_model(model, micro_batch, attention_mask=None, use_cache=False).logits
    except NotImplementedError:
        return None
    return logits.flatten(0, 1)[micro_batch.predictor_indices]


def _equal(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return found is not None and bool((found - expected).abs().max() <= _TOLERANCE * expected.std())
