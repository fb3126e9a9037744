"""The reference of the consistency check against transformers on the whole sequence, and what its formats explain."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fixtures.architectures import longrope, write_architecture
from fixtures.tiny import write_tiny_model
from verl.protocol import DataProto
from verl.trainer.ppo.eager_reference import ReferenceUnavailable, reference_log_probs
from verl.utils.quantization.formats import E4M3_ERROR, MXFP4_ERROR

FORMATS = {
    "trainer_dtype": "float32",
    "engine_dtype": "float32",
    "trainer_quantized": False,
    "weight_error": None,
    "max_model_len": 64,
    "trust_remote_code": False,
}


def batch_of(sequences, prompts, temperature):
    """Columns of a forward pass: prompts padded on the left, responses on the right."""
    left, right = max(prompts), max(len(s) - p for s, p in zip(sequences, prompts, strict=True))
    ids, mask = torch.zeros(len(sequences), left + right, dtype=torch.int64), None
    mask = torch.zeros_like(ids)
    for row, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        ids[row, left - prompt : left - prompt + len(sequence)] = torch.tensor(sequence)
        mask[row, left - prompt : left - prompt + len(sequence)] = 1
    columns = {"input_ids": ids, "attention_mask": mask, "response_mask": mask[:, left:]}
    return DataProto.from_dict(tensors=columns, meta_info={"temperature": temperature})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("reference") / "model")


def test_log_probs_are_those_of_the_model_at_the_temperature(model_dir):
    sequences, prompts = [[5, 9, 7, 40, 22], [31, 8, 12, 60, 61, 62, 63]], [3, 1]
    result = reference_log_probs(model_dir, batch_of(sequences, prompts, 0.7), **FORMATS)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    for row, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([sequence])).logits[0] / 0.7
        expected = [logits[i - 1].log_softmax(-1)[sequence[i]].item() for i in range(prompt, len(sequence))]
        torch.testing.assert_close(result.log_probs[row, : len(expected)], torch.tensor(expected))
        assert not result.log_probs[row, len(expected) :].any()
    assert torch.equal(result.as_trainer, result.log_probs) and torch.equal(result.as_engine, result.log_probs)


def test_rope_is_chosen_by_the_limit_of_the_engine(tmp_path):
    """Beyond 16 tokens longrope uses its long factors, for short sequences too: as a model with these alone."""
    batch = batch_of([[5, 9, 7, 40, 22]], [3], 1.0)
    rope = longrope(16)
    always_long = rope | {"short_factor": rope["long_factor"]}
    models = {
        name: write_architecture(
            tmp_path / name,
            "Phi3",
            max_position_embeddings=64,
            original_max_position_embeddings=16,
            rope_parameters=parameters,
        )
        for name, parameters in (("longrope", rope), ("long", always_long))
    }
    long, short = (
        reference_log_probs(models["longrope"], batch, **FORMATS | {"max_model_len": limit}).log_probs
        for limit in (64, 16)
    )
    expected = reference_log_probs(models["long"], batch, **FORMATS | {"max_model_len": 64}).log_probs
    torch.testing.assert_close(long, expected)
    assert (long - short).abs().max() > 0.01


def test_a_coarser_format_explains_a_larger_difference(model_dir):
    batch = batch_of([list(range(4, 60))] * 2, [20, 20], 1.0)
    differences = []
    for error in (E4M3_ERROR, MXFP4_ERROR):
        formats = FORMATS | {"trainer_dtype": "bfloat16", "weight_error": error}
        result = reference_log_probs(model_dir, batch, **formats)
        differences += [(side - result.log_probs).abs().mean() for side in (result.as_trainer, result.as_engine)]
    by_bfloat16, by_mxfp8, again, by_mxfp4 = differences
    assert by_bfloat16 == again and 0 < 3 * by_bfloat16 < by_mxfp8 and 2 * by_mxfp8 < by_mxfp4


def test_a_coarser_format_rounds_the_parameters_that_transformers_rounds(tmp_path):
    """A bias that selects experts stays in float32: here bfloat16 would round the differences of its values away."""
    directory = write_tiny_model(tmp_path / "model", kind="glm4_moe")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = 100.0 + 0.1 * torch.arange(4.0)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    sequence, prompt = list(range(4, 60)), 20
    batch = batch_of([sequence], [prompt], 1.0)
    result = reference_log_probs(directory, batch, **FORMATS | {"engine_dtype": "bfloat16"})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor([sequence])).logits[0, prompt - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence[prompt:])[:, None])[:, 0]
    torch.testing.assert_close(result.as_engine[0], expected)
    assert (result.as_engine - result.log_probs).abs().mean() < 0.05


def test_a_directory_that_cannot_be_loaded_gives_no_reference(tmp_path):
    with pytest.raises(ReferenceUnavailable, match="transformers cannot compute it"):
        reference_log_probs(tmp_path, batch_of([[4, 5]], [1], 1.0), **FORMATS)
