"""A run with user code, whose probes run in this process."""

import json

import pytest

from fixtures.script import TEMPLATE, Script
from verl.config import load_config
from verl.trainer.probes import agent, algorithms, dataset, reward, reward_manager
from verl.trainer.probes.context import Context, Job
from verl.trainer.probes.rows import read_samples

PROBES = {module.__name__.rpartition(".")[2]: module.probe for module in (agent, algorithms, dataset, reward)}
PROBES["reward_manager"] = reward_manager.probe
SPECIAL = {"pad_token": "[UNK]", "eos_token": "[UNK]", "tokenizer_class": "PreTrainedTokenizerFast"}


class Findings(list):
    """The messages of a probe; stands for the connection to the parent."""

    send = list.append

    def of(self, level):
        return [text for name, text in self if name == level]

    @property
    def problems(self):
        return [(name, text) for name, text in self if name in ("error", "warning", "note")]


class Run:
    """The files and keys of a run; `probe(kind)` returns the findings of one probe."""

    def __init__(self, root):
        self.root, self.script = root, Script(root)
        settings = {"chat_template": TEMPLATE, **SPECIAL}
        (self.script.model / "tokenizer_config.json").write_text(json.dumps(settings))
        self.keys = self.script.keys

    def write(self, name, text):
        path = self.root / name
        path.write_text(text)
        return path

    def reward(self, text, file="my_reward.py", **keys):
        self.keys["reward.custom_reward_function.path"] = self.write(file, text)
        self.keys |= {name.replace("__", "."): value for name, value in keys.items()}

    def config(self):
        return load_config([f"{name}={value}" for name, value in self.keys.items()])

    def context(self, *, device="cpu", elsewhere=False, with_samples=True):
        config = self.config()
        samples = read_samples(config) if with_samples else []
        return Context(Job(config, (), device, elsewhere), Findings(), samples)

    def probe(self, kind, **options):
        context = self.context(**options)
        PROBES[kind](context)
        return context.connection


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)
