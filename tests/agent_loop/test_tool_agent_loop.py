"""Control flow of the loop with a scripted client: tokens, masks, limits, turns, tools."""

import json
import string

import numpy as np
import pytest

from fixtures import tools as fake
from fixtures.chat import HERMES, MINIMAL, ScriptedClient, byte_tokenizer
from fixtures.tools import tool_call, write_tool_config
from verl.agent_loop.agent_loop import get_agent_loop
from verl.agent_loop.generation import ScoredSample, to_batch
from verl.agent_loop.metrics import FAILURES, compute_agent_metrics
from verl.agent_loop.tool_session import truncate
from verl.config import PPOConfig
from verl.utils.dataset.prompts import truncate_prompt
from verl.utils.sampling_masks import SamplingMasks
from verl.workers.reward import RewardResult
from verl.workers.rollout.types import TokenOutput

QUESTION = [{"role": "user", "content": "say it"}]
TOOLS = (
    (fake.Echo, "echo", ["text"], {}),
    (fake.Echo, "other", ["text"], {}),
    (fake.Slow, "slow", [], {"seconds": 0.05}),
    (fake.Raises, "raises", [], {}),
    (fake.Hangs, "hangs", [], {"timeout": 0.1}),
    (fake.Huge, "huge", [], {}),
    (fake.BadReturn, "bad_return", [], {}),
    (fake.BadReward, "bad_reward", [], {}),
    (fake.Picture, "picture", [], {}),
    (fake.BadRelease, "bad_release", ["text"], {}),
    (fake.BadCreate, "bad_create", ["text"], {}),
    (fake.EmptyCreate, "empty_create", ["text"], {}),
    (fake.Cancelled, "cancelled", [], {}),
    (fake.Keywords, "keywords", [], {}),
    (fake.Returns, "returns", [], {}),
)


class Bench:
    """Runs one sample. `responses` are texts, which the model ends with its end token, or token lists."""

    def __init__(self, root, template=HERMES):
        self.tokenizer = byte_tokenizer(template)
        self.config = PPOConfig()
        self.config.data.max_prompt_length, self.config.data.max_response_length = 4000, 2000
        self.limits = self.config.actor_rollout_ref.rollout.multi_turn
        self.limits.tool_config_path = str(write_tool_config(root / "tools.yaml", *TOOLS))

    def ids(self, text):
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]

    async def run(self, *responses, log_probs=True, **row):
        responses = [self.ids(text) if isinstance(text, str) else text for text in responses]
        self.client = ScriptedClient(responses, log_probs)
        loop = get_agent_loop("tool_agent").loop
        instance = loop(self.client, self.tokenizer, self.config, **loop.setup(self.tokenizer, self.config))
        output = await instance.run({"temperature": 1.0}, **{"raw_prompt": QUESTION, "index": 7, **row})
        self.check(output, log_probs)
        return output

    def check(self, output, log_probs):
        """Check the invariants of every sample."""
        size = len(output.response_ids)
        assert size == len(output.response_mask) == len(output.weight_versions)
        assert len(output.response_logprobs) == (size if log_probs else 0)
        assert size <= self.config.data.max_response_length
        assert output.response_mask[-1:] in ([], [1])
        for i, own in enumerate(output.response_mask):
            assert output.weight_versions[i] == (3 if own else -1)
            if log_probs:
                assert (output.response_logprobs[i] == 0.0) == (not own)

    def shown(self, output):
        """Return the text of the tokens that the model did not generate."""
        tokens = zip(output.response_ids, output.response_mask, strict=True)
        return self.tokenizer.decode([token for token, own in tokens if not own])


@pytest.fixture
def bench(tmp_path):
    fake.EVENTS.clear()
    return Bench(tmp_path)


async def test_a_response_without_a_call_is_the_whole_sample(bench):
    output = await bench.run("hello")
    assert output.response_ids == bench.ids("hello") and output.response_mask == [1] * len(output.response_ids)
    assert (output.stop_reason, output.num_turns) == ("stop", 2)
    assert output.extra_fields["tool_call_counts"] == 0 and fake.EVENTS == []


