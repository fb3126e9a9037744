"""Data preparation turns published files into rows whose correct answer scores 1, and names the first bad row."""

import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from verl.utils.dataset.prepare import write_splits
from verl.utils.reward_score import default_compute_score

GSM8K = [
    {"question": "Tom has 3 apples and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "A car costs $12,000 and loses a half. What is left?", "answer": "12,000 / 2 = 6,000\n#### 6,000"},
    {"question": "Sue owes 5 dollars. Her balance?", "answer": "It is below zero.\n#### -5"},
]
MATH = [
    {
        "problem": "Find $x$ if $2x = 1$.",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"So $x=\boxed{\frac{1}{2}}$.",
    },
    {"problem": "What is $3!$?", "level": "Level 2", "type": "Algebra", "solution": r"It is $\boxed 6$."},
    {
        "problem": "What is $2^3$?",
        "level": "Level 2",
        "type": "Algebra",
        "solution": r"First \boxed{4}, then \fbox{8}.",
    },
]
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [
            {"role": "user", "content": f"Solve the problem. The last line is Answer: $Answer.\n\nWhat is {i}+1?"}
        ],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(i + 1), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"0b1c-{i}"},
    }
    for i in (1, 2, 1, 1, 2)
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder, split="train"):
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def run(script, raw, out):
    script.main(["--local_dataset_path", str(raw), "--local_save_dir", str(out)])


def failure(script, raw, out):
    with pytest.raises(SystemExit) as caught:
        run(script, raw, out)
    assert isinstance(caught.value.code, str)  # printed, status 1
    assert not list(out.glob("*.parquet"))
    return caught.value.code


def score(row, answer):
    judged = default_compute_score(row["data_source"], answer, row["reward_model"]["ground_truth"], row["extra_info"])
    return judged["acc"] if isinstance(judged, dict) else judged


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_gsm8k_reads_every_file_type(load_example, tmp_path, suffix):
    raw = tmp_path / "raw"
    write(raw / f"train-00000-of-00001{suffix}", GSM8K)
    write(raw / f"test-00000-of-00001{suffix}", GSM8K[:1])
    run(load_example("data_preprocess/gsm8k.py"), raw, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["reward_model"] for row in rows] == [
        {"style": "rule", "ground_truth": truth} for truth in ("7", "6000", "-5")
    ]
    assert all(set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"} for row in rows)
    for i, (row, example) in enumerate(zip(rows, GSM8K, strict=True)):
        assert row["prompt"][0]["content"].startswith(example["question"])
        assert row["extra_info"] == {"split": "train", "index": i, **example}
        assert score(row, example["answer"]) == 1.0
        assert score(row, "Perhaps.\n#### 41") == 0.0
    assert len(rows_of(tmp_path / "out", "test")) == 1


def test_gsm8k_uses_the_main_one_of_two_folders(load_example, tmp_path):
    for folder, count in (("main", 2), ("socratic", 3)):
        for split in ("train", "test"):
            write(tmp_path / "raw" / folder / f"{split}-00000-of-00001.parquet", GSM8K[:count])
    run(load_example("data_preprocess/gsm8k.py"), tmp_path / "raw", tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 2


def test_several_folders_without_a_main_one_are_an_error(load_example, tmp_path):
    for folder in ("algebra", "geometry"):
        write(tmp_path / "raw" / folder / "train.jsonl", MATH)
    text = failure(load_example("data_preprocess/math_dataset.py"), tmp_path / "raw", tmp_path / "out")
    assert "several folders" in text
    assert "algebra" in text
    assert "geometry" in text


def test_math_answers_come_from_the_last_box(load_example, tmp_path):
    write(tmp_path / "train.parquet", MATH)
    run(load_example("data_preprocess/math_dataset.py"), tmp_path / "train.parquet", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["reward_model"]["ground_truth"] for row in rows] == [r"\frac{1}{2}", "6", "8"]
    assert [score(row, rf"So \boxed{{{right}}}") for row, right in zip(rows, ("0.5", "6", "8"), strict=True)] == [
        1.0
    ] * 3
    assert [score(row, r"So \boxed{5}") for row in rows] == [0.0] * 3
    assert not (tmp_path / "out/test.parquet").exists()  # one file is one split


def test_dapo_keeps_each_question_once(load_example, tmp_path):
    write(tmp_path / "raw/dapo-math-17k.parquet", DAPO)
    write(tmp_path / "raw/aime-2024.parquet", DAPO[2:])
    run(load_example("data_preprocess/dapo_17k.py"), tmp_path / "raw", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["2", "3"]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in DAPO[:2]]
    assert {row["extra_info"]["split"] for row in rows_of(tmp_path / "out", "test")} == {"test"}
    for row in rows:
        assert score(row, f"Easy.\nAnswer: {row['reward_model']['ground_truth']}") == 1.0
        assert score(row, "Easy.\nAnswer: 17") == 0.0


def test_reasoning_gym_tasks_keep_test_questions_out_of_training(load_example, tmp_path):
    script = load_example("data_preprocess/reasoning_gym_tasks.py")
    sizes = ["--train_size", "30", "--test_size", "10", "--tasks", "chain_sum,spell_backward"]
    script.main([*sizes, "--local_save_dir", str(tmp_path / "a")])
    script.main([*sizes, "--local_save_dir", str(tmp_path / "b")])
    train, test = rows_of(tmp_path / "a"), rows_of(tmp_path / "a", "test")
    assert train == rows_of(tmp_path / "b")
    assert (len(train), len(test)) == (60, 20)
    questions = [row["prompt"][0]["content"] for row in train + test]
    assert len(set(questions)) == 80
    for row in (train[0], train[-1]):
        assert score(row, f"So <answer>{row['reward_model']['ground_truth']}</answer>") == 1.0
        assert score(row, "<answer>-99999</answer>") < 0.1  # some tasks give a small score for any answer


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tasks", "no_such_task"], "no_such_task"),
        (["--tasks", "chain_sum", "--task_config", '{"digits": 2}'], "--task_config"),
        (["--tasks", "chain_sum", "--task_config", '{"max_terms": 2, "max_digits": 1}'], "different questions"),
    ],
)
def test_tasks_that_cannot_be_created_are_an_error(load_example, tmp_path, options, says):
    with pytest.raises(SystemExit) as caught:
        load_example("data_preprocess/reasoning_gym_tasks.py").main([*options, "--local_save_dir", str(tmp_path)])
    assert says in caught.value.code


