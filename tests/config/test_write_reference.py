"""docs/config.md, and the help texts and units that it shows."""

from pathlib import Path

from verl.config import PPOConfig
from verl.config.schema import key_of, walk
from verl.config.write_reference import reference


def test_docs_page_is_up_to_date():
    page = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == reference(), "run python3 -m verl.config.write_reference"


def test_reference_contains_every_key_once():
    rows, section = set(), ""
    for line in reference().splitlines():
        if line.startswith("## "):
            section = "" if line.startswith("## Keys without") else line.removeprefix("## ") + "."
        elif line.startswith("| `"):
            name = section + line.split("`")[1]
            assert name not in rows
            rows.add(name)
    assert rows == {name for name, _, _ in walk(PPOConfig())}


UNITS = {
    "prompts", "samples", "tokens", "seconds", "MiB", "training steps", "epochs", "processes", "ranks", "devices",
    "characters", "buckets", "updates",
}  # fmt: skip


def test_every_key_has_a_help_text_and_every_size_has_a_unit():
    for name, field, _ in walk(PPOConfig()):
        key = key_of(field)
        assert key.help, name
        assert key.unit in UNITS | {""}, name
        sizes = (
            "batch_size",
            "_length",
            "_tokens",
            "token_len",
            "_steps",
            "_freq",
            "_megabytes",
            "timeout",
            "max_model_len",
        )
        if any(part in name.rsplit(".", 1)[-1] for part in sizes) and key.only is None and "ratio" not in name:
            assert key.unit or isinstance(field.default, bool), name
