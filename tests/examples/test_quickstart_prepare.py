"""Preparation of the quickstart: the same rows for the same seed, no test row in training, no use of partial files."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest

SMALL = dict(train_rows=40, test_rows=12, warm_steps=2, warm_batch=4)


@pytest.fixture(scope="module")
def script(load_example):
    return load_example("quickstart/prepare.py")


@pytest.fixture(scope="module")
def prepared(script, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared")
    assert script.prepare(directory, script.Settings(**SMALL)) is True
    return directory


@pytest.fixture
def copy(prepared, tmp_path):
    for path in prepared.rglob("*"):
        target = tmp_path / path.relative_to(prepared)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


def rows(directory: Path, split: str) -> list[dict]:
    return pyarrow.parquet.read_table(directory / f"{split}.parquet").to_pylist()


def words(directory: Path, split: str) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows(directory, split)]


def test_rows_have_the_required_columns_and_the_answer_is_the_reversed_word(prepared):
    for split, count in (("train", 40), ("test", 12)):
        table = rows(prepared, split)
        assert len(table) == count
        for index, row in enumerate(table):
            assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
            assert row["data_source"] == "reasoning_gym/spell_backward"
            word = row["prompt"][0]["content"]
            assert row["prompt"] == [{"role": "user", "content": word}]
            assert len(word) == 5
            assert word.islower()
            assert row["reward_model"]["ground_truth"] == "".join(reversed(word))
            assert (row["extra_info"]["index"], row["extra_info"]["split"]) == (index, split)
            assert json.loads(row["extra_info"]["entry"])["metadata"]["word"] == word


def test_no_word_occurs_twice(script, tmp_path):
    # There are about a thousand words of three letters: of 400 independent draws some would be equal.
    script.write_data(tmp_path, script.Settings(min_word_len=3, max_word_len=3, train_rows=300, test_rows=100))
    both = Counter(words(tmp_path, "train") + words(tmp_path, "test"))
    assert both.total() == 400
    assert max(both.values()) == 1


@pytest.mark.slow
def test_test_words_are_never_demonstrated(script, tmp_path, monkeypatch):
    demonstrated = set()

    original = script.demonstration

    def record(word, words, noise, rng):
        answer = original(word, words, noise, rng)
        demonstrated.update([word, answer[::-1]])
        return answer

    monkeypatch.setattr(script, "demonstration", record)
    settings = script.Settings(**{**SMALL, "warm_batch": 64, "warm_steps": 4})
    script.prepare(tmp_path, settings)
    assert len(demonstrated) > 30
    assert demonstrated <= set(words(tmp_path, "train"))
    assert not demonstrated & set(words(tmp_path, "test"))


def test_rows_and_weights_depend_on_the_seed_only(script, prepared, tmp_path):
    script.prepare(tmp_path / "same", script.Settings(**SMALL))
    for split in ("train", "test"):
        assert rows(tmp_path / "same", split) == rows(prepared, split)
    weights = "model/model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (prepared / weights).read_bytes()
    script.prepare(tmp_path / "other", script.Settings(**SMALL, seed=7))
    assert words(tmp_path / "other", "train") != words(prepared, "train")


def test_more_training_rows_do_not_change_the_test_rows(script, tmp_path):
    for count in (20, 60):
        (tmp_path / str(count)).mkdir()
        script.write_data(tmp_path / str(count), script.Settings(**{**SMALL, "train_rows": count}))
    assert rows(tmp_path / "20", "test") == rows(tmp_path / "60", "test")


def test_the_noise_is_the_share_of_wrong_demonstrations(script):
    rng = random.Random(3)
    words = ["abcde", "fghij", "klmno", "pqrst"]
    made = Counter(script.demonstration("abcde", words, 0.6, rng) for _ in range(4000))
    assert set(made) == {"edcba", "jihgf", "onmlk", "tsrqp"}
    # One of four wrong answers is by chance the correct one.
    assert made["edcba"] / 4000 == pytest.approx(0.4 + 0.6 / 4, abs=0.03)
    assert {script.demonstration("abcde", words, 0.0, rng) for _ in range(50)} == {"edcba"}


def test_batch_labels_cover_the_answers_only(script):
    settings = script.Settings(min_word_len=3, max_word_len=5, warm_batch=8, noise=0.0)
    tokens, labels = script.demonstration_batch(["tab", "stone"], settings, random.Random(0))
    tokenizer = script.make_tokenizer()
    seen = set()
    for ids, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        text = tokenizer.decode([i for i in ids if i != script.PAD])
        answer = tokenizer.decode([i for i in wanted if i != -100])
        seen.add((text, answer))
    assert seen == {("<s>tab=bat</s>", "bat</s>"), ("<s>stone=enots</s>", "enots</s>")}


def test_model_and_tokenizer_load_and_the_chat_template_ends_before_the_answer(prepared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared / "model")
    question = [{"role": "user", "content": "tab"}]
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == "<s>tab="
    answered = [*question, {"role": "assistant", "content": "bat"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == "<s>tab=bat</s>"
    ids = tokenizer("<s>tab=bat</s>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 9
    assert tokenizer.decode(ids[5:], skip_special_tokens=True) == "bat"
    model = AutoModelForCausalLM.from_pretrained(prepared / "model")
    assert model.config.vocab_size >= len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == ids[-1]


@pytest.mark.slow
def test_complete_files_are_reused_unless_force_is_given(script, copy, capsys):
    settings = script.Settings(**SMALL)
    weights = copy / "model/model.safetensors"
    before = weights.stat().st_mtime_ns
    assert script.prepare(copy, settings) is False
    assert weights.stat().st_mtime_ns == before
    assert "prepared earlier" in capsys.readouterr().out
    assert script.prepare(copy, settings, force=True) is True
    assert weights.stat().st_mtime_ns != before


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/tokenizer.json", "train.parquet", "test.parquet"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_file_is_detected(script, copy, name, damage):
    path = copy / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    assert name in script.why_not_reusable(copy, script.Settings(**SMALL))


@pytest.mark.slow
def test_a_damaged_file_is_written_again(script, prepared, copy):
    (copy / "train.parquet").write_bytes(b"PAR1")
    assert script.prepare(copy, script.Settings(**SMALL)) is True
    assert rows(copy, "train") == rows(prepared, "train")
    assert script.why_not_reusable(copy, script.Settings(**SMALL)) is None


def test_files_of_other_settings_or_with_a_damaged_manifest_are_not_used(script, copy):
    assert "other settings" in script.why_not_reusable(copy, script.Settings(**{**SMALL, "noise": 0.1}))
    (copy / "manifest.json").write_text('{"files": ')
    assert "damaged" in script.why_not_reusable(copy, script.Settings(**SMALL))


def test_files_of_an_interrupted_preparation_are_not_used(script, copy, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "write_model", stop)
    with pytest.raises(KeyboardInterrupt):
        script.prepare(copy, script.Settings(**SMALL), force=True)
    assert script.why_not_reusable(copy, script.Settings(**SMALL)) == "nothing is prepared yet"


def test_too_few_words_is_an_error(script, tmp_path):
    command = [sys.executable, script.__file__, "--output", str(tmp_path), "--min-word-len", "3", "--max-word-len", "3"]
    done = subprocess.run([*command, "--train-rows", "5000"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "prepare.py: --train-rows" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "manifest.json").exists()


def test_the_reward_is_that_of_the_task_and_acc_needs_the_complete_answer(load_example, prepared):
    compute_score = load_example("quickstart/reward.py").compute_score
    row = rows(prepared, "test")[0]
    truth, info = row["reward_model"]["ground_truth"], row["extra_info"]
    wrong_first = ("x" if truth[0] != "x" else "y") + truth[1:]
    for answer, score, acc in [(truth, 1.0, 1.0), (wrong_first, 0.8, 0.0), ("", 0.0, 0.0), (truth[:2], 0.4, 0.0)]:
        result = compute_score(row["data_source"], answer, truth, info)
        assert result["acc"] == acc, answer
        assert result["score"] == pytest.approx(score), answer
