"""`data`: files, columns, lengths and batches of prompts."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config.conditions import any_of, unless, validates, when
from verl.config.schema import ConfigSection, key, section, unsupported, without_effect

_OWN_DATASET = unless("data.custom_cls.path", None, words="your own dataset class")
_NO_SAMPLER = "without your own sampler (data.sampler.class_path)"
_OWN_SAMPLER = unless("data.sampler.class_path", None, words="your own sampler")


@dataclass
class CustomClassConfig(ConfigSection):
    """The user's own dataset class."""

    path: str | None = key(None, "Python file of your own dataset class; null: the built-in class")
    name: str | None = key(
        None, "name of the class", only_with=unless("path", None, reason="with the built-in dataset class")
    )


@dataclass
class SamplerConfig(ConfigSection):
    """The user's own sampler. Its own keys, `data.sampler.<name>`, are in `kwargs`, and can be read as attributes."""

    class_path: str | None = key(
        None,
        "your own sampler, which chooses the prompts of each step: a Python file, or pkg:// and a module; null: all "
        "rows in turn, in the order of data.shuffle",
    )
    class_name: str | None = key(None, "name of the class", only_with=unless("class_path", None, reason=_NO_SAMPLER))
    kwargs: dict[str, Any] = key(
        {},
        "keys of your own for the sampler; data.sampler.NAME=VALUE sets one of them",
        only_with=unless("class_path", None, reason=_NO_SAMPLER),
    )

    def __getitem__(self, name: str) -> Any:
        return self.kwargs[name] if name in self.kwargs else super().__getitem__(name)

    def __getattr__(self, name: str) -> Any:
        own = vars(self).get("kwargs", {})
        if name in own:
            return own[name]
        raise AttributeError(f"data.sampler has no key {name!r}")


@dataclass
class DataConfig(ConfigSection):
    """Files, columns, lengths and batches of prompts."""

    train_files: str | list[str] | None = key(
        "~/data/gsm8k/train.parquet", "file of training data (.parquet, .json or .jsonl), or a list", required=True
    )
    val_files: str | list[str] | None = key(
        "~/data/gsm8k/test.parquet", "file of validation data (.parquet, .json or .jsonl), or a list", required=True
    )
    train_max_samples: int = key(-1, "rows of the training files to use; -1: all", unit="prompts", at_least=-1)
    val_max_samples: int = key(
        -1, "rows of the validation files to use; -1: all", unit="prompts", at_least=-1, only_with=validates
    )
    train_batch_size: int = key(
        1024,
        "prompts per training step, with rollout.n samples each; a fully asynchronous run derives it",
        unit="prompts",
        at_least=1,
    )
    val_batch_size: int | None = key(
        None,
        "prompts to generate for at once in validation; null: all",
        unit="prompts",
        at_least=1,
        only_with=validates,
    )
    max_prompt_length: int = key(512, "maximum length of a prompt", unit="tokens", at_least=1)
    max_response_length: int = key(512, "maximum length of a response", unit="tokens", at_least=1)
    truncation: str = key(
        "error",
        "treatment of longer prompts: an error, or cutting off their beginning (left), end (right) or middle",
        choices=("error", "left", "right", "middle"),
        only_with=any_of(
            when("filter_overlong_prompts", False),
            _OWN_DATASET,
            unless("actor_rollout_ref.rollout.agent.default_agent_loop", "single_turn_agent"),
            when("run.rows_choose_loop", words="a column `agent_name` in the data"),
            reason="with data.filter_overlong_prompts=True, which drops longer prompts",
        ),
    )
    filter_overlong_prompts: bool = key(False, "drop prompts longer than max_prompt_length")
    filter_overlong_prompts_workers: int | None = key(
        1,
        "processes that measure the prompts for the filter; null: 1",
        unit="processes",
        at_least=1,
        only_with=when("filter_overlong_prompts"),
    )
    shuffle: bool = key(
        True, "shuffle the training prompts again for each epoch; with your own sampler, only if it reads this key"
    )
    seed: int | None = key(
        None,
        "seed of the order of the training prompts (null: trainer.seed), and of the choice of rows with "
        "train_max_samples and val_max_samples (null: 0)",
        at_least=0,
        only_with=any_of(when("shuffle"), _OWN_DATASET, _OWN_SAMPLER),
    )
    prompt_key: str = key("prompt", "column of the messages")
    reward_fn_key: str = key("data_source", "column that names the source of a row, which scorers use")
    apply_chat_template_kwargs: dict[str, Any] = key(
        {}, "keyword arguments of the chat template, such as enable_thinking"
    )
    trust_remote_code: bool = key(
        False,
        "no effect of its own; True requires actor_rollout_ref.model.trust_remote_code=True, which decides for the "
        "tokenizer too",
    )
    custom_cls: CustomClassConfig = section(CustomClassConfig, "your own dataset class")
    sampler: SamplerConfig = section(SamplerConfig, "your own sampler")
    return_raw_chat: bool = unsupported(True, "leaving the messages out of the batch")
    return_raw_input_ids: bool = unsupported(False, "prompt tokens without the chat template in the batch")
    return_full_prompt: bool = unsupported(False, "the text of the prompt in the batch")
    gen_batch_size: int | None = key(
        None,
        "prompts to generate for at once with algorithm.filter_groups.enable=True, or prompts in progress with "
        "rollout.partial_rollout=True; null: train_batch_size; a fully asynchronous run derives it",
        unit="prompts",
        at_least=1,
        only_with=any_of(
            when("algorithm.filter_groups.enable"),
            when("actor_rollout_ref.rollout.partial_rollout"),
            when("async_training.enable"),
            reason="without dynamic sampling (algorithm.filter_groups.enable) and without rollout.partial_rollout",
        ),
    )
    dataloader_num_workers: int = without_effect(0, "a thread of the driver tokenizes prompts")
    validation_shuffle: bool = unsupported(False, "shuffled validation prompts")
    image_key: str = unsupported("images", "images in prompts")
    video_key: str = unsupported("videos", "videos in prompts")
    tool_config_path: str | None = unsupported(
        None, "tools in the data section", "use actor_rollout_ref.rollout.multi_turn.tool_config_path"
    )
