"""RLHFDataset: items of valid files, and errors of invalid rows and settings."""

import json
import pickle
import textwrap

import pytest
import torch

from fixtures.data_files import WRITERS, data_config, ids_of, jsonl, parquet, row, user
from verl.config import CustomClassConfig
from verl.utils.dataset import prompts
from verl.utils.dataset.prompts import prompt_token_ids
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn, create_rl_dataset, load_dataset_class

# ---- valid data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_item_has_the_documented_keys(tmp_path, tokenizer, name):
    path = WRITERS[name](tmp_path / name, [row("abc", 7), row("de", 8, agent_name="tool_agent")])
    data = RLHFDataset(str(path), tokenizer, data_config())
    assert len(data) == 2
    assert data[0] == {
        "prompt_token_ids": ids_of("abc"),
        "raw_prompt": user("abc"),
        "data_source": "words",
        "ability": "spelling",
        "reward_model": {"style": "rule", "ground_truth": "cba"},
        "extra_info": {"index": 7, "split": "train"},
        "index": 7,
        "agent_name": None,
    }
    assert data[-1]["agent_name"] == "tool_agent" and data[-1]["index"] == 8
    assert all(type(token) is int for token in data[0]["prompt_token_ids"])
    with pytest.raises(IndexError):
        data[2]


def test_json_arrays_and_json_lines_work_under_either_suffix(tmp_path, tokenizer):
    rows = [row("ab\u2028c"), row("d")]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(one, ensure_ascii=False) for one in rows))
    for name in ("a.json", "b.jsonl"):
        data = RLHFDataset(tmp_path / name, tokenizer, data_config())
        assert [item["raw_prompt"][0]["content"] for item in data] == ["ab\u2028c", "d"]


def test_files_may_have_different_columns_and_only_a_prompt(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parquet(tmp_path / "one.parquet", [row("a", 5), row("b", 6)])
    jsonl(tmp_path / "two.jsonl", [{"prompt": user("c")}])
    data = RLHFDataset(["~/one.parquet", "~/two.jsonl"], tokenizer, data_config())
    last = data[2]
    assert last.pop("prompt_token_ids") == ids_of("c") and last.pop("raw_prompt") == user("c")
    assert last == {"data_source": "unknown", "reward_model": {}, "extra_info": {}, "index": 2, "ability": None}
    assert [item["index"] for item in data] == [5, 6, 2]
    assert data[0].keys() == data[2].keys()


def test_column_keys_and_return_raw_chat_are_applied(tmp_path, tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [{"chat": user("ab"), "source": "s", "prompt": "free text", "n": 3}])
    config = data_config(prompt_key="chat", reward_fn_key="source", return_raw_chat=False)
    item = RLHFDataset(path, tokenizer, config)[0]
    assert item["prompt_token_ids"] == ids_of("ab") and item["data_source"] == "s" and item["n"] == 3
    assert "raw_prompt" not in item and "chat" not in item and item["prompt"] == "free text"


def test_null_fields_that_parquet_adds_to_messages_are_dropped(tmp_path, tokenizer):
    second = [{"role": "user", "content": "b", "name": "bob"}]
    path = parquet(tmp_path / "x.parquet", [row("a"), row("b", prompt=second)])
    data = RLHFDataset(path, tokenizer, data_config())
    assert data[0]["raw_prompt"] == user("a") and data[1]["raw_prompt"] == second


def test_template_kwargs_reach_the_template(tmp_path, tokenizer):
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if enable_thinking %}!{% endif %}{% if add_generation_prompt %}={% endif %}"
    )
    path = jsonl(tmp_path / "x.jsonl", [row("ab")])

    def tokens(**kwargs):
        return RLHFDataset(path, tokenizer, data_config(apply_chat_template_kwargs=kwargs))[0]["prompt_token_ids"][:]

    assert tokenizer.decode(tokens()) == "ab="
    assert tokenizer.decode(tokens(enable_thinking=True)) == "ab!="
    assert tokenizer.decode(tokens(add_generation_prompt=False)) == "ab"
    with pytest.raises(ValueError, match=r"apply_chat_template_kwargs=.*\['max_length'\] cannot be set"):
        tokens(max_length=3)
    for name in ("messages", "tools", "conversation"):
        with pytest.raises(ValueError, match=rf"\['{name}'\] cannot be set"):
            tokens(**{name: []})


