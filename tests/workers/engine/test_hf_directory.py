"""The Hugging Face directory of a model that needs several files."""

import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fixtures.engine_cases import export_program, make_engine
from fixtures.ranks import run_ranks
from fixtures.tiny import write_char_tokenizer, write_tiny_model
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


def test_an_overridden_config_is_exported(tmp_path):
    """The engine reads the same fields, so the exported model computes what both computed."""
    source = write_tiny_model(tmp_path / "source")
    override = {"rms_norm_eps": 0.3, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}

    def program(rank):
        make_engine(source, override_config=override | {"attn_implementation": "eager"}).export_hf(tmp_path / "hf")

    run_ranks(1, program)
    ids = torch.arange(4, 30).unsqueeze(0)
    expected = AutoModelForCausalLM.from_pretrained(source, **override)(input_ids=ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(input_ids=ids).logits, expected)
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(source)(input_ids=ids).logits, expected)


CODE = """
from transformers import Qwen3Config
class MyConfig(Qwen3Config):
    model_type = "mine"
"""
MODEL_CODE = """
from transformers import Qwen3ForCausalLM
from .configuration_mine import MyConfig
class MyModel(Qwen3ForCausalLM):
    config_class = MyConfig
"""


def test_code_of_a_model_is_exported_if_its_tokenizer_is_elsewhere(tmp_path):
    source, tokenizer = write_tiny_model(tmp_path / "source"), tmp_path / "tokenizer"
    write_char_tokenizer(tokenizer)
    (tokenizer / "tokenization_mine.py").write_text("")
    (source / "configuration_mine.py").write_text(CODE)
    (source / "modeling_mine.py").write_text(MODEL_CODE)
    config = json.loads((source / "config.json").read_text())
    classes = {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": classes}))

    def program(rank):
        options = {"tokenizer_path": str(tokenizer), "trust_remote_code": True}
        make_engine(source, **options).export_hf(tmp_path / "hf")

    run_ranks(1, program)
    assert (tmp_path / "hf" / "tokenization_mine.py").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert type(model).__name__ == "MyModel"
    assert AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True).model_type == "mine"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)("hello")["input_ids"]
