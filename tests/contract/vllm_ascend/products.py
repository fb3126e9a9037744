"""Outputs of updated layers compared with products of matrices that the reference rounded.

Import it only in an environment of `build_env.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from contract.vllm_ascend.forward import complete_experts, in_float32, log_probs
from contract.vllm_ascend.harness import build_model, engine
from contract.vllm_ascend.reference import canonical, packed, rounded
from contract.vllm_ascend.updates import Updates, config_of, scheme_of, weights_of
from torch import nn
from transformers import AutoModelForCausalLM

from verl.workers.rollout.quantization.npu_experts import experts_output

Rounding = Callable[[torch.Tensor], np.ndarray]


def assert_linear_products(
    sources: Sequence[Path],
    layers_of: Callable[[nn.Module], Mapping[str, nn.Module]],
    rounded_weight: Rounding,
    **rollout,
) -> None:
    """Check the product of every quantized linear layer after an update to each of `sources` but the first.

    Args:
        layers_of: returns the quantized layers of a model by name.
        rounded_weight: a weight [N, K] in the engine's format, float64.
        rollout: keys of the rollout's section.
    """
    first, *others = sources
    config = config_of(first, **rollout)
    generator = torch.Generator().manual_seed(0)
    with engine(config):
        model = build_model(config)
        updates = Updates(model, config, scheme_of(first, **rollout))
        for source in others:
            updates.send(weights_of(source))
            weights = packed(weights_of(source))
            layers = layers_of(model)
            assert len(layers) == 8
            for name, layer in layers.items():
                weight = weights[f"{canonical(name)}.weight"]
                x = torch.randn(5, weight.shape[1], generator=generator, dtype=torch.bfloat16)
                output, _ = layer(x.clone())
                assert output.dtype == torch.bfloat16
                _assert_rounded(output, rounded(x) @ rounded_weight(weight).T)


def _assert_rounded(output: torch.Tensor, expected: np.ndarray) -> None:
    """Check equality with float64 `expected` up to rounding to bfloat16 and float32 sums."""
    error = np.abs(output.double().numpy() - expected)
    assert (error <= 2.0**-8 * np.abs(expected) + 1e-6 * np.abs(expected).max()).all(), error.max()


def assert_dense_outputs(sources: Sequence[Path], fake_quantized: Callable[[Path], nn.Module], **rollout) -> None:
    """Check the log-probabilities of a dense model after an update to each of `sources`, the first one last.

    Args:
        fake_quantized: loads a transformers model that rounds as the engine does.
        rollout: keys of the rollout's section.
    """
    first, *others = sources
    config = config_of(first, **rollout)
    ids = torch.randint(4, 100, (60,), generator=torch.Generator().manual_seed(0))
    with engine(config):
        model = in_float32(build_model(config))
        updates = Updates(model, config, scheme_of(first, **rollout))
        for source in [*others, first]:
            updates.send(weights_of(source))
            actual = log_probs(model, ids)
            reference = fake_quantized(source)
            with torch.no_grad():
                expected = torch.log_softmax(reference(ids[None]).logits[0].double(), -1)
                plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids[None]).logits[0]
            difference = (actual - expected).abs()
            assert difference.mean() <= 5e-5
            assert difference.median() <= 1e-6
            assert (actual - torch.log_softmax(plain.double(), -1)).abs().mean() > 1e-3, "nothing was quantized"


def assert_expert_products(
    sources: Sequence[Path],
    rounded_weight: Rounding,
    rounded_product: Callable[[np.ndarray], np.ndarray] = lambda product: product,
    **rollout,
) -> None:
    """Check the output of experts after an update to each of `sources` but the first.

    Args:
        rounded_weight: weights [E, N, K] in the engine's format, float64.
        rounded_product: the first product as the operators keep it.
        rollout: keys of the rollout's section.
    """
    first, *others = sources
    config = config_of(first, **rollout)
    generator = torch.Generator().manual_seed(0)
    with engine(config):
        model = build_model(config)
        updates = Updates(model, config, scheme_of(first, **rollout))
        for source in others:
            updates.send(weights_of(source))
            weights = packed(weights_of(source))
            layers = complete_experts(model)
            assert len(layers) == 2
            for name, layer in layers.items():
                x = torch.randn(9, 64, generator=generator, dtype=torch.bfloat16)
                logits = torch.randn(9, 4, generator=generator, dtype=torch.bfloat16)
                output = experts_output(layer, config, x, logits)
                w13, w2 = (rounded_weight(weights[f"{name}.{key}_weight"]) for key in ("w13", "w2"))
                expected, largest = _experts_by_hand(x, logits, w13, w2, 2, rounded_product)
                assert output.dtype == torch.bfloat16
                # An expert's output, its weight and their sum are rounded to bfloat16, each by 2**-8 at most.
                assert np.abs(output.double().numpy() - expected).max() <= 3 * 2.0**-8 * largest


def _experts_by_hand(
    x: torch.Tensor,
    logits: torch.Tensor,
    w13: np.ndarray,
    w2: np.ndarray,
    top_k: int,
    rounded_product: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, float]:
    """Compute every token with each of its experts, in float64 except for the operators' roundings."""
    scores = np.exp(logits.double().numpy())
    scores /= scores.sum(-1, keepdims=True)
    x = rounded(x)
    total, largest = np.zeros((len(x), w2.shape[1])), 0.0
    for token in range(len(x)):
        chosen = np.argsort(-scores[token])[:top_k]
        weights = scores[token][chosen] / scores[token][chosen].sum()
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up = np.split(rounded_product(w13[expert] @ x[token]), 2)
            inner = rounded(torch.from_numpy(gate / (1 + np.exp(-gate)) * up)[None])[0]
            product = w2[expert] @ inner
            total[token] += weight * product
            largest = max(largest, np.abs(product).max())
    return total, largest
