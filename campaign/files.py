"""Cases of damaged files: model directories, data, quantization, adapters, YAML files, runs and checkpoints."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from campaign import damage
from campaign.cases import Case, Damage, accepts_nothing
from campaign.sandbox import overrides

_SOME = 4
_DESCRIBE = ("describe", "{root}/model", "-o", "{root}/described.json")
_DESCRIBED = ("described.json",)


@dataclass(frozen=True)
class Subject:
    """A file and a command that reads it.

    Attributes:
        name: part of the names of its cases.
        area: row of the table.
        file: path below the directory of the case.
        words: command line.
        named: see `Case`; besides the file's name.
        outputs: see `Case`.
        required: the command cannot work without the file's content.
        composes: see `Case`.
        works: the command accepts the undamaged file.
    """

    name: str
    area: str
    file: str
    words: tuple[str, ...]
    named: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    required: bool = True
    composes: bool = False
    works: bool = True

    def case(self, kind: str, prepare: Damage, *, must_refuse: bool = False) -> Case:
        """Return the case of one damage.

        Args:
            must_refuse: the command cannot work with this damage.
        """
        path = PurePosixPath(self.file)
        # Hydra shows the names of files without their ending. An error about a key of the file names the key.
        own = (path.name, f"'{path.stem}'", "unknown key", "trainer.") if self.composes else (path.name,)
        more: dict[str, Any] = {"why_illegal": accepts_nothing} if must_refuse else {}
        named = (own, *((text,) for text in self.named))
        return Case(
            f"{self.name}/{kind}",
            self.area,
            self.words,
            named,
            prepare=prepare,
            outputs=self.outputs,
            composes=self.composes,
            **more,
        )


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of all files."""
    for subject in [*_model_json(), *_tokenizer(), *_weights(), *_data(), *_descriptions(), *_records(), *_yaml()]:
        yield from _undamaged(subject)
        yield from _bytes_and_places(subject)
        if subject.file.endswith(".json"):
            yield from _json_texts(subject)
    for subject in _model_json():
        yield from _fields(seed, subject, _FIELDS[PurePosixPath(subject.file).name])
    for subject in _weights():
        yield from _headers(subject) if subject.file.endswith(".safetensors") else _index(subject)
    for subject in _adapter():
        yield from _undamaged(subject)
        yield from _bytes_and_places(subject)
        if subject.file.endswith(".json"):
            yield from _json_texts(subject)
            yield from _fields(seed, subject, _FIELDS["adapter_config.json"])
        else:
            yield from _headers(subject)
    for subject in _yaml():
        yield from (subject.case(f"yaml-{kind}", damage.text(subject.file, text)) for kind, text in _YAML.items())


# Words of `verl train` and `verl check` with a key or two more.
def _train(**changes: Any) -> tuple[str, ...]:
    return ("train", *overrides(**changes))


def _check(**changes: Any) -> tuple[str, ...]:
    return ("check", *overrides(**changes))


def _model_json() -> list[Subject]:
    area, file = "model: config.json, generation_config.json", "model/config.json"
    return [
        Subject("model/train/config.json", area, file, _train(), ("actor_rollout_ref.model.path",)),
        Subject("model/check/config.json", area, file, _check(), ("actor_rollout_ref.model.path",)),
        Subject("model/describe/config.json", area, file, _DESCRIBE, outputs=_DESCRIBED, required=False),
        Subject("model/train/generation_config.json", area, "model/generation_config.json", _train(), required=False),
    ]


def _tokenizer() -> list[Subject]:
    area = "model: tokenizer's files"
    return [
        Subject(f"model/{command}/{name}", area, f"model/{name}", words, required=name == "tokenizer.json")
        for command, words in (("train", _train()), ("check", _check()))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    ]


