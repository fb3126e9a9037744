"""Tokens of the tokenizer without a row in the model's embedding, which has 32 rows here."""

import json

import pytest


@pytest.fixture
def write(run_files):
    def write(name, content, folder=None):
        ((folder or run_files.model) / name).write_text(json.dumps(content))

    return write


def added(**ids):
    return {
        "model": {"vocab": {"a": 0}},
        "added_tokens": [{"content": f"<{name}>", "id": i} for name, i in ids.items()],
    }


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("key", "value"), [("eos_token_id", [2, 32]), ("pad_token_id", 32), ("bos_token_id", 40)])
def test_a_special_id_without_a_row_is_an_error(problem_of, run_files, write, file, key, value):
    given = json.loads((run_files.model / file).read_text()) if file == "config.json" else {}
    write(file, given | {key: value})
    text = problem_of()
    assert f"{key}={max(value) if isinstance(value, list) else value} in {file}" in text
    assert "32 rows (vocab_size), for the ids 0 to 31" in text and "resize_token_embeddings" in text


@pytest.mark.parametrize(
    "settings", [{"eos_token": "<end>"}, {"pad_token": {"content": "<end>"}}, {"chat_template": "<end>"}]
)
def test_a_token_in_use_without_a_row_is_an_error(problem_of, write, settings):
    write("tokenizer.json", added(end=32, other=31))
    write("tokenizer_config.json", settings)
    text = problem_of()
    assert "'<end>' (32)" in text and "<other>" not in text and "resize_token_embeddings" in text


@pytest.mark.parametrize("where", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_a_token_that_is_not_in_use_is_a_warning(plan_of, write, where):
    """Public models have such tokens, e.g. the image token of text-only Gemma 3."""
    contents = {
        "tokenizer.json": added(image=32),
        "added_tokens.json": {"<image>": 32},
        "tokenizer_config.json": {"added_tokens_decoder": {"32": {"content": "<image>"}}},
    }
    write(where, contents[where])
    [warning] = [text for text in plan_of().warnings if "<image>" in text]
    assert "has '<image>' (32), but the embedding of" in warning


@pytest.mark.parametrize("vocabulary", [{"a": 0, "b": 31}, [["a", -1.0], ["b", -2.0]]])
def test_a_model_with_more_rows_than_tokens_is_fine(plan_of, run_files, write, vocabulary):
    write("tokenizer.json", {"model": {"vocab": vocabulary}, "added_tokens": []})
    write("generation_config.json", {"eos_token_id": [1, 31], "pad_token_id": -1})
    assert not [text for text in plan_of().warnings if "tokenizer" in text]


def test_another_tokenizer_is_checked(problem_of, run_files, write):
    other = run_files.root / "tokenizer"
    other.mkdir()
    write("tokenizer.json", added(end=50), other)
    write("tokenizer_config.json", {"eos_token": "<end>"}, other)
    assert f"the tokenizer in {other} has '<end>' (50)" in problem_of(actor_rollout_ref__model__tokenizer_path=other)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"model": 7}),
        ("tokenizer.json", {"model": {"vocab": 7}}),
        ("tokenizer.json", {"model": {"vocab": [[]]}}),
        ("tokenizer.json", {"added_tokens": [7]}),
        ("tokenizer.json", {"added_tokens": [{"content": "<a>", "id": None}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": [7]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<a>"}}}),
        ("generation_config.json", []),
        ("added_tokens.json", 7),
    ],
)
def test_a_file_of_another_form_is_named(problem_of, run_files, write, file, content):
    write(file, content)
    assert str(run_files.model / file) in problem_of()


def test_a_number_with_thousands_of_digits_is_an_error_that_names_the_file(problem_of, run_files):
    (run_files.model / "generation_config.json").write_text('{"eos_token_id": ' + "9" * 5000 + "}")
    assert f"{run_files.model / 'generation_config.json'}: Exceeds the limit" in problem_of()
