"""Tokenizer and processor: loading, padding token, and errors of invalid model directories."""

import json
import pickle

import numpy as np
import pytest
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from fixtures.tiny import write_char_tokenizer, write_tiny_model
from verl.utils.tokenizer import hf_processor, hf_tokenizer


def edit_config(directory, **changes):
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_directory_loads_with_and_without_tilde(tmp_path, monkeypatch):
    write_char_tokenizer(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path / "model", str(tmp_path / "model"), "~/model"):
        tokenizer = hf_tokenizer(path)
        assert tokenizer.pad_token_id == 0 and tokenizer.encode("ab") == [4, 5]


def test_missing_pad_token_becomes_the_eos_token(tmp_path):
    write_char_tokenizer(tmp_path)
    edit_config(tmp_path, pad_token=None)
    tokenizer = hf_tokenizer(tmp_path)
    assert tokenizer.pad_token == "</s>" and tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    edit_config(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match=r"neither a pad_token nor an eos_token; set one.*tokenizer_config\.json"):
        hf_tokenizer(tmp_path)


def test_paths_that_are_not_a_model_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: set it to a model directory"):
        hf_tokenizer(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file"):
        hf_tokenizer(tmp_path / "file")


def test_directory_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"does not load .*check that tokenizer\.json"):
        hf_tokenizer(tmp_path)


def test_missing_tokenizer_files_are_an_error_and_not_an_empty_tokenizer(tmp_path):
    write_tiny_model(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="vocabulary is empty"):
        hf_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{trunc", '{"version": "1.0", "model": {"type": "WordLevel"}}'])
def test_error_names_a_damaged_tokenizer_file(tmp_path, content):
    write_char_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="does not load") as error:
        hf_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_remote_code_is_an_error_without_a_prompt(tmp_path, monkeypatch):
    write_char_tokenizer(tmp_path)
    edit_config(tmp_path, auto_map={"AutoTokenizer": ["tok.Tok", None]}, tokenizer_class="Tok")
    (tmp_path / "tok.py").write_text("raise SystemExit('the code was run')\n")

    prompts = []
    monkeypatch.setattr("builtins.input", lambda *words: prompts.append(words) or "n")
    with pytest.raises(ValueError, match=r"data\.trust_remote_code=True"):
        hf_tokenizer(tmp_path)
    assert prompts == []


def test_model_id_that_cannot_be_downloaded_is_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="is not a directory on this machine, and its tokenizer cannot be downloaded"):
        hf_tokenizer("nobody/no-such-model")


@pytest.fixture
def multi_modal(tmp_path):
    """The directory of a model that takes sound at 8 kHz, with a processor."""
    write_char_tokenizer(tmp_path)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=False)
    Wav2Vec2Processor(extractor, hf_tokenizer(tmp_path)).save_pretrained(tmp_path)
    return tmp_path


def test_the_processor_of_a_multi_modal_model_loads(multi_modal, monkeypatch):
    monkeypatch.setenv("HOME", str(multi_modal.parent))
    for path in (multi_modal, str(multi_modal), f"~/{multi_modal.name}"):
        processor = hf_processor(path)
        assert type(processor) is Wav2Vec2Processor
        assert processor.tokenizer.encode("ab") == hf_tokenizer(multi_modal).encode("ab") == [4, 5]
        sound = np.array([0.5, -0.25], np.float32)
        assert processor(sound, sampling_rate=8000)["input_values"][0].tolist() == sound.tolist()


def test_a_model_of_text_only_has_no_processor(tmp_path):
    write_tiny_model(tmp_path)
    assert hf_processor(tmp_path) is None


@pytest.mark.parametrize("harm", ["truncated", "absent"])
def test_a_processor_that_does_not_load_is_none_and_the_reason_is_logged(multi_modal, caplog, harm):
    path = multi_modal / "processor_config.json"
    if harm == "truncated":
        path.write_text(path.read_text()[:40])
    else:
        multi_modal = multi_modal / "absent"
    with caplog.at_level("INFO", logger="verl.utils.tokenizer"):
        assert hf_processor(multi_modal) is None
    assert [record.getMessage().startswith(f"{multi_modal} has no processor (") for record in caplog.records] == [True]
