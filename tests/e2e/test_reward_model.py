"""Runs with a reward model: scores equal those of transformers, and a reward function gets the model's real answers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fixtures.tiny import write_tiny_classifier, write_tiny_model
from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e

MODEL = "reward__reward_model__"
JUDGE = """
import json

import aiohttp

GRADE = "grade "


async def compute_score(
    data_source, solution_str, ground_truth, extra_info, reward_router_address, reward_model_tokenizer
):
    messages = [{"role": "user", "content": GRADE + solution_str}]
    request = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 8}
    async with aiohttp.ClientSession() as session:
        async with session.post(f"http://{reward_router_address}/v1/chat/completions", json=request) as response:
            assert response.status == 200, await response.text()
            answer = (await response.json())["choices"][0]["message"]["content"]
    tokens = reward_model_tokenizer(answer, add_special_tokens=False)["input_ids"]
    return {"score": sum(tokens) / 100, "answer": answer, "asked": GRADE + solution_str}
"""


def enabled(model, engines=1):
    return {
        f"{MODEL}enable": True,
        f"{MODEL}enable_resource_pool": True,
        f"{MODEL}nnodes": 1,
        f"{MODEL}n_gpus_per_node": engines,
        f"{MODEL}model_path": model,
        f"{MODEL}rollout__tensor_model_parallel_size": 1,
        f"{MODEL}rollout__prompt_length": 64,
        f"{MODEL}rollout__response_length": 64,
        f"{MODEL}rollout__max_num_seqs": 64,
    }


def samples_of(directory):
    """The samples of every step, as the run wrote them."""
    files = sorted(directory.glob("*.jsonl"))
    assert len(files) == 2
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_classifier_scores_as_transformers(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address)
    # Another tokenizer and template than the policy's.
    path = write_tiny_classifier(
        tmp_path / "classifier",
        seed=3,
        chat_template="{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{% endfor %}!",
    )
    text = run.run(
        **enabled(path), reward__custom_reward_function__path=None, trainer__rollout_data_dir=tmp_path / "samples"
    )
    assert "reward model engine 0 is up" in text
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found, expected = [], []
    for sample in samples_of(tmp_path / "samples"):
        word = sample["input"].removeprefix("<s>").removesuffix("=")
        conversation = f"u:{word}a:{sample['output']}!"
        tokens = tokenizer(conversation, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(model(tokens).logits.item())
        found.append(sample["score"])
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1
    assert run.metrics()[1]["reward/num_errors"] == 0


def test_a_reward_function_asks_a_generative_model(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address)
    judge = write_tiny_model(tmp_path / "judge", seed=5)
    run.reward.write_text(f"MODEL = {str(judge)!r}\n{JUDGE}")
    run.run(**enabled(judge, engines=2), trainer__rollout_data_dir=tmp_path / "samples")
    model = AutoModelForCausalLM.from_pretrained(judge, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(judge)
    samples = samples_of(tmp_path / "samples")
    assert len({sample["answer"] for sample in samples}) > 1
    for sample in samples:
        prompt = tokenizer(f"<s>{sample['asked']}=", add_special_tokens=False, return_tensors="pt")
        reply = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert sample["answer"] == tokenizer.decode(reply, skip_special_tokens=True)
        assert sample["asked"] == "grade " + sample["output"]
        assert sample["score"] == pytest.approx(
            sum(tokenizer(sample["answer"], add_special_tokens=False)["input_ids"]) / 100
        )
