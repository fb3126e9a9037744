"""Samplers of the user: the class that `data.sampler` selects, and errors of classes that cannot work."""

import textwrap

import pytest
from torch.utils.data import Dataset

from verl.config import load_config
from verl.experimental.dataset.sampler import AbstractCurriculumSampler, AbstractSampler
from verl.utils.dataset.sampler import create_rl_sampler

# User code as it is written for upstream verl, with the imports that its documents give.
REVERSED = """
from collections.abc import Sized

from omegaconf import DictConfig

from verl import DataProto
from verl.experimental.dataset.sampler import AbstractCurriculumSampler, AbstractSampler


class Reversed(AbstractSampler):
    def __init__(self, data_source: Sized, data_config: DictConfig):
        super().__init__(data_source=data_source, data_config=data_config)
        self.data_source = data_source
        self.batch_size = int(data_config.get("gen_batch_size", None) or data_config.train_batch_size)
        self.stride = data_config.get("sampler", {}).get("stride", 1)
        self.bucket = data_config.sampler.bucket
        self.absent = getattr(data_config.sampler, "absent", "a default")

    def __iter__(self):
        return iter(range(len(self.data_source) - 1, -1, -self.stride))

    def __len__(self):
        return len(self.data_source) // self.stride


class Hardest(AbstractCurriculumSampler):
    def __init__(self, data_source: Sized, data_config: DictConfig):
        self.scores = [0.0] * len(data_source)

    def __iter__(self):
        yield from sorted(range(len(self.scores)), key=lambda row: self.scores[row])

    def __len__(self):
        return len(self.scores)

    def update(self, batch: DataProto) -> None:
        for row, score in zip(batch.non_tensor_batch["index"], batch.batch["token_level_scores"].sum(-1)):
            self.scores[row] = float(score)


class NotASampler:
    def __init__(self, data_source, data_config):
        pass
"""


class Words(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"index": index}


def config_of(path, name="Reversed", *keys):
    return load_config([f"data.sampler.class_path={path}", f"data.sampler.class_name={name}", *keys]).data


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_sampler.py"
    path.write_text(REVERSED)
    return path


@pytest.mark.parametrize("form", ["{file}", "file://{file}", "pkg://my_sampler", "my_sampler"])
def test_a_class_is_constructed_with_dataset_and_config(file, form, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    keys = ["+data.sampler.stride=2", "data.sampler.bucket=[1,b]", "data.train_batch_size=3"]
    data, words = config_of(form.format(file=file), "Reversed", *keys), Words()
    sampler = create_rl_sampler(data, words)
    assert isinstance(sampler, AbstractSampler) and sampler.data_source is words
    assert list(sampler) == [5, 3, 1] and len(sampler) == 3
    assert (sampler.batch_size, sampler.bucket, sampler.absent) == (3, [1, "b"], "a default")
    assert data.sampler.kwargs == {"stride": 2, "bucket": [1, "b"]}
    with pytest.raises(AttributeError, match=r"data\.sampler has no key 'absent'"):
        _ = data.sampler.absent


def test_a_packaged_class_is_loaded_with_slashes(tmp_path, monkeypatch):
    (tmp_path / "curricula").mkdir()
    (tmp_path / "curricula" / "by_length.py").write_text(REVERSED)
    monkeypatch.syspath_prepend(str(tmp_path))
    sampler = create_rl_sampler(config_of("pkg://curricula/by_length", "Hardest"), Words())
    assert isinstance(sampler, AbstractCurriculumSampler)
    assert type(sampler).__module__ == "curricula.by_length"


def test_without_a_class_there_is_no_sampler():
    assert create_rl_sampler(load_config().data, Words()) is None


SAMPLER = """
def __init__(self, data_source, data_config):
    self.rows = len(data_source)
def __iter__(self):
    return iter(range(self.rows))
def __len__(self):
    return self.rows
def update(self, batch):
    pass
"""


@pytest.mark.parametrize(
    ("base", "without", "extra", "words"),
    [
        ("AbstractSampler", "__iter__", "", "define __iter__, which yields the numbers of the rows"),
        ("AbstractSampler", "__len__", "", "define __len__, the number of rows in a pass"),
        (
            "AbstractCurriculumSampler",
            "update",
            "",
            r"define update\(batch\), or derive .* from AbstractSampler",
        ),
        ("AbstractSampler", None, "", "update would never be called; derive the class from AbstractCurriculumSampler"),
        ("AbstractCurriculumSampler", None, "def state_dict(self): return {}", "both state_dict and load_state_dict"),
        ("AbstractCurriculumSampler", None, "def load_state_dict(self, state): pass", "both state_dict and load_stat"),
        (
            "AbstractCurriculumSampler",
            "__init__",
            "def __init__(self, dataset): pass",
            r"cannot be constructed as Mine\(data_source=..., data_config=...\): ",
        ),
    ],
)
def test_a_class_that_cannot_work_is_refused_by_name(tmp_path, base, without, extra, words):
    parts = SAMPLER.strip().split("\ndef ")
    parts = [part if part.startswith("def ") else f"def {part}" for part in parts]
    body = "\n".join(part for part in parts if without is None or not part.startswith(f"def {without}("))
    body += f"\n{extra}\n"
    path = tmp_path / "mine.py"
    path.write_text(
        f"from verl.experimental.dataset.sampler import {base}\nclass Mine({base}):\n{textwrap.indent(body, '    ')}"
    )
    with pytest.raises(ValueError, match=rf"^data\.sampler\.class_name=Mine: .*{words}"):
        create_rl_sampler(config_of(path, "Mine"), Words())


@pytest.mark.parametrize(
    ("path", "name", "words"),
    [
        ("absent.py", "Mine", r"absent\.py: .*no such file"),
        ("my_sampler.py", "Absent", r"has no class Absent; it has .*Hardest"),
        ("my_sampler.py", "NotASampler", r"NotASampler is not a subclass of .*AbstractSampler"),
        ("my_sampler.py", "null", r"data\.sampler\.class_name is not set"),
        ("broken.py", "Mine", r"does not import: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("pkg://nothing_of_that_name.sampler", "Mine", "no module nothing_of_that_name in sys.path"),
        ("pkg://json.nothing", "Mine", "does not import"),
    ],
)
def test_a_class_that_does_not_load_is_refused(file, path, name, words):
    (file.parent / "broken.py").write_text("import nothing_of_that_name\nclass Mine: pass\n")
    path = path if path.startswith("pkg://") else file.parent / path
    with pytest.raises(ValueError, match=words) as caught:
        create_rl_sampler(config_of(path, name), Words())
    assert str(path) in str(caught.value)
