"""docs/config.md, and the help texts and units that it shows."""

from pathlib import Path

from verl.config import PPOConfig
from verl.config.conditions import all_words
from verl.config.schema import key_of, walk
from verl.config.write_reference import reference


def test_docs_page_is_up_to_date():
    page = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == reference(), "run python3 -m verl.config.write_reference"


def test_reference_contains_every_key_once():
    rows, section = set(), ""
    for line in reference().partition("## Other keys of upstream verl")[0].splitlines():
        if line.startswith("## "):
            section = "" if line.startswith("## Keys without") else line.removeprefix("## ") + "."
        elif line.startswith("| `"):
            name = section + line.split("`")[1]
            assert name not in rows
            rows.add(name)
    assert rows == {name for name, _, _ in walk(PPOConfig())}


def rows_and_introductions():
    """Cells of the row of each key, and text above the table of each section, by dotted name."""
    rows, introductions, section = {}, {}, ""
    for line in reference().splitlines():
        if line.startswith("## "):
            section = "" if line.startswith("## Keys without") else line.removeprefix("## ")
        elif line.startswith("| `"):
            rows[f"{section}.{line.split('`')[1]}".lstrip(".")] = line
        elif not line.startswith("|"):
            introductions[section] = introductions.get(section, "") + line
    return rows, introductions


def test_conditions_stand_beside_keys_and_sections():
    rows, introductions = rows_and_introductions()
    for name, field, _ in walk(PPOConfig()):
        key = key_of(field)
        conditions = [words for words in (all_words(key.only_with, name), *key.entries_only_with) if words]
        assert ("only with" in rows[name]) == bool(conditions), name
    assert "; only with `use_kl_loss=True` |" in rows["actor_rollout_ref.actor.kl_loss_coef"]
    assert "; only with `trainer.save_freq` at least 1 |" in rows["critic.checkpoint.save_contents"]
    assert (
        "; `max_resp_len`, `overlong_buffer_cfg` only with `reward.reward_manager.name` other than `naive` or `gdpo` |"
        in (rows["reward.reward_kwargs"])
    )
    conditional = {name for name, text in introductions.items() if "Only with" in text}
    assert {"critic", "critic.optim", "actor_rollout_ref.ref.fsdp_config", "algorithm.kl_ctrl"} <= conditional
    assert conditional.isdisjoint({"data", "trainer", "algorithm", "actor_rollout_ref.actor.optim"})
    assert introductions["critic"].endswith(
        "Only with an estimator that reads values, such as gae, or `critic.enable=True`."
    )


UNITS = {
    "prompts", "samples", "tokens", "seconds", "MiB", "training steps", "epochs", "processes", "ranks", "devices",
    "characters", "buckets", "updates", "training batches", "local updates", "mini-batches",
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