def _weights() -> list[Subject]:
    area = "model: safetensors files and index"
    sharded = _train(actor_rollout_ref__model__path="{root}/sharded")
    describe = ("describe", "{root}/sharded", *_DESCRIBE[2:])
    shard, index = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
    return [
        Subject("model/train/model.safetensors", area, "model/model.safetensors", _train()),
        Subject(
            "model/describe/model.safetensors",
            area,
            "model/model.safetensors",
            _DESCRIBE,
            (),
            _DESCRIBED,
            required=False,
        ),
        Subject(f"model/train/{shard}", area, f"sharded/{shard}", sharded),
        Subject(f"model/train/{index}", area, f"sharded/{index}", sharded),
        Subject(f"model/describe/{index}", area, f"sharded/{index}", describe, outputs=_DESCRIBED, required=False),
    ]


def _data() -> list[Subject]:
    area = "data: parquet, JSON, JSON lines"
    return [
        Subject(f"data/{command}/{name}", area, name, make(data__train_files=f"{{root}}/{name}"), ("data.train_files",))
        for command, make in (("train", _train), ("check", _check))
        for name in ("train.parquet", "train.json", "train.jsonl")
    ]


def _descriptions() -> list[Subject]:
    area = "quantization: descriptions"
    return [
        Subject(
            f"quantization/train/{name}",
            area,
            name,
            _train(
                actor_rollout_ref__rollout__quantization=scheme,
                actor_rollout_ref__rollout__quantization_config_file=f"{{root}}/{name}",
            ),
            required=scheme != "ascend" or name == "description.json",
        )
        for name, scheme in (("description.json", "ascend"), ("ignore.json", "ascend"))
    ]


def _adapter() -> list[Subject]:
    words = _train(actor_rollout_ref__model__lora_adapter_path="{root}/adapter")
    area, named = "adapters of LoRA", ("actor_rollout_ref.model.lora_adapter_path",)
    return [
        Subject(f"adapter/train/{name}", area, f"adapter/{name}", words, named)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]


def _yaml() -> list[Subject]:
    area = "YAML: configs, agent loops"
    own = ("train", "--config-path", "{root}/yaml", "--config-name", "own", *overrides())
    loops = _train(actor_rollout_ref__rollout__agent__agent_loop_config_path="{root}/loops.yaml")
    return [
        Subject("yaml/train/own.yaml", area, "yaml/own.yaml", own, required=False, composes=True),
        Subject("yaml/train/loops.yaml", area, "loops.yaml", loops, required=False),
    ]


def _records() -> list[Subject]:
    area, old = "runs and checkpoints", "old/global_step_2"
    resume = _train(
        trainer__default_local_dir="{root}/old", actor_rollout_ref__actor__checkpoint__load_contents="[model]"
    )
    names = ("manifest.json", "config.yaml", "inputs.json", "actor/model/__0_0.distcp", "actor/engine.json")
    checkpoint = [
        Subject(f"checkpoint/{command}/{name}", area, f"{old}/{name}", words, required=False, works=command == "train")
        for command, words in (("train", resume), ("export", ("export", f"{{root}}/{old}")))
        for name in names
    ]
    tracker = "latest_checkpointed_iteration.txt"
    checkpoint.append(Subject(f"checkpoint/train/{tracker}", area, f"old/{tracker}", resume, required=False))
    report = ("report", "{root}/old", "-o", "{root}/report.html")
    files = ("metrics.jsonl", "config.yaml", "config_changes.yaml", "validation/4.jsonl", "timeline.json")
    return checkpoint + [
        Subject(f"report/{name}", area, f"old/{name}", report, outputs=("report.html",), required=False)
        for name in files
    ]


def _undamaged(subject: Subject) -> Iterator[Case]:
    if subject.works:
        yield dataclasses.replace(subject.case("undamaged", lambda root, chance: None), must_accept=True)


def _bytes_and_places(subject: Subject) -> Iterator[Case]:
    for kind, change in damage.BYTES.items():
        must_refuse = subject.required and kind in damage.UNREADABLE
        yield subject.case(f"bytes-{kind}", damage.of_bytes(subject.file, change), must_refuse=must_refuse)
    for kind, make in damage.PLACES.items():
        yield subject.case(f"place-{kind}", make(subject.file), must_refuse=subject.required)


