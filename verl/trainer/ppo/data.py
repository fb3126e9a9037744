"""The data of a run: tokenizer, training prompts and validation set."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from verl.config import PPOConfig
from verl.config.stream import carries_prompts, training_steps
from verl.preflight.inputs import data_seed
from verl.trainer.ppo.checkpoint import check_storable
from verl.trainer.rollouts.prompts import PromptSource
from verl.utils.dataset.loader import EpochDataLoader, build_dataloader
from verl.utils.dataset.rl_dataset import PromptDataset, create_rl_dataset, unwrapped
from verl.utils.dataset.sampled_loader import SampledDataLoader
from verl.utils.dataset.sampler import STATE_METHODS, AbstractCurriculumSampler, AbstractSampler, create_rl_sampler
from verl.utils.tokenizer import hf_tokenizer

logger = logging.getLogger(__name__)


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
        ValueError: the data does not fill a batch; see `build_dataloader`, `create_rl_dataset` and `create_rl_sampler`.
    """
    data, model = config.data, config.actor_rollout_ref.model
    assert model.path is not None and data.train_files is not None and data.val_files is not None
    tokenizer = hf_tokenizer(model.tokenizer_path or model.path, trust_remote_code=model.trust_remote_code)
    # A separate copy, because training prompts are tokenized in a thread.
    thread_tokenizer = copy.deepcopy(tokenizer)
    train = create_rl_dataset(data.train_files, thread_tokenizer, data, max_samples=data.train_max_samples)
    seed = data_seed(config)
    batch_size = 1 if carries_prompts(config) else data.gen_batch_size or data.train_batch_size
    sampler = create_rl_sampler(data, unwrapped(train))
    rows_per_epoch = len(train)
    if sampler is None:
        loader = build_dataloader(train, batch_size=batch_size, shuffle=data.shuffle, seed=seed, drop_last=True)
        prompts = PromptSource(loader)
    else:
        sampled = _sampled_loader(config, train, sampler, batch_size)
        prompts, rows_per_epoch = PromptSource(sampled), sampled.rows_per_pass
    validation = create_rl_dataset(data.val_files, tokenizer, data, max_samples=data.val_max_samples)
    val_loader = build_dataloader(
        validation,
        batch_size=data.val_batch_size or len(validation),
        shuffle=False,
        seed=seed,
        drop_last=False,
    )
    return TrainingData(tokenizer, prompts, val_loader, training_steps(config, rows_per_epoch))


def _sampled_loader(
    config: PPOConfig, dataset: PromptDataset, sampler: AbstractSampler, batch_size: int
) -> SampledDataLoader:
    """Build the loader of a sampler; check that checkpoints, if the run writes any, can hold its state."""
    name = config.data.sampler.class_name
    state_dict = getattr(sampler, STATE_METHODS[0], None)
    if config.trainer.save_freq > 0 and state_dict is not None:
        try:
            check_storable(state_dict())
        except ValueError as error:
            raise ValueError(
                f"data.sampler.class_name={name}: a checkpoint cannot hold the value of state_dict ({error}); return "
                "dicts, lists, tuples, sets, numbers, text, NumPy arrays and tensors"
            ) from error
    elif config.trainer.save_freq > 0 and isinstance(sampler, AbstractCurriculumSampler):
        logger.warning(
            "data.sampler.class_name=%s has no state_dict and load_state_dict: a resumed run starts without what its "
            "updates learned",
            name,
        )
    return SampledDataLoader(dataset, sampler, batch_size=batch_size)