def test_collate_keeps_one_cell_per_item(tmp_path, tokenizer):
    path = parquet(tmp_path / "x.parquet", [row("ab"), row("cd")])
    data = RLHFDataset(path, tokenizer, data_config())
    batch = collate_fn([data[0], data[1]])
    assert all(column.dtype == object and column.shape == (2,) for column in batch.values())
    assert batch["prompt_token_ids"][1] == ids_of("cd") and batch["raw_prompt"][0] == user("ab")
    with pytest.raises(ValueError, match=r"differ in their keys \['extra'\]"):
        collate_fn([data[0], data[1] | {"extra": 1}])


def test_collate_stacks_tensors():
    items = [{"a": torch.tensor([1, 2]), "b": torch.tensor(0.5), "c": [1], "d": torch.zeros(2)} for _ in range(3)]
    items[1] |= {"d": None}
    batch = collate_fn(items)
    assert torch.equal(batch["a"], torch.tensor([[1, 2]] * 3)) and batch["b"].tolist() == [0.5] * 3
    assert batch["c"].dtype == object and batch["c"].shape == (3,) and batch["d"].dtype == object
    with pytest.raises(ValueError, match=r"tensors 'a' of different \(shape, dtype\)"):
        collate_fn([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}])


def test_dataset_can_be_pickled(tmp_path, tokenizer):
    data = RLHFDataset(parquet(tmp_path / "x.parquet", [row("ab")]), tokenizer, data_config())
    assert pickle.loads(pickle.dumps(data))[0] == data[0]


# ---- lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truncation", "limit", "expected"),
    [
        ("left", 4, "<s>abcdef="[-4:]),
        ("right", 4, "<s>abc"),
        ("middle", 4, "<s>af="),
        ("middle", 5, "<s>aef="),
        ("middle", 1, "="),
        ("error", 8, "<s>abcdef="),
    ],
)
def test_overlong_prompt_is_truncated(tmp_path, tokenizer, truncation, limit, expected):
    path = jsonl(tmp_path / "x.jsonl", [row("abcdef")])
    data = RLHFDataset(path, tokenizer, data_config(truncation=truncation, max_prompt_length=limit))
    token_ids = data[0]["prompt_token_ids"]
    assert tokenizer.decode(token_ids) == expected and len(token_ids) <= limit


def test_overlong_prompt_is_an_error_with_row_length_and_fix(tmp_path, tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [row("a"), row("abcdef")])
    data = RLHFDataset(path, tokenizer, data_config(max_prompt_length=7))
    with pytest.raises(ValueError) as error:
        data[1]
    for words in (
        "x.jsonl, row 1",
        "has 8 tokens",
        "data.max_prompt_length=7",
        "to 8 or more",
        "data.filter_overlong_prompts=True",
    ):
        assert words in str(error.value)


def test_filter_drops_only_overlong_prompts(tmp_path, tokenizer):
    rows = [row("x" * n, n) for n in range(1, 9)]
    path = parquet(tmp_path / "x.parquet", rows)
    data = RLHFDataset(path, tokenizer, data_config(filter_overlong_prompts=True, max_prompt_length=6))
    assert [item["index"] for item in data] == [1, 2, 3, 4]
    assert [len(item["prompt_token_ids"]) for item in data] == [3, 4, 5, 6]


@pytest.mark.slow
def test_filter_with_processes_gives_the_same_rows(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "_ROWS_PER_JOB", 10)  # 21 jobs: three batches for two workers, the last job is short
    path = parquet(tmp_path / "x.parquet", [row("x" * (i % 17), i) for i in range(207)])
    kept = [i for i in range(207) if i % 17 + 2 <= 9]
    config = data_config(filter_overlong_prompts=True, max_prompt_length=9, filter_overlong_prompts_workers=2)
    data = RLHFDataset(path, tokenizer, config)
    assert [data[i]["index"] for i in range(len(data))] == kept


def test_filter_that_drops_every_prompt_is_an_error(tmp_path, tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [row("x" * n) for n in (10, 20, 30)])
    with pytest.raises(ValueError) as error:
        RLHFDataset(path, tokenizer, data_config(filter_overlong_prompts=True, max_prompt_length=9))
    for words in ("all 3 of", "x.jsonl", "data.max_prompt_length=9", "shortest 12, longest 32", "to 32 to keep all"):
        assert words in str(error.value)