@pytest.mark.parametrize("template", [HERMES, MINIMAL], ids=["hermes", "minimal"])
async def test_model_tokens_are_kept_unchanged_and_tool_tokens_are_masked(tmp_path, template):
    bench = Bench(tmp_path, template)
    # Byte by byte: the tokenizer merges these bytes, so decoding and encoding gives other tokens.
    text = tool_call("echo", text="hello assistant")
    letters = [token for char in text for token in bench.tokenizer.encode(char, add_special_tokens=False)]
    first = [*letters, bench.tokenizer.eos_token_id]
    assert first != bench.ids(text) and bench.tokenizer.decode(letters) == text
    second = bench.ids("done")
    output = await bench.run(first, second)
    between = len(output.response_ids) - len(first) - len(second)
    assert between > 0
    assert output.response_ids[: len(first)] == first and output.response_ids[-len(second) :] == second
    assert output.response_mask == [1] * len(first) + [0] * between + [1] * len(second)
    assert output.response_logprobs[: len(first)] == [-0.5 - i for i in range(len(first))]
    assert output.response_logprobs[-len(second) :] == [-0.5 - i for i in range(len(second))]
    assert "hello assistant" in bench.shown(output) and "tool_call" not in bench.shown(output)
    assert (output.stop_reason, output.num_turns) == ("stop", 4)
    # The second request has the first prompt and all tokens since, the same session, and the remaining token limit.
    (prompt, sampling, session), (longer, later, again) = bench.client.requests
    assert prompt == output.prompt_ids and longer == prompt + output.response_ids[: len(first) + between]
    assert session == again and session is not None and sampling["temperature"] == 1.0
    assert sampling["max_tokens"] == 2000 and later["max_tokens"] == 2000 - len(first) - between


async def test_every_sample_has_its_own_session(bench):
    sessions = set()
    for _ in range(3):
        await bench.run(tool_call("echo", text="a"), "b")
        sessions |= {session for _, _, session in bench.client.requests}
    assert len(sessions) == 3


async def test_the_prompt_contains_the_tools(bench):
    output = await bench.run("hello")
    text = bench.tokenizer.decode(output.prompt_ids)
    assert '"name": "echo"' in text and '"the tool raises"' in text and "say it" in text


async def test_without_log_probs_the_column_is_empty(bench):
    output = await bench.run(tool_call("echo", text="a"), "b", log_probs=False)
    assert output.response_logprobs == [] and 0 in output.response_mask


# ---- reasoning ----


async def test_a_call_in_the_reasoning_is_not_executed(bench):
    output = await bench.run(f"<think>{tool_call('raises')}</think>" + tool_call("echo", text="a"), "done")
    assert output.extra_fields["tool_call_counts"] == 1 and output.extra_fields["tool_failures"] == {}
    output = await bench.run(f"<think>{tool_call('echo', text='a')}</think>done")
    assert output.extra_fields["tool_call_counts"] == 0 and output.stop_reason == "stop"


async def test_a_reasoning_that_the_template_opens_is_recognized_in_every_turn(tmp_path):
    start = "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    template = HERMES.replace(start, start + "<think>\n")
    assert template != HERMES
    bench = Bench(tmp_path, template)
    call = tool_call("echo", text="a")
    output = await bench.run(f"first {call}</think>{call}", f"then {call}</think>done")
    assert output.extra_fields["tool_call_counts"] == 1
    assert bench.tokenizer.decode(output.prompt_ids).endswith("<think>\n") and "<think>\n" in bench.shown(output)
    output = await bench.run(f"unfinished {call}")
    assert output.extra_fields["tool_call_counts"] == 0


# ---- the end ----


@pytest.mark.parametrize("kind", ["max_assistant_turns", "max_user_turns"])
@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_turn_limits_stop_the_sample(bench, kind, limit):
    setattr(bench.limits, kind, limit)
    output = await bench.run(*[tool_call("echo", text="a")] * 6)
    turns = limit if kind == "max_assistant_turns" else limit + 1
    assert len(bench.client.requests) == turns
    assert output.stop_reason == "turns" and output.num_turns == 1 + turns + (turns - 1)
    assert output.extra_fields["tool_call_counts"] == turns - 1


