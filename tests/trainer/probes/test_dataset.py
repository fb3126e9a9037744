"""The probe of the dataset class."""

import pickle

import pytest

from fixtures.script import row

HEAD = """
import torch
from verl.utils.dataset.rl_dataset import RLHFDataset
MESSAGES = [{'role': 'user', 'content': 'word'}]
"""
OWN = (
    HEAD
    + """
class Mine(torch.utils.data.Dataset):
    def __init__(self, data_files, tokenizer, config, processor, max_samples):
        pass
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return ITEM
"""
)
SUBCLASS = HEAD + "class Mine(RLHFDataset):\n    def "


@pytest.fixture
def probe(run):
    """Return a function that writes the class and returns the context of its probe."""

    def call(source):
        path = run.write("my_data.py", source)
        run.keys |= {"data.custom_cls.path": path, "data.custom_cls.name": "Mine"}
        context = run.context(with_samples=False)
        from verl.trainer.probes.dataset import probe

        probe(context)
        return context

    return call


def test_a_right_subclass_gives_one_sample_of_each_file(probe, run):
    run.script.rows([row(question="word word", extra_info={"index": i}) for i in range(64)])
    run.keys["data.val_files"] = run.script.train
    context = probe(
        SUBCLASS + "_build_messages(self, row):\n        return [{**MESSAGES[0], 'content': row['question']}]"
    )
    assert context.connection.problems == []
    assert [sample.name for sample in context.samples] == [
        "item 0 of Mine, data.train_files",
        "item 0 of Mine, data.val_files",
    ]
    assert context.samples[0].row["raw_prompt"] == [{"role": "user", "content": "word word"}]
    ((_, sent),) = [message for message in context.connection if message[0] == "samples"]
    assert pickle.loads(sent) == context.samples


@pytest.mark.parametrize(
    "item",
    [
        "{'raw_prompt': MESSAGES}",
        "{'prompt_token_ids': [1, 2], 'extra_info': None}",
        "{'raw_prompt': MESSAGES, 'x': torch.zeros(2)}",
    ],
)
def test_a_right_class_of_its_own(probe, item):
    assert probe(OWN.replace("ITEM", item)).connection.problems == []


def test_fewer_rows_are_read_if_the_class_allows_it(probe):
    counted = SUBCLASS + "__init__(self, *, max_samples, **others):\n        CHECK\n        super().__init__(**others)"
    assert probe(counted.replace("CHECK", "assert max_samples == 8")).connection.problems == []


def test_a_class_that_needs_all_rows_gets_them(probe):
    counted = SUBCLASS + "__init__(self, *, max_samples, **others):\n        CHECK\n        super().__init__(**others)"
    assert probe(counted.replace("CHECK", "assert max_samples == -1")).connection.problems == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("class Other: pass", "data.custom_cls.name=Mine is not defined in the file"),
        ("class Mine: pass", "is not a subclass of torch.utils.data.Dataset"),
        ("import nothing_of_this_name", "does not import: ModuleNotFoundError"),
        (OWN.replace("max_samples)", "limit)"), "cannot be constructed as Mine(data_files=..., "),
        (
            SUBCLASS + "_read_files_and_tokenize(self):\n        pass",
            "_read_files_and_tokenize: override _build_messages",
        ),
        (
            SUBCLASS + "maybe_filter_out_long_prompts(self, dataframe):\n        pass",
            "maybe_filter_out_long_prompts: set data.filter_overlong_prompts=True",
        ),
        (SUBCLASS + "_build_messages(self, row):\n        return row['question']", "KeyError: 'question'"),
        (SUBCLASS + "_build_messages(self, row):\n        return 'text'", "raised "),
        (SUBCLASS + "__len__(self):\n        return 0", "has no items"),
        (OWN.replace("ITEM", "MESSAGES"), "is a list; return a dict with raw_prompt"),
        (OWN.replace("ITEM", "{'prompt': MESSAGES}"), "'raw_prompt' is missing"),
        (OWN.replace("ITEM", "{'raw_prompt': MESSAGES, 'reward_model': 'rule'}"), "'reward_model' of an item is a str"),
        (OWN.replace("ITEM", "{'raw_prompt': MESSAGES, 'extra_info': [1]}"), "'extra_info' of an item is a list"),
        (OWN.replace("ITEM", "{'raw_prompt': MESSAGES, str(index): 1}"), "differ in their keys ['0', '1']"),
        (OWN.replace("ITEM", "{'raw_prompt': MESSAGES, 'x': torch.zeros(index)}"), "different (shape, dtype)"),
        (OWN.replace("def __len__", "state_dict = None\n    def __len__"), "has a state_dict, which is not supported"),
    ],
)
def test_a_certain_fault_is_an_error(probe, source, words):
    found = probe(source).connection
    assert found.of("error") and {name for name, _ in found.problems} == {"error"}
    assert words in found.of("error")[0] and "data.custom_cls" in found.of("error")[0]


def test_a_service_that_does_not_run_is_a_warning(probe):
    found = probe(OWN.replace("        pass", "        raise ConnectionError('no service')")).connection
    assert found.of("error") == [] and "ConnectionError: no service" in found.of("warning")[0]
