"""Chat templates that would end the run when it renders its first prompt."""

import json

import pytest


@pytest.fixture
def write(run_files):
    def write(name, content):
        raw = content if isinstance(content, bytes) else content.encode()
        (run_files.model / name).write_bytes(raw)

    return write


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{% for m in messages %}\n{{ m.content }", "chat_template.jinja is not a valid template, at line 2"),
        ("{{ messages[0].content \x00 }}", "chat_template.jinja is not a valid template, at line 1"),
        (b"\xff\xfe{{}}", "chat_template.jinja is not a UTF-8 text file (byte 0)"),
    ],
)
def test_a_damaged_file_is_an_error(problem_of, run_files, write, content, expected):
    write("chat_template.jinja", content)
    text = problem_of()
    assert text.startswith(f"actor_rollout_ref.model.path={run_files.model}: {expected}")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages", "chat_template in tokenizer_config.json is not a valid template"),
        (7, "chat_template in tokenizer_config.json must be text, and is 7"),
        ([7], "chat_template in tokenizer_config.json must be text, or a list of objects with name and template"),
        ([{"name": "default"}], "chat_template in tokenizer_config.json must be text, or a list of objects"),
    ],
)
def test_a_damaged_setting_is_an_error(problem_of, write, template, expected):
    write("tokenizer_config.json", json.dumps({"chat_template": template}))
    assert expected in problem_of()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}",
        "",
    ],
)
def test_a_template_in_the_language_of_transformers_is_accepted(plan_of, write, template):
    write("chat_template.jinja", template)
    plan_of()


def test_the_key_of_another_tokenizer_is_named(problem_of, run_files, write):
    folder = run_files.root / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{% if %}")
    write("chat_template.jinja", "{% if %}")  # not used
    text = problem_of(actor_rollout_ref__model__tokenizer_path=folder)
    assert text.startswith(f"actor_rollout_ref.model.tokenizer_path={folder}: chat_template.jinja is not a valid")
