import task


def ids(prompt: str) -> list[int]:
    return [int(word[1:]) for word in prompt.split()]


def test_lengths_are_evenly_spaced():
    assert task.spread(5, 32, 256) == [32, 88, 144, 200, 256]
    assert task.spread(3, 6, 6) == [6, 6, 6]
    assert task.spread(1, 32, 256) == [256]


def test_a_prompt_encodes_the_length_of_its_response():
    lengths = [6, 99, 100, 256]
    prompts = task.make_prompts(3, lengths, tokens=8)
    assert {len(ids(prompt)) for prompt in prompts} == {8}
    for step in range(3):
        found = [task.response_length(ids(prompt)) for prompt in prompts[4 * step : 4 * step + 4]]
        assert sorted(found) == lengths


def test_every_token_is_in_the_smallest_vocabulary():
    tokens = {token for prompt in task.make_prompts(50, [6, 256], tokens=8) for token in ids(prompt)}
    assert min(tokens) >= task.FIRST_WORD
    assert max(tokens) < 128


def test_scores_differ_between_responses():
    assert task.score("w4 w5 w10 w7") == 0.5
    assert task.score("") == 0.0
    assert task.compute_score("benchmark", "w4", "") == 1.0
