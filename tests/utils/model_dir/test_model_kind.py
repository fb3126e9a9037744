"""Kind and labels of a model, as its files show them."""

import pytest

from fixtures.tiny import write_tiny_classifier
from verl.utils.model_dir.model_files import model_of_config, read_model
from verl.utils.model_dir.model_kind import label_count, model_kind


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("Qwen3ForCausalLM", "generator"),
        ("GPT2LMHeadModel", "generator"),
        ("Qwen2_5_VLForConditionalGeneration", "generator"),
        ("LlamaForSequenceClassification", "classifier"),
        ("LlamaForTokenClassification", None),
        ("BertModel", None),
    ],
)
def test_the_architecture_gives_the_kind(architecture, kind):
    assert model_kind({"architectures": [architecture, "Other"]}) == kind


def test_the_head_gives_the_number_of_labels(tmp_path):
    assert label_count(read_model(write_tiny_classifier(tmp_path, labels=3))) == 3


@pytest.mark.parametrize(("config", "labels"), [({"id2label": {"0": "a"}}, 1), ({"num_labels": 4}, 4), ({}, 2)])
def test_without_weights_the_config_gives_it(tmp_path, config, labels):
    assert label_count(model_of_config(tmp_path, config)) == labels