async def test_the_last_allowed_turn_may_end_without_a_call(bench):
    bench.limits.max_assistant_turns = 2
    assert (await bench.run(tool_call("echo", text="a"), "b")).stop_reason == "stop"


async def sizes_of_a_call(bench):
    """Return the number of tokens of the response with the call, and of the tool response."""
    output = await bench.run(tool_call("echo", text="a"), "b")
    own = len(bench.ids(tool_call("echo", text="a")))
    return own, output.response_mask.count(0)


@pytest.mark.parametrize(
    ("room", "requests", "reason", "tools_tokens"),
    [
        (lambda own, tool: own + tool + 2, 2, "stop", True),  # "b" and its end token fit exactly
        (lambda own, tool: own + tool + 1, 2, "length", True),  # "b" fits, its end token does not
        (lambda own, tool: own + tool, 1, "length", False),  # no room for another token
        (lambda own, tool: own + 1, 1, "length", False),
        (lambda own, tool: own, 1, "length", False),
        (lambda own, tool: own - 1, 1, "length", False),
        (lambda own, tool: 1, 1, "length", False),
    ],
)
async def test_the_response_never_exceeds_its_limit(bench, room, requests, reason, tools_tokens):
    own, tool = await sizes_of_a_call(bench)
    bench.config.data.max_response_length = limit = room(own, tool)
    output = await bench.run(tool_call("echo", text="a"), "b")
    assert len(bench.client.requests) == requests and output.stop_reason == reason
    assert (0 in output.response_mask) == tools_tokens
    assert len(output.response_ids) == (limit if tools_tokens else min(limit, own))


async def test_surplus_tokens_of_the_client_are_cut(bench):
    bench.config.data.max_response_length = 5
    output = await bench.run(TokenOutput(list(range(9)), [-1.0] * 9, "length", [3] * 9))
    assert output.response_ids == [0, 1, 2, 3, 4]


async def test_sampling_masks_follow_the_tokens_of_all_turns(bench):
    responses = [bench.ids(tool_call("echo", text="a")), bench.ids("done")]
    masks = [SamplingMasks(np.repeat(ids, 2).astype(np.int32), np.full(len(ids), 2, np.int32)) for ids in responses]
    output = await bench.run(
        *(
            TokenOutput(ids, [-1.0] * len(ids), "stop", [3] * len(ids), mask)
            for ids, mask in zip(responses, masks, strict=True)
        )
    )
    tools = output.response_mask.count(0)
    assert tools and output.sampling_masks == masks[0] + SamplingMasks.full(tools) + masks[1]
    assert not len((await bench.run("done")).sampling_masks)


async def test_the_context_length_of_the_engine_limits_the_response(bench):
    prompt = len((await bench.run("hello")).prompt_ids)
    bench.config.actor_rollout_ref.rollout.max_model_len = prompt + 12
    await bench.run("hello")
    assert bench.client.requests[0][1]["max_tokens"] == 12


@pytest.mark.parametrize("reason", ["length", "abort"])
async def test_a_response_that_was_cut_runs_no_tool(bench, reason):
    ids = bench.ids(tool_call("echo", text="a"))
    output = await bench.run(TokenOutput(ids, [-1.0] * len(ids), reason, [3] * len(ids)))
    assert output.stop_reason == reason and output.extra_fields["tool_call_counts"] == 0


# ---- calls ----


async def test_a_tool_has_one_instance_per_sample(bench):
    info = {"tools_kwargs": {"echo": {"create_kwargs": {"ground_truth": "42"}, "execute_kwargs": {"suffix": "!"}}}}
    info["tools_kwargs"]["other"] = None  # Parquet adds such empty entries
    call = tool_call("echo", text="a")
    output = await bench.run(call, call, tool_call("other", text="bcd"), "done", extra_info=info)
    assert fake.EVENTS == [
        ("create", "echo", {"ground_truth": "42"}),
        ("execute", "echo", 1),
        ("execute", "echo", 2),
        ("create", "other", {}),
        ("execute", "other", 3),
        ("release", "echo"),
        ("release", "other"),
    ]
    assert "a!" in bench.shown(output)
    assert output.extra_fields["tool_rewards"] == [1.0, 1.0, 3.0]
    assert output.extra_fields["rollout_reward_scores"] == {"echo": 0.25, "other": 0.25}
    assert output.extra_fields["last_echo"] == "bcd" and "connection" not in output.extra_fields


