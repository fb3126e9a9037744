"""Fixtures that other tests rely on.

- The comparison with a fake-quantized model accepts noise and finds a wrong block.
- A process group that starts too slowly is not taken for one that hangs.
"""

import pytest
import torch

from fixtures import ranks
from fixtures.engine import PROMPTS, log_probs_of
from fixtures.fake_quant import check_equal_up_to_rounding, fake_quantized
from fixtures.tiny import write_tiny_model


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fake_quant") / "model"
    return fake_quantized(write_tiny_model(directory, kind=request.param, tied=True, std=0.02, seed=1))


@pytest.fixture(scope="module")
def responses():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, 90, (len(PROMPTS), 40), generator=generator).tolist()


@pytest.mark.slow
def test_check_accepts_the_noise_of_another_order_of_summation(model, responses):
    expected = log_probs_of(model, responses)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    before = [norm.data.clone() for norm in norms]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for norm, plain in zip(norms, before, strict=True):
            norm.data = plain * (1 + 1e-7 * torch.randn(plain.shape, generator=generator))
        check_equal_up_to_rounding(log_probs_of(model, responses), expected)
    for norm, plain in zip(norms, before, strict=True):
        norm.data = plain


@pytest.mark.slow
def test_check_finds_one_block_with_a_wrong_scale_in_any_weight(model, responses):
    expected = log_probs_of(model, responses)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            block = parameter.data.view(-1)[parameter.numel() // 64 * 32 :][:32]
            block.mul_(2)
            with pytest.raises(AssertionError, match="the largest difference"):
                check_equal_up_to_rounding(log_probs_of(model, responses), expected)
            block.div_(2)
    check_equal_up_to_rounding(log_probs_of(model, responses), expected)


def test_a_slow_start_is_not_called_a_hang(monkeypatch):
    monkeypatch.setattr(ranks, "START_TIMEOUT_S", 0)
    with pytest.raises(TimeoutError, match=r"ranks \[\] of 2 started within 0 s"):
        ranks._Pool(2)


@pytest.mark.slow
def test_a_rank_that_does_not_return_is_called_a_hang(monkeypatch):
    pool = ranks._Pool(2)
    monkeypatch.setattr(ranks, "RUN_TIMEOUT_S", 0)
    with pytest.raises(TimeoutError, match="returned within 0 s, the others hang in a collective"):
        pool.run(ranks.wait_forever, ())
