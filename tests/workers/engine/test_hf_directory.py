"""The Hugging Face directory of a model that needs several files."""

import torch
from transformers import AutoModelForCausalLM

from fixtures.engine_cases import export_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.workers.engine import hf_directory


def test_a_large_model_is_written_as_several_files_with_an_index(tmp_path, monkeypatch):
    source = write_tiny_model(tmp_path / "source", tied=False)
    monkeypatch.setattr(hf_directory, "_MAX_FILE_BYTES", 100_000)
    run_ranks(1, export_program, str(source), str(tmp_path / "hf"))
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
