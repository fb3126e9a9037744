"""An exported Hugging Face directory has everything in common with its source, except trained weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from fixtures.critic_cases import critic_config, make_value_engine
from fixtures.engine_cases import directory_program, export_program, make_engine
from fixtures.ranks import run_ranks
from fixtures.tiny import write_char_tokenizer, write_tiny_model
from verl.utils.safetensors_file import save_safetensors
from verl.workers.engine import hf_directory

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [2, 3], "pad_token_id": 0}
CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""
CONFIG_CODE = """
from transformers import Qwen3Config

class OwnConfig(Qwen3Config):
    model_type = "own_qwen3"
"""


def edit_json(file, **fields):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields, indent=3))


def edit_weights(source, change):
    """Replace the tensors of a source with one file by `change(tensors)`."""
    save_safetensors(change(tensors(source)[0]), source / "model.safetensors")


def tied_bf16(path):
    """Qwen3 in bfloat16 with several EOS ids and sampling defaults, as Qwen publishes it."""
    write_tiny_model(path, dtype="bfloat16")
    edit_json(path / "generation_config.json", **SAMPLING)
    (path / "LICENSE").write_text("license\n")
    return {}


def invalid_generation_config(path):
    """Llama in float32 with a generation config that transformers refuses to save, and an older config.json."""
    write_tiny_model(path, kind="llama", tied=False)
    (path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7, "top_p": 0.9, "new": 1}')
    config = json.loads((path / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"], config["a_field_of_another_version"] = "4.40.0", {"a": [1]}
    (path / "config.json").write_text(json.dumps(config))
    return {}


def several_files(path):
    """Untied Qwen3 in several files with an index, named templates, and a preprocessor, without a generation config."""
    write_tiny_model(path, tied=False, dtype="bfloat16")
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path, max_shard_size="100KB")
    (path / "model.safetensors").unlink()
    (path / "generation_config.json").unlink()
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    edit_json(path / "preprocessor_config.json", image_size=3)
    return {}


def mixed_dtypes(path):
    """A mixture of experts in bfloat16 with a router in float32."""
    write_tiny_model(path, kind="qwen3_moe", dtype="bfloat16", tied=False)
    edit_weights(path, lambda all: {n: t.float() if n.endswith("mlp.gate.weight") else t for n, t in all.items()})
    return {}


def float16(path):
    """A model in float16 that stores its tied output head too."""
    write_tiny_model(path, dtype="float16")
    edit_weights(path, lambda all: all | {"lm_head.weight": all["model.embed_tokens.weight"].clone()})
    return {}


def remote_code(path):
    """A model with its own Python code."""
    write_tiny_model(path, dtype="bfloat16")
    (path / "modeling_own.py").write_text(CODE)
    (path / "configuration_own.py").write_text(CONFIG_CODE)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_json(path / "config.json", auto_map=classes, architectures=["OwnForCausalLM"], model_type="own_qwen3")
    return {"trust_remote_code": True}


def published_model(path):
    """Shards with an index, own code, added tokens, and the tokenizer files of several tokenizers, as models have them.

    The files only have to be copied, so that their content does not have to fit together.
    """
    model = remote_code(path)
    weights, weight_map = tensors(path)[0], {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_safetensors({name: weights[name] for name in names}, path / file)
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors").unlink()
    edit_json(path / "model.safetensors.index.json", metadata={"total_size": 1}, weight_map=weight_map)
    edit_json(path / "added_tokens.json", **{"<|tool|>": 80, "<|think|>": 81})
    edit_json(path / "special_tokens_map.json", eos_token="<|tool|>", additional_special_tokens=["<|think|>"])
    edit_json(path / "preprocessor_config.json", image_size=3)
    edit_json(path / "chat_template.json", chat_template="{{ messages }}")
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\r\n{% endfor %}\n\n", newline="")
    (path / "tokenization_own.py").write_text("from .helper_own import *\n")
    (path / "helper_own.py").write_text("x = 'é'\n", encoding="utf-8")
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "qwen.tiktoken"):
        (path / name).write_bytes(name.encode() + b"\x00\xff")
    (path / "NOTICE.txt").write_text("notice")
    return model


CASES = [tied_bf16, invalid_generation_config, several_files, mixed_dtypes, float16, remote_code, published_model]


def tensors(directory):
    """Return all tensors by name, and the metadata of each file."""
    found, metadata = {}, []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata.append(opened.metadata())
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found, metadata


def common_files(directory):
    """Return every file that holds no weights, by relative path: its bytes, or the fields of config.json."""
    files = [path for path in directory.rglob("*") if path.is_file() and ".safetensors" not in path.name]
    found = {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
    return found | {"config.json": json.loads(found["config.json"])}


def assert_same_weights(exported, source):
    (found, metadata), (expected, _) = tensors(exported), tensors(source)
    if json.loads((source / "config.json").read_text())["tie_word_embeddings"]:
        expected.pop("lm_head.weight", None)
    assert set(found) == set(expected) and all(entry == {"format": "pt"} for entry in metadata)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def assert_modes_follow_the_umask(directory):
    probe = Path(directory, "probe")
    probe.touch()
    expected = probe.stat().st_mode
    probe.unlink()
    modes = {path.name: path.stat().st_mode for path in directory.rglob("*") if path.is_file()}
    assert modes and set(modes.values()) == {expected}, modes


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_file_of_an_untrained_export_equals_its_source(tmp_path, case, ranks):
    source, exported = tmp_path / "source", tmp_path / "hf"
    model = case(source)
    run_ranks(ranks, directory_program, str(source), str(exported), model, "auto")
    assert common_files(exported) == common_files(source)
    assert_same_weights(exported, source)
    assert_modes_follow_the_umask(exported)


def test_a_large_model_is_written_as_several_files_with_an_index(tmp_path, monkeypatch):
    source = write_tiny_model(tmp_path / "source", tied=False)
    monkeypatch.setattr(hf_directory, "_MAX_FILE_BYTES", 100_000)
    run_ranks(1, export_program, str(source), str(tmp_path / "hf"))
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_weights(tmp_path / "hf", source)
    assert_modes_follow_the_umask(tmp_path / "hf")
    # transformers writes the same metadata.
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    ours, theirs = (json.loads((tmp_path / d / "model.safetensors.index.json").read_text()) for d in ("hf", "saved"))
    assert ours["metadata"] == theirs["metadata"] and set(ours["weight_map"]) == set(theirs["weight_map"])


@pytest.mark.parametrize(("dtype", "stored"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_one_dtype_replaces_that_of_the_source(tmp_path, dtype, stored, key):
    source = write_tiny_model(tmp_path / "source", dtype="float16")
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config | ({key: "float16"} if key else {})))
    run_ranks(1, directory_program, str(source), str(tmp_path / "hf"), {}, dtype)
    assert {t.dtype for t in tensors(tmp_path / "hf")[0].values()} == {stored}
    name = str(stored).removeprefix("torch.")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == config | {key or "dtype": name}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == stored


def test_the_fields_of_override_config_are_saved(tmp_path):
    source = write_tiny_model(tmp_path / "source")
    override = {"attn_implementation": "sdpa", "attention_dropout": 0.25, "max_position_embeddings": 1024}
    run_ranks(2, directory_program, str(source), str(tmp_path / "hf"), {"override_config": override}, "auto")
    expected = json.loads((source / "config.json").read_text())
    expected |= {"attention_dropout": 0.25, "max_position_embeddings": 1024}
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == expected


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


def test_a_tokenizer_of_another_directory_is_saved_with_the_code_of_the_model(tmp_path):
    source, tokenizer, exported = tmp_path / "source", tmp_path / "tokenizer", tmp_path / "hf"
    model = remote_code(source)
    edit_json(source / "generation_config.json", **SAMPLING)
    (source / "tokenization_own.py").write_text("# of the model\n")
    write_char_tokenizer(tokenizer)
    (tokenizer / "modeling_own.py").write_text("raise AssertionError('of another model')\n")
    (tokenizer / "tokenization_own.py").write_text("# of the tokenizer\n")
    (tokenizer / "generation_config.json").write_text("{}")
    (tokenizer / "config.json").write_text("{}")
    edit_json(tokenizer / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.Own"]})
    model["tokenizer_path"] = str(tokenizer)
    run_ranks(2, directory_program, str(source), str(exported), model, "auto")
    of_tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenization_own.py"}
    expected = common_files(source) | {n: b for n, b in common_files(tokenizer).items() if n in of_tokenizer}
    assert common_files(exported) == expected


def test_a_critic_is_saved_as_a_classifier_without_a_generation_config(tmp_path):
    source, exported = tmp_path / "source", tmp_path / "hf"
    tied_bf16(source)

    def program(rank):
        make_value_engine(critic_config(source)).export_hf(exported)

    run_ranks(1, program)
    expected = common_files(source)
    expected.pop("generation_config.json")
    config = expected.pop("config.json")
    found = common_files(exported)
    changed = {
        "architectures": ["Qwen3ForTokenClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "tie_word_embeddings": False,
    }
    assert found.pop("config.json") == config | changed
    assert found == expected
    weights = tensors(exported)[0]
    assert {t.dtype for name, t in weights.items() if not name.startswith("score.")} == {torch.bfloat16}
    assert weights["score.weight"].dtype == torch.float32


def test_a_restrictive_umask_is_kept(tmp_path):
    source = write_tiny_model(tmp_path / "source")
    before = os.umask(0o027)
    try:
        run_ranks(1, directory_program, str(source), str(tmp_path / "hf"), {"lora_rank": 2}, "auto")
        assert_modes_follow_the_umask(tmp_path / "hf")
        assert (tmp_path / "hf" / "model.safetensors").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