def test_max_samples_keeps_the_first_or_a_random_subset(tmp_path, tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [row("a", i) for i in range(50)])

    def indices(n, **over):
        return [item["index"] for item in RLHFDataset(path, tokenizer, data_config(**over), max_samples=n)]

    assert indices(3) == [0, 1, 2] and indices(-1) == indices(50) == indices(99) == list(range(50))
    drawn = indices(10, shuffle=True, seed=1)
    assert len(set(drawn)) == 10 and drawn == indices(10, shuffle=True, seed=1) != indices(10, shuffle=True, seed=2)
    assert drawn != list(range(10))
    with pytest.raises(ValueError, match="max_samples=0"):
        indices(0)


# ---- invalid rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("bad", [None, []])
def test_error_names_a_row_without_a_prompt_at_the_start(tmp_path, tokenizer, name, bad):
    path = WRITERS[name](tmp_path / name, [row("a"), row("b"), row("c", prompt=bad), row("d")])
    with pytest.raises(ValueError, match=rf"{name}, row 2 \(counted from 0\): 'prompt' is (missing|an empty list)"):
        RLHFDataset(path, tokenizer, data_config())


def test_error_names_a_file_without_the_prompt_column(tmp_path, tokenizer):
    path = parquet(tmp_path / "x.parquet", [{"question": "a", "answer": "b"}])
    with pytest.raises(
        ValueError, match=r"x\.parquet has no column 'prompt', so row 0.*'question', 'answer'.*data\.prompt_key"
    ):
        RLHFDataset(path, tokenizer, data_config())


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("spell abc", r"'prompt' is a plain string; write it as a list of messages: \[\{"),
        (["spell", "abc"], r"prompt\[0\] is a str"),
        ({"role": "user", "content": "a"}, "'prompt' is a dict"),
        ([{"content": "a"}], r"prompt\[0\] has no role"),
        ([{"role": "user", "content": 3}], r"prompt\[0\]\.content is a int"),
        ([{"role": "user", "text": "a"}], r"prompt\[0\]\.content is missing"),
    ],
)
def test_error_names_a_prompt_that_is_not_a_list_of_messages(tmp_path, tokenizer, name, prompt, words):
    path = WRITERS[name](tmp_path / name, [row("a", prompt=prompt)])
    with pytest.raises(ValueError, match=rf"{name}, row 0 .*{words}"):
        RLHFDataset(path, tokenizer, data_config())


@pytest.mark.parametrize("filtered", [False, True])
def test_error_names_an_invalid_message_in_a_later_row(tmp_path, tokenizer, filtered):
    path = parquet(tmp_path / "x.parquet", [row("a"), row("b", prompt=[{"role": "user", "content": None}])])
    with pytest.raises(ValueError, match=r"x\.parquet, row 1 .*prompt\[0\]\.content is missing"):
        list(RLHFDataset(path, tokenizer, data_config(filter_overlong_prompts=filtered)))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("column", ["images", "videos", "audios"])
def test_media_columns_are_not_supported(tmp_path, tokenizer, name, column):
    path = WRITERS[name](tmp_path / name, [row("a", **{column: None}), row("b", **{column: ["x.png"]})])
    with pytest.raises(NotImplementedError, match=rf"{name}, row 1 .*{column}, which are not supported yet"):
        RLHFDataset(path, tokenizer, data_config())
    without_media = WRITERS[name](tmp_path / name, [row("a", **{column: []}), row("b", **{column: None})])
    assert column not in RLHFDataset(without_media, tokenizer, data_config())[0]
    parts = [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]
    path = WRITERS[name](tmp_path / name, [row("a", prompt=parts)])
    with pytest.raises(NotImplementedError, match=rf"{name}, row 0 .*content is a list of parts"):
        RLHFDataset(path, tokenizer, data_config())
    with pytest.raises(NotImplementedError, match="processor"):
        RLHFDataset(path, tokenizer, data_config(), processor=object())


def test_reward_model_must_be_a_dict(tmp_path, tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [row("a", reward_model="cba")])
    with pytest.raises(ValueError, match=r"x\.jsonl, row 0 .*'reward_model' is a str; it must be a dict"):
        RLHFDataset(path, tokenizer, data_config())[0]


