"""The names and tables of `verl.config.names` against the code."""

from types import SimpleNamespace

import pytest

from verl.config import PPOConfig, names
from verl.config.schema import walk


def test_names_are_those_of_the_registries():
    from verl.algorithms import kl
    from verl.algorithms.advantages.common import ADV_ESTIMATORS
    from verl.algorithms.losses.common import POLICY_LOSSES
    from verl.config.actor import OptimConfig
    from verl.config.schema import key_of
    from verl.trainer.ppo import core_algos
    from verl.utils.tracking import Tracking
    from verl.utils.tracking.tracker import UNSUPPORTED_BACKENDS
    from verl.workers.engine import checkpoint, optim

    assert set(names.ADV_ESTIMATORS) <= set(ADV_ESTIMATORS.names())
    assert set(names.POLICY_LOSSES) <= set(POLICY_LOSSES.names())
    assert set(names.LOSS_AGG_MODES) == set(core_algos.LOSS_AGG_MODES)
    assert set(names.KL_TYPES) == set(kl.KL_TYPES)
    assert set(names.LOGGERS) == set(Tracking.BACKENDS)
    assert set(names.UNSUPPORTED_LOGGERS) == set(UNSUPPORTED_BACKENDS)
    assert set(names.CHECKPOINT_CONTENTS) == {*checkpoint.CONTENTS, "hf_model"}
    assert key_of(OptimConfig.__dataclass_fields__["lr_scheduler_type"]).choices == optim.SCHEDULES


@pytest.mark.parametrize(
    ("section", "table"),
    [("algorithm", names.ADV_ESTIMATORS), ("actor_rollout_ref.actor", names.POLICY_LOSSES)],
)
def test_tables_only_contain_existing_keys(section, table):
    known = {name for name, _, _ in walk(PPOConfig())}
    assert {f"{section}.{key}" for entry in table.values() for key in entry.reads} <= known


class Recorder:
    """A section of a config that records the names of the keys that are read."""

    def __init__(self, section, seen, prefix=""):
        self._section, self._seen, self._prefix = section, seen, prefix

    def __getattr__(self, name):
        value = getattr(self._section, name)
        self._seen.add(self._prefix + name)
        return Recorder(value, self._seen, f"{name}.") if isinstance(value, SimpleNamespace) else value


@pytest.mark.parametrize("name", [name for name in names.POLICY_LOSSES if name != "bypass_mode"])
def test_policy_losses_read_the_keys_of_their_table(name):
    from fixtures.loss_cases import CONFIG, global_batch_info, make_loss_batch
    from verl.algorithms.losses import get_policy_loss_fn, get_token_selector

    batch, seen = make_loss_batch(), set()
    # clip_ratio is read only if the other two are null.
    section = SimpleNamespace(**vars(CONFIG) | {"clip_ratio_low": None, "clip_ratio_high": None})
    section.global_batch_info = global_batch_info(batch.mask)
    config, selector = Recorder(section, seen), get_token_selector(name)

    def loss(mode):
        selected = selector and selector(batch.new, batch.old, batch.advantages, batch.mask, config, 1)
        return get_policy_loss_fn(name)(
            old_log_prob=batch.old,
            log_prob=batch.new,
            advantages=batch.advantages,
            response_mask=batch.mask,
            loss_agg_mode=mode,
            config=config,
            **({} if selector is None else {"selected_tokens": selected}),
        )[0]

    same = float(loss("token-sum")) == float(loss("token-mean"))
    optional = {key for entry in names.POLICY_LOSSES.values() for key in entry.reads}
    assert seen & optional == set(names.POLICY_LOSSES[name].reads)
    assert same is names.POLICY_LOSSES[name].own_aggregation
