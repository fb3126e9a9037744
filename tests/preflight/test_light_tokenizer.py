"""LightTokenizer against the transformers tokenizer."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from verl.preflight.light_tokenizer import LightTokenizer
from verl.utils.dataset.prompts import prompt_token_ids

MESSAGES = [
    {"role": "system", "content": 'Answer "briefly".'},
    {"role": "user", "content": "  What is 2 + 3?\n\nÜber <b>10</b>? "},
    {"role": "assistant", "content": "<think>five</think>5"},
    {"role": "user", "content": "And then?"},
]
CHATML = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set content = message.content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{% continue %}{% endif %}
    [{{ message['role'] | upper }}] {{ message | tojson }} {{ eos_token }}
{% endfor %}{% generation %}{% if add_generation_prompt %}[A]{% endif %}{% endgeneration %}"""
REJECTS = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"


@pytest.fixture
def folder(tmp_path):
    """A byte-level BPE with special tokens, and a post-processor that adds a token that the template has already."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([message["content"] for message in MESSAGES] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<think>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def write(template, separate=False):
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": {"content": "<s>", "special": True, "__type": "AddedToken"},
            "eos_token": "</s>",
        }
        if separate:
            (tmp_path / "chat_template.jinja").write_text(template)
        elif template is not None:
            settings["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
def test_tokens_equal_those_of_transformers(folder, template, variables, separate):
    path = folder(template, separate)
    expected = prompt_token_ids(AutoTokenizer.from_pretrained(path), MESSAGES, variables)
    assert prompt_token_ids(LightTokenizer(path), MESSAGES, variables) == expected
    assert len(expected) > 30


def test_template_that_rejects_messages_is_an_error(folder):
    with pytest.raises(ValueError, match=r"rejects messages with the roles .*no system message"):
        prompt_token_ids(LightTokenizer(folder(REJECTS)), MESSAGES, {})


def test_missing_template_is_an_error(folder):
    with pytest.raises(ValueError, match="has no chat template"):
        prompt_token_ids(LightTokenizer(folder(None)), MESSAGES, {})


def test_missing_or_damaged_tokenizer_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        LightTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="copy it again"):
        LightTokenizer(tmp_path)