def test_missing_and_rejecting_chat_templates_are_errors(tmp_path, tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [row("a")])
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"row 0 .*rejects messages with the roles \['user'\]: roles must alternate"):
        RLHFDataset(path, tokenizer, data_config())[0]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; use an instruction-tuned model"):
        RLHFDataset(path, tokenizer, data_config(filter_overlong_prompts=True))


@pytest.mark.parametrize(
    ("over", "words"),
    [({"truncation": "both"}, "data.truncation='both'"), ({"max_prompt_length": 0}, "max_prompt_length=0")],
)
def test_invalid_settings_are_errors(tmp_path, tokenizer, over, words):
    with pytest.raises(ValueError, match=words):
        RLHFDataset(jsonl(tmp_path / "x.jsonl", [row("a")]), tokenizer, data_config(**over))


# ---- custom classes -------------------------------------------------------------------------------------------------

CUSTOM = """
from verl.utils.dataset.prompts import prompt_token_ids
from verl.utils.dataset.rl_dataset import RLHFDataset

class FromQuestion(RLHFDataset):
    def _build_messages(self, row):
        if not row["question"]:
            raise ValueError("question is empty")
        return [{"role": "user", "content": row["question"]}]

NotAClass = 3
"""


def test_custom_class_builds_its_own_messages(tmp_path, tokenizer):
    (tmp_path / "mine.py").write_text(CUSTOM)
    path = parquet(tmp_path / "x.parquet", [{"question": "ab"}, {"question": ""}])
    config = data_config(custom_cls=CustomClassConfig(path=str(tmp_path / "mine.py"), name="FromQuestion"))
    data = create_rl_dataset(path, tokenizer, config, max_samples=-1)
    assert data[0]["prompt_token_ids"] == ids_of("ab") and data[0]["question"] == "ab"
    with pytest.raises(ValueError, match=r"x\.parquet, row 1 .*question is empty"):
        data[1]
    assert len(pickle.loads(pickle.dumps(data))) == 2
    assert type(create_rl_dataset(jsonl(tmp_path / "x.jsonl", [row("a")]), tokenizer, data_config())) is RLHFDataset


