"""`data`: files, columns, lengths and batches of prompts."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config.schema import key, planned, section


@dataclass
class CustomClassConfig:
    """A dataset class of the user's."""

    path: str | None = key(None, "Python file of a dataset class of your own; null for the built-in one")
    name: str | None = key(None, "name of that class")


@dataclass
class DataConfig:
    """Files, columns, lengths and batches of prompts."""

    train_files: str | list[str] | None = key(
        "~/data/gsm8k/train.parquet", ".parquet, .json or .jsonl file of training data, or a list", required=True
    )
    val_files: str | list[str] | None = key(
        "~/data/gsm8k/test.parquet", ".parquet, .json or .jsonl file of validation data, or a list", required=True
    )
    train_max_samples: int = key(-1, "rows of the training files to use, -1 for all", unit="prompts", at_least=-1)
    val_max_samples: int = key(-1, "rows of the validation files to use, -1 for all", unit="prompts", at_least=-1)
    train_batch_size: int = key(1024, "prompts of one training step, before rollout.n", unit="prompts", at_least=1)
    val_batch_size: int | None = key(
        None, "prompts generated for at once in validation, null for all", unit="prompts", at_least=1
    )
    max_prompt_length: int = key(512, "cap on a prompt", unit="tokens", at_least=1)
    max_response_length: int = key(512, "cap on a response", unit="tokens", at_least=1)
    truncation: str = key("error", "what happens to a longer prompt", choices=("error", "left", "right", "middle"))
    filter_overlong_prompts: bool = key(False, "drop prompts longer than max_prompt_length")
    filter_overlong_prompts_workers: int | None = key(
        1, "processes that measure prompts for the filter, null for 1", unit="processes", at_least=1
    )
    shuffle: bool = key(True, "another order of the training prompts in every epoch")
    seed: int | None = key(None, "seed of that order, null for trainer.seed", at_least=0)
    prompt_key: str = key("prompt", "column of the messages")
    reward_fn_key: str = key("data_source", "column that tells the scorers what a row is")
    apply_chat_template_kwargs: dict[str, Any] = key({}, "keywords for the chat template, e.g. enable_thinking")
    trust_remote_code: bool = key(
        False, "accepted together with actor_rollout_ref.model.trust_remote_code, which decides for the tokenizer too"
    )
    custom_cls: CustomClassConfig = section(CustomClassConfig, "a dataset class of your own")
    return_raw_chat: bool = planned(True, "leaving the messages out of the batch")
    return_raw_input_ids: bool = planned(False, "untemplated prompt tokens in the batch")
    return_full_prompt: bool = planned(False, "the templated prompt text in the batch")
    gen_batch_size: int | None = key(
        None,
        "prompts of one draw where algorithm.filter_groups drops some, or under way with rollout.partial_rollout; null "
        "for train_batch_size",
        unit="prompts",
        at_least=1,
    )
    dataloader_num_workers: int = planned(0, "loader processes", "use 0: the driver tokenises prompts itself")
    validation_shuffle: bool = planned(False, "shuffled validation prompts")
    image_key: str = planned("images", "images in prompts")
    video_key: str = planned("videos", "videos in prompts")
    tool_config_path: str | None = planned(None, "tools")