BAD = [
    ("gsm8k.py", {**GSM8K[0], "answer": "It is seven."}, "####"),
    ("gsm8k.py", {**GSM8K[0], "question": None}, "'question' is None"),
    ("gsm8k.py", {"problem": "What?", "answer": "#### 1"}, "'question' is missing (the columns are problem, answer)"),
    ("math_dataset.py", {**MATH[0], "solution": "It is a half."}, "\\boxed"),
    ("dapo_17k.py", {**DAPO[0], "prompt": "What is 7+1?"}, "plain string"),
    ("dapo_17k.py", {**DAPO[0], "prompt": [{"content": "What is 7+1?"}]}, "no role"),
    ("dapo_17k.py", {**DAPO[1], "prompt": DAPO[0]["prompt"] * 2, "data_source": None}, "'data_source' is None"),
    (
        "dapo_17k.py",
        {**DAPO[1], "prompt": DAPO[0]["prompt"] * 2, "reward_model": {"ground_truth": " "}},
        "ground_truth",
    ),
]


@pytest.mark.parametrize(("name", "bad", "says"), BAD)
def test_the_first_fault_is_named_by_file_and_row(load_example, tmp_path, name, bad, says):
    good = {"gsm8k.py": GSM8K, "math_dataset.py": MATH, "dapo_17k.py": DAPO}[name]
    write(tmp_path / "raw/test.jsonl", good)
    write(tmp_path / "raw/train.jsonl", [*good[:2], bad, bad])
    text = failure(load_example(f"data_preprocess/{name}"), tmp_path / "raw", tmp_path / "out")
    assert f"{tmp_path / 'raw/train.jsonl'}, row 2 (counted from 0): " in text
    assert says in text