@pytest.mark.parametrize(("limit", "run", "dropped"), [(1, 1, 2), (2, 2, 1), (5, 3, 0)])
async def test_surplus_calls_of_one_response_are_dropped(bench, limit, run, dropped):
    bench.limits.max_parallel_calls = limit
    fake.Slow.most = 0
    output = await bench.run(" ".join([tool_call("slow")] * 3), "done")
    assert output.extra_fields["tool_call_counts"] == run == fake.Slow.most
    assert output.extra_fields["tool_failures"].get("dropped", 0) == dropped
    assert bench.shown(output).count("<tool_response>") == run and output.num_turns == 4


async def test_two_parallel_first_calls_share_one_instance(bench):
    bench.limits.max_parallel_calls = 2
    await bench.run(" ".join(tool_call("echo", text=text) for text in "ab"), "done")
    assert [event[0] for event in fake.EVENTS] == ["create", "execute", "execute", "release"]


@pytest.mark.parametrize(
    ("response", "kind", "words"),
    [
        (tool_call("raises"), "raised", "raises failed: KeyError: 'no such city'"),
        (tool_call("hangs"), "timed_out", "hangs did not answer within 0.1 seconds"),
        (tool_call("bad_return"), "raised", "returned a dict, not (ToolResponse, reward, metrics)"),
        (tool_call("bad_reward"), "raised", "the reward nan"),
        (tool_call("picture"), "raised", "images or video"),
        (tool_call("bad_create", text="a"), "raised", "bad_create failed: RuntimeError: no room"),
        (tool_call("empty_create", text="a"), "raised", "empty_create.create returned an empty tuple"),
        (tool_call("cancelled"), "raised", "cancelled failed: CancelledError"),
        (tool_call("nobody"), "unknown_tool", "there is no tool 'nobody'; the tools are: echo, other, slow"),
        (tool_call("echo", txt="a"), "wrong_arguments", "echo needs text; its arguments are: text"),
        (
            tool_call("echo", text="a", loud=1),
            "wrong_arguments",
            "echo has no argument 'loud'; its arguments are: text",
        ),
        ("<tool_call>{'name': 3}</tool_call>", "malformed", "Error: the tool call is not valid JSON"),
        ("<tool_call>[1]</tool_call>", "malformed", "Error: the tool call has no name"),
    ],
)
async def test_a_failed_call_is_shown_to_the_model_and_counted(bench, response, kind, words):
    output = await bench.run(response, "I see")
    assert words in bench.shown(output) and "Error: " in bench.shown(output)
    assert output.extra_fields["tool_failures"] == {kind: 1} and output.extra_fields["tool_rewards"] == []
    assert output.stop_reason == "stop" and output.num_turns == 4
    assert set(output.extra_fields["tool_failures"]) <= set(FAILURES)


class Stubborn:
    def __float__(self):
        raise RuntimeError("no number")

    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("returns", "words"),
    [
        (("fine", 10**400), "gave a int as its reward"),
        (("fine", 10**5000), "gave a int as its reward"),
        (("fine", np.ones(2)), "gave a ndarray as its reward"),
        (("fine", Stubborn()), "gave a Stubborn as its reward"),
        ((3, 1.0), "returned a int as text"),
    ],
)
async def test_no_return_value_of_a_tool_ends_the_run(bench, monkeypatch, returns, words):
    monkeypatch.setattr(fake.Returns, "RETURNS", returns)
    output = await bench.run(tool_call("returns"), "done")
    assert words in bench.shown(output) and output.extra_fields["tool_failures"] == {"raised": 1}