def test_custom_classes_that_do_not_load_are_errors(tmp_path):
    (tmp_path / "mine.py").write_text(CUSTOM)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "text.txt").write_text("")
    for file, name, kind, words in (
        ("absent.py", "A", FileNotFoundError, "absent.py does not exist"),
        ("broken.py", "A", ValueError, "does not import: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("mine.py", "Absent", ValueError, r"data\.custom_cls\.name=Absent is not defined in the file"),
        ("mine.py", "NotAClass", ValueError, "not a subclass of torch.utils.data.Dataset"),
        ("mine.py", None, ValueError, r"data\.custom_cls\.name is not set"),
        ("text.txt", "A", ValueError, "not a Python file"),
    ):
        with pytest.raises(kind, match=words):
            load_dataset_class(str(tmp_path / file), name)


def custom(tmp_path, tokenizer, body, rows=("ab", "cd"), **over):
    """The dataset of a user's class `Mine` with this body."""
    lines = "\n".join(f"    {line}" for line in textwrap.dedent(body).strip().splitlines())
    (tmp_path / "mine.py").write_text(
        f"from verl.utils.dataset.rl_dataset import RLHFDataset\nclass Mine(RLHFDataset):\n{lines}\n"
    )
    config = data_config(custom_cls=CustomClassConfig(path=str(tmp_path / "mine.py"), name="Mine"), **over)
    return create_rl_dataset(parquet(tmp_path / "x.parquet", [row(text) for text in rows]), tokenizer, config)


def test_a_raw_prompt_that_a_subclass_changes_is_tokenized_again(tmp_path, tokenizer):
    data = custom(
        tmp_path,
        tokenizer,
        """
        def __getitem__(self, item):
            row = super().__getitem__(item)
            row["raw_prompt"] = [{"role": "user", "content": row["raw_prompt"][0]["content"] + "ef"}]
            return row
        """,
    )
    assert data[0]["raw_prompt"] == user("abef") and data[0]["prompt_token_ids"] == ids_of("abef")
    assert data[1]["prompt_token_ids"] == ids_of("cdef") and type(data[1]["prompt_token_ids"]) is list


def test_messages_that_a_subclass_changes_in_place_are_tokenized_again(tmp_path, tokenizer):
    data = custom(
        tmp_path,
        tokenizer,
        """
        def __getitem__(self, item):
            row = super().__getitem__(item)
            row["raw_prompt"][0]["content"] = "ef"
            return row
        """,
        max_prompt_length=len(ids_of("ef")) - 1,
        truncation="right",
    )
    assert data[0]["prompt_token_ids"] == ids_of("ef")[:-1]


def test_tokens_that_a_subclass_sets_are_kept(tmp_path, tokenizer):
    data = custom(
        tmp_path,
        tokenizer,
        """
        def __getitem__(self, item):
            return super().__getitem__(item) | {"raw_prompt": [], "prompt_token_ids": [5, 6]}
        """,
    )
    assert data[0]["prompt_token_ids"] == [5, 6]


def test_items_of_any_dataset_are_completed(tmp_path, tokenizer):
    (tmp_path / "any.py").write_text(
        "from torch.utils.data import Dataset\n"
        "class Any(Dataset):\n"
        "    def __init__(self, data_files, tokenizer, config, processor=None, max_samples=-1): pass\n"
        "    def __len__(self): return 3\n"
        "    def __getitem__(self, item):\n"
        "        return {'raw_prompt': [{'role': 'user', 'content': 'ab'}]} if item else ['ab']\n"
    )
    config = data_config(custom_cls=CustomClassConfig(path=str(tmp_path / "any.py"), name="Any"))
    data = create_rl_dataset("absent.parquet", tokenizer, config)
    assert data[2] == {
        "raw_prompt": user("ab"),
        "prompt_token_ids": ids_of("ab"),
        "data_source": "unknown",
        "reward_model": {},
        "extra_info": {},
        "index": 2,
    }
    with pytest.raises(ValueError, match=r"item 0 of Any is a list; return a dict"):
        data[0]


@pytest.mark.parametrize("parameters", ["self, example", "self, example, key"])
def test_build_messages_has_the_parameters_of_either_version_of_upstream(tmp_path, tokenizer, parameters):
    key = "key" if "key" in parameters else "'prompt'"
    body = f"def _build_messages({parameters}):\n    return example[{key}][:1]"
    assert custom(tmp_path, tokenizer, body)[1]["prompt_token_ids"] == ids_of("cd")


# The methods of upstream verl's RLHFDataset (August 2026) that are called here too, or that Python calls.
CALLED = {"__init__", "__len__", "__getitem__", "__getstate__", "_build_messages"}
UPSTREAM_METHODS = {
    *CALLED,
    *("_download", "_read_files_and_tokenize", "maybe_filter_out_long_prompts", "resume_dataset_state", "split"),
    *("process_vision_info", "process_multi_modal_info", "_process_multi_modal_info", "_extract_audio_info"),
}


@pytest.mark.parametrize("method", sorted(UPSTREAM_METHODS - CALLED))
def test_an_override_that_is_never_called_is_refused_by_name(tmp_path, tokenizer, method):
    with pytest.raises(
        ValueError, match=rf"data\.custom_cls\.name=Mine: Mine overrides .* never called here: {method}: "
    ):
        custom(tmp_path, tokenizer, f"def {method}(self, *args):\n    return None")


def test_an_override_in_a_mixin_is_refused_too(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from verl.utils.dataset.rl_dataset import RLHFDataset\n"
        "class Mixin:\n    def _download(self): pass\n"
        "class Mine(Mixin, RLHFDataset): pass\n"
    )
    with pytest.raises(ValueError, match="_download: give local files"):
        load_dataset_class(str(tmp_path / "mine.py"), "Mine")


def test_a_constructor_without_the_keywords_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"cannot be constructed as Mine\(data_files=.*'processor'"):
        custom(tmp_path, tokenizer, "def __init__(self, data_files, tokenizer, config, max_samples): pass")


def test_a_dataset_with_its_own_state_is_refused(tmp_path, tokenizer):
    with pytest.raises(NotImplementedError, match="Mine has a state_dict"):
        custom(tmp_path, tokenizer, "def state_dict(self):\n    return {}")


def test_half_a_character_in_the_messages_of_a_custom_class_is_replaced(tmp_path, tokenizer):
    class Custom(RLHFDataset):
        def _build_messages(self, row):
            return user("a\ud83d")

    data = Custom(jsonl(tmp_path / "x.jsonl", [row("a")]), tokenizer, data_config())
    assert data[0]["prompt_token_ids"] == prompt_token_ids(tokenizer, user("a\ufffd"), {})
