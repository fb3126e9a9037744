"""The data of a run: tokenizer, training prompts and validation set."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from verl.config import PPOConfig
from verl.preflight.inputs import data_seed
from verl.trainer.rollouts.prompts import PromptSource
from verl.utils.dataset.loader import EpochDataLoader, build_dataloader
from verl.utils.dataset.rl_dataset import create_rl_dataset
from verl.utils.tokenizer import hf_tokenizer


@dataclass
class TrainingData:
    """The data of a run.

    Attributes:
        tokenizer: the model's tokenizer.
        prompts: the training prompts.
        val_loader: the validation set.
        total_steps: number of training steps of the run.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSource
    val_loader: EpochDataLoader
    total_steps: int


def load_data(config: PPOConfig) -> TrainingData:
    """Load the tokenizer and the data sets.

    Raises:
        ValueError: the data does not fill a batch; see `build_dataloader` and `create_rl_dataset`.
    """
    data, model = config.data, config.actor_rollout_ref.model
    assert model.path is not None and data.train_files is not None and data.val_files is not None
    tokenizer = hf_tokenizer(model.tokenizer_path or model.path, trust_remote_code=model.trust_remote_code)
    # A separate copy, because training prompts are tokenized in a thread.
    thread_tokenizer = copy.deepcopy(tokenizer)
    train = create_rl_dataset(data.train_files, thread_tokenizer, data, max_samples=data.train_max_samples)
    seed = data_seed(config)
    one_by_one = config.actor_rollout_ref.rollout.partial_rollout
    loader = build_dataloader(
        train,
        batch_size=1 if one_by_one else data.gen_batch_size or data.train_batch_size,
        shuffle=data.shuffle,
        seed=seed,
        drop_last=True,
    )
    prompts = PromptSource(loader)
    validation = create_rl_dataset(data.val_files, tokenizer, data, max_samples=data.val_max_samples)
    val_loader = build_dataloader(
        validation,
        batch_size=data.val_batch_size or len(validation),
        shuffle=False,
        seed=seed,
        drop_last=False,
    )
    steps_per_epoch = len(train) // data.train_batch_size
    total_steps = config.trainer.total_training_steps or steps_per_epoch * config.trainer.total_epochs
    return TrainingData(tokenizer, prompts, val_loader, total_steps)