async def test_half_an_emoji_from_a_tool_or_in_a_call_is_replaced(bench, monkeypatch):
    monkeypatch.setattr(fake.Returns, "RETURNS", ("a\ud83db\ud83d\ude00", None))
    output = await bench.run(tool_call("returns"), "done")
    assert "a\ufffdb\U0001f600" in bench.shown(output) and not output.extra_fields["tool_failures"]
    output = await bench.run(tool_call("echo", text="x\ud83d"), "done")  # json.dumps escapes it
    assert "x\ufffd" in bench.shown(output) and output.extra_fields["last_echo"] == "x\ufffd"


@pytest.mark.parametrize("as_text", [False, True])
async def test_execute_kwargs_may_have_any_name_and_may_be_json_text(bench, as_text):
    given = {"timeout": 5, "function": "f", "tool": "t", "args": [1]}
    tools_kwargs = {"keywords": {"execute_kwargs": given}}
    info = {"tools_kwargs": json.dumps(tools_kwargs) if as_text else tools_kwargs, "need_tools_kwargs": True}
    output = await bench.run(tool_call("keywords"), "done", extra_info=info)
    assert json.dumps(given, sort_keys=True) in bench.shown(output)


@pytest.mark.parametrize("selection", ["echo", 3])
async def test_a_tool_selection_that_is_no_list_is_an_error(bench, selection):
    with pytest.raises(ValueError, match=r"tool_selection=.*must be a list"):
        await bench.run("done", extra_info={"tool_selection": selection})


async def test_a_failed_release_does_not_end_the_run(bench):
    output = await bench.run(tool_call("bad_release", text="a"), "done")
    assert output.stop_reason == "stop" and output.extra_fields["tool_failures"] == {"release": 1}


async def test_instances_are_released_if_the_engine_fails(bench):
    with pytest.raises(IndexError):  # the script has no second turn
        await bench.run(tool_call("echo", text="a"))
    assert fake.EVENTS[-1] == ("release", "echo")


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        ("left", "(truncated)...xxxxxxxxxe"),
        ("right", "bxxxxxxxxx...(truncated)"),
        ("middle", "bxxxx...(truncated)...xxxxe"),
    ],
)
async def test_a_huge_tool_response_is_truncated(bench, side, expected):
    bench.limits.max_tool_response_length, bench.limits.tool_response_truncate_side = 10, side
    output = await bench.run(tool_call("huge"), "done")
    assert f"<tool_response>\n{expected}\n</tool_response>" in bench.shown(output)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_a_side_means_the_same_for_tool_responses_and_for_prompts(side):
    text = string.ascii_letters
    kept = truncate(text, 10, side).replace("...(truncated)...", "").replace("(truncated)...", "")
    assert kept.replace("...(truncated)", "") == "".join(truncate_prompt(list(text), 10, side))


async def test_a_long_error_is_truncated(bench):
    output = await bench.run(tool_call("n" * 1500), "done")
    assert "...(truncated)..." in bench.shown(output) and len(bench.shown(output)) < 450


def test_truncate_keeps_exactly_the_given_number_of_characters():
    assert [truncate("abc", 3, side) for side in ("left", "right", "middle")] == ["abc"] * 3
    assert truncate("abcdef", 1, "middle") == "a...(truncated)..."
    assert truncate("abcdef", 3, "middle") == "ab...(truncated)...f"


# ---- rows ----


async def test_a_row_may_select_some_of_the_tools(bench):
    info = {"tool_selection": ["echo"]}
    output = await bench.run(tool_call("raises"), "done", extra_info=info)
    prompt = bench.tokenizer.decode(output.prompt_ids)
    assert '"name": "echo"' in prompt and "raises" not in prompt
    assert "there is no tool 'raises'; the tools are: echo" in bench.shown(output)
    with pytest.raises(ValueError, match="tool_selection: unknown tool nobody; the tools are echo, other"):
        await bench.run("done", extra_info={"tool_selection": ["nobody"]})


async def test_a_row_without_its_required_tools_kwargs_is_rejected(bench):
    with pytest.raises(ValueError, match=r"row 7: extra_info\.need_tools_kwargs"):
        await bench.run("done", extra_info={"need_tools_kwargs": True, "tools_kwargs": {"echo": None}})


