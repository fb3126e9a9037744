import pytest

from verl.config import ActorConfig, CriticConfig, FSDPConfig, RefConfig
from verl.config.actor import ActorFSDPConfig
from verl.config.ref import RefFSDPConfig
from verl.config.sequence_parallel import actor_sequence_parallel, critic_sequence_parallel, ref_sequence_parallel


@pytest.mark.parametrize(("section", "fsdp", "expected"), [(1, 1, 1), (4, 1, 4), (1, 4, 4), (4, 2, 4)])
def test_the_section_counts_before_its_fsdp_config(section, fsdp, expected):
    name = "ulysses_sequence_parallel_size"
    actor = ActorConfig(**{name: section}, fsdp_config=ActorFSDPConfig(**{name: fsdp}))
    critic = CriticConfig(**{name: section}, fsdp=FSDPConfig(**{name: fsdp}))
    assert actor_sequence_parallel(actor) == critic_sequence_parallel(critic) == expected


@pytest.mark.parametrize(
    ("ref", "fsdp", "actor", "expected"), [(None, 1, 4, 4), (None, 2, 4, 2), (1, 1, 4, 1), (2, 1, 4, 2), (1, 2, 4, 2)]
)
def test_the_reference_model_takes_the_value_of_the_actor(ref, fsdp, actor, expected):
    name = "ulysses_sequence_parallel_size"
    config = RefConfig(**{name: ref}, fsdp_config=RefFSDPConfig(**{name: fsdp}))
    assert ref_sequence_parallel(config, ActorConfig(**{name: actor})) == expected