def _json_texts(subject: Subject) -> Iterator[Case]:
    for kind, text in damage.JSON_TEXTS.items():
        yield subject.case(f"json-{kind}", damage.text(subject.file, text))


_FIELDS: Mapping[str, Sequence[str]] = {
    "config.json": (
        "model_type",
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "layer_types",
        "hidden_act",
        "rms_norm_eps",
        "torch_dtype",
        "dtype",
        "eos_token_id",
        "pad_token_id",
        "quantization_config",
        "text_config",
        "vision_config",
        "auto_map",
    ),
    "generation_config.json": ("eos_token_id", "pad_token_id", "bos_token_id"),
    "adapter_config.json": ("peft_type", "r", "lora_alpha", "target_modules", "bias", "lora_dropout"),
}


def _fields(seed: int, subject: Subject, fields: Sequence[str]) -> Iterator[Case]:
    """Yield the cases of wrong values: all of them for `verl train`, and some by chance for other commands."""
    kinds = list(damage.JSON_VALUES)
    chance = random.Random(f"{seed}/{subject.name}")
    for field in fields:
        yield subject.case(f"{field}/absent", damage.without_json_field(subject.file, field))
        for kind in kinds if subject.words[0] == "train" else chance.sample(kinds, _SOME):
            value = damage.JSON_VALUES[kind]
            yield subject.case(f"{field}/{kind}", damage.json_field(subject.file, field, value))


def _headers(subject: Subject) -> Iterator[Case]:
    for kind, change in damage.HEADERS.items():
        must_refuse = kind not in ("without-a-tensor", "other-metadata")
        header = damage.safetensors_header(subject.file, change)
        yield subject.case(f"header-{kind}", header, must_refuse=must_refuse)
    for kind, length in damage.LENGTHS.items():
        yield subject.case(f"length-{kind}", damage.safetensors_length(subject.file, length), must_refuse=True)


def _index(subject: Subject) -> Iterator[Case]:
    shard = "model-00001-of-00002.safetensors"
    maps: dict[str, Any] = {
        **damage.JSON_VALUES,
        "missing-file": {"model.norm.weight": "model-00007-of-00002.safetensors"},
        "file-is-number": {"model.norm.weight": 7},
        "file-is-empty": {"model.norm.weight": ""},
        "file-above": {"model.norm.weight": "../model/model.safetensors"},
        "absolute-file": {"model.norm.weight": "/dev/zero"},
        "long-file": {"model.norm.weight": "x" * 5000},
        "null-character": {"model.norm.weight": "model\0.safetensors"},
        "unknown-tensor": {"kumquat.weight": shard},
    }
    for kind, value in maps.items():
        yield subject.case(f"map-{kind}", damage.json_field(subject.file, "weight_map", value), must_refuse=True)


_YAML = {
    "tab": "trainer:\n\ttotal_epochs: 3\n",
    "unclosed": "trainer: {total_epochs: 3\n",
    "list": "- 1\n- 2\n",
    "text": "kumquat\n",
    "number": "7\n",
    "twice": "trainer:\n  seed: 1\ntrainer:\n  seed: 2\n",
    "anchor": "trainer: &a\n  seed: 1\nactor: *b\n",
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself": "trainer: &a\n  seed: *a\n",
    "python": "trainer: !!python/object/apply:os.system ['touch made']\n",
    "dates": "2020-01-01: 2020-01-01\n",
    "null-key": "null: 1\ntrainer: {null: 2}\n",
    "nan-key": ".nan: 1\n",
    "list-key": "? [1, 2]\n: 3\n",
    "interpolation": "trainer:\n  seed: ${no.such.key}\n",
    "deep": "a: " + "[" * 3000 + "]" * 3000 + "\n",
    "control": "trainer: \x07\n",
    "defaults-missing": "defaults:\n  - no_such_file\n",
    "defaults-number": "defaults: 7\n",
    "defaults-itself": "defaults:\n  - own\n",
    "section-is-list": "trainer: [1]\n",
    "entries": "- 7\n- null\n- name: own\n",
}
"""Texts of a YAML file."""