async def test_a_prompt_that_is_too_long_with_the_tools_follows_the_truncation_key(bench):
    length = len((await bench.run("done")).prompt_ids)
    bench.config.data.max_prompt_length = length
    await bench.run("done")
    bench.config.data.max_prompt_length = length - 1
    with pytest.raises(ValueError, match=rf"row 7 has {length} tokens with the tools' schemas.*to {length} or more"):
        await bench.run("done")
    bench.config.data.truncation = "left"
    assert len((await bench.run("done")).prompt_ids) == length - 1


async def test_a_sample_does_not_change_its_row(bench):
    messages = [{"role": "user", "content": "say it"}]
    await bench.run(tool_call("echo", text="a"), "b", raw_prompt=messages)
    assert messages == QUESTION


# ---- columns and metrics ----


def scored(output, score, **extra):
    row = {"uid": "0", "data_source": "d", "reward_model": {}, "raw_prompt": QUESTION}
    return ScoredSample(row, output, RewardResult(score, extra, None, 0.0))


async def test_samples_with_and_without_tools_in_one_batch(bench):
    bench.limits.max_parallel_calls = 2
    used = await bench.run(tool_call("echo", text="abc") + tool_call("raises"), "done")
    no_call = await bench.run("hello")
    other = await bench.run("hi")
    other.extra_fields = {}  # as from another loop
    batch = to_batch([scored(used, 2.0), scored(no_call, 1.0), scored(other, 3.0)], pad_token_id=0, with_log_probs=True)
    columns = batch.non_tensor_batch
    assert columns["tool_rewards"].tolist() == [[3.0], [], None]
    assert columns["tool_call_counts"].tolist() == [2, 0, None]
    width = batch.batch["responses"].shape[1]
    mask = used.response_mask + [0] * (width - len(used.response_mask))
    assert batch.batch["response_mask"][0].tolist() == mask
    assert batch.batch["attention_mask"][0, -width:].tolist() == [1] * len(used.response_ids)
    np.testing.assert_array_equal(batch.batch["rollout_log_probs"][0].numpy() != 0, mask)
    scores = batch.batch["token_level_scores"]
    assert [scores[i].nonzero().item() for i in range(3)] == [len(o.response_ids) - 1 for o in (used, no_call, other)]
    metrics = compute_agent_metrics(batch)
    assert metrics["num_turns/min"] == 2 and metrics["num_turns/max"] == 4
    assert metrics["num_turns/mean"] == pytest.approx(8 / 3)
    assert metrics["tool_call_counts/mean"] == 1.0 and metrics["agent_loop/tool_calls/max"] > 0
    assert metrics["agent_loop/tool_failures/raised"] == 1 and metrics["agent_loop/tool_failures/timed_out"] == 0


async def test_the_score_is_at_the_last_token_of_the_model(bench):
    output = await bench.run("hello")
    output.response_mask[-2:] = [0, 0]  # a user's loop may end with tokens of the environment
    scores = to_batch([scored(output, 1.0)], pad_token_id=0, with_log_probs=False).batch["token_level_scores"]
    assert scores[0].nonzero().item() == len(output.response_ids) - 3


@pytest.mark.parametrize("name", ["uid", "num_turns"])
async def test_an_extra_field_with_the_name_of_a_column_is_rejected(bench, name):
    output = await bench.run("hello")
    output.extra_fields = {name: 1}
    with pytest.raises(ValueError, match=f"the agent loop returns {name}"):
        to_batch([scored(output, 1.0)], pad_token_id=0, with_log_probs=False)
    output.extra_fields = {}
    with pytest.raises(ValueError, match=f"the reward function returns {name}"):
        to_batch([scored(output, 1.0, **{name: 1})], pad_token_id=0, with_log_probs=False)


def test_without_tools_there_are_no_tool_metrics():
    from verl.protocol import DataProto

    batch = DataProto.from_dict(non_tensors={"num_turns": np.array([2, 2], dtype=object)})
    assert compute_agent_metrics(batch) == {"num_turns/min": 2, "num_turns/max": 2, "num_turns/mean": 2}
