"""The prompts of the consistency check; the check itself runs in tests/e2e/test_consistency.py."""

from verl.trainer.ppo.consistency import random_prompts


def test_prompts_reach_from_one_token_to_the_longest():
    prompts = random_prompts(range(4, 90), count=8, longest=300, seed=1)
    lengths = [len(prompt) for prompt in prompts]
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[-1] == 300 and len(set(lengths)) == 8
    assert {token for prompt in prompts for token in prompt} <= set(range(4, 90))
    assert prompts == random_prompts(range(4, 90), count=8, longest=300, seed=1)
    assert prompts != random_prompts(range(4, 90), count=8, longest=300, seed=2)


def test_prompts_of_one_token_are_possible():
    assert [len(prompt) for prompt in random_prompts([7], count=3, longest=1, seed=0)] == [1, 1, 1]