def test_a_missing_path_is_an_error(load_example, tmp_path):
    assert "does not exist" in failure(load_example("data_preprocess/gsm8k.py"), tmp_path / "none", tmp_path / "out")
    (tmp_path / "other.jsonl").write_text("{}\n")
    assert "train*" in failure(load_example("data_preprocess/gsm8k.py"), tmp_path, tmp_path / "out")


def test_without_a_network_the_error_says_what_to_do(load_example, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as caught:
        load_example("data_preprocess/gsm8k.py").main(["--local_save_dir", str(tmp_path / "out")])
    assert "hf download openai/gsm8k --repo-type dataset --local-dir DIR" in caught.value.code
    assert "--local_dataset_path DIR" in caught.value.code


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "the split test has no rows"),
        ([{"a": 1}, {"a": "x"}], "the split test, column 'a': Parquet cannot hold these values"),
        ([{"extra_info": {"a": 1}}, {"extra_info": [1]}], "column 'extra_info': Parquet cannot hold these values"),
        ([{"extra_info": {1: 2}}], "column 'extra_info': Parquet cannot hold these values"),
        ([{"extra_info": {"a": {}}}], "test.parquet: Parquet cannot hold these values"),
        ([{"a": 2**70}], "column 'a': Parquet cannot hold these values"),
        ([{"a": object()}], "column 'a': Parquet cannot hold these values"),
    ],
)
def test_rows_that_cannot_be_written_leave_no_file(tmp_path, rows, words):
    (tmp_path / "train.parquet").write_text("old")
    with pytest.raises(ValueError, match=words):
        write_splits(tmp_path, {"train": [{"a": 1}], "test": rows})
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]
    assert (tmp_path / "train.parquet").read_text() == "old"


def test_odd_rows_are_written_whole(tmp_path):
    write_splits(tmp_path, {"train": [{"a": 1, "extra_info": {}}, {"a": 2, "b": "late", "extra_info": {"x": [1]}}]})
    assert rows_of(tmp_path) == [
        {"a": 1, "b": None, "extra_info": None},
        {"a": 2, "b": "late", "extra_info": {"x": [1]}},
    ]


@pytest.mark.parametrize("info", ["text", [1], 5])
def test_dapo_names_a_row_with_another_extra_info(load_example, tmp_path, info):
    write(tmp_path / "raw/train.jsonl", [DAPO[0], DAPO[1] | {"extra_info": info}])
    with pytest.raises(SystemExit, match=r"train.jsonl, row 1 .*'extra_info' is a .*; it must be a dict"):
        load_example("data_preprocess/dapo_17k.py").main(
            ["--local_dataset_path", str(tmp_path / "raw"), "--local_save_dir", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_a_csv_file_with_a_column_twice_is_refused(load_example, tmp_path):
    (tmp_path / "train.csv").write_text("question,answer,answer\na,#### 1,#### 2\n")
    with pytest.raises(SystemExit, match=r"train.csv: several columns have the name answer; rename them"):
        load_example("data_preprocess/gsm8k.py").main(
            ["--local_dataset_path", str(tmp_path / "train.csv"), "--local_save_dir", str(tmp_path / "out")]
        )


@pytest.mark.parametrize("option", ["--train_size=0", "--train_size=-3", "--test_size=-1", "--test_size=x"])
def test_numbers_of_rows_below_one_are_refused(load_example, tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        load_example("data_preprocess/reasoning_gym_tasks.py").main(["--tasks=chain_sum", option])
    assert f"argument {option.partition('=')[0]}: " in capsys.readouterr().err


def test_a_task_that_is_given_twice_is_refused(load_example):
    with pytest.raises(SystemExit, match="duplicate name chain_sum"):
        load_example("data_preprocess/reasoning_gym_tasks.py").main(["--tasks=chain_sum,chain_sum"])


@pytest.mark.parametrize("script", ["quickstart/prepare.py", "tool_agent/prepare.py"])
@pytest.mark.parametrize("option", ["--train-rows=0", "--test-rows=-1"])
def test_prepared_examples_need_rows(load_example, tmp_path, script, option):
    with pytest.raises(SystemExit, match=f"{option}: must be at least 1"):
        load_example(script).main(["--output", str(tmp_path / "out"), option])
    assert not (tmp_path / "out").exists()
