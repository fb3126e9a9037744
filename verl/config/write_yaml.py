"""Writes the YAML files from the dataclasses: `python3 -m verl.config.write_yaml`, after changing a key."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from verl.config.actor import ActorConfig
from verl.config.algorithm import AlgorithmConfig
from verl.config.critic import CriticConfig
from verl.config.data import DataConfig
from verl.config.model import ModelConfig
from verl.config.ppo import PPOConfig, RayKwargs
from verl.config.ref import RefConfig
from verl.config.reward import RewardConfig
from verl.config.rollout import RolloutConfig
from verl.config.schema import key_of, show
from verl.config.trainer import TrainerConfig

FOLDER = Path(__file__).parents[1] / "trainer" / "config"
SECTIONS = {
    "data": DataConfig,
    "actor_rollout_ref.model": ModelConfig,
    "actor_rollout_ref.actor": ActorConfig,
    "actor_rollout_ref.ref": RefConfig,
    "actor_rollout_ref.rollout": RolloutConfig,
    "critic": CriticConfig,
    "algorithm": AlgorithmConfig,
    "reward": RewardConfig,
    "trainer": TrainerConfig,
    "ray_kwargs": RayKwargs,
}
_NOTE = "# Written by `python3 -m verl.config.write_yaml` from the dataclasses, which are the source.\n"


def files() -> dict[Path, str]:
    """Every YAML file and its text."""
    texts = {}
    for place, cls in SECTIONS.items():
        text = f"# {place}: {(cls.__doc__ or '').splitlines()[0]}\n{_NOTE}\n" + "\n".join(_lines(cls(), 0)) + "\n"
        texts[FOLDER / "sections" / f"{place.rsplit('.', 1)[-1]}.yaml"] = text
    texts[FOLDER / "ppo_trainer.yaml"] = _root()
    return texts


def _root() -> str:
    lines = ["# The whole config: every section, then the keys that have no section.", _NOTE, "defaults:"]
    lines += [f"  - sections/{place.rsplit('.', 1)[-1]}@{place}" for place in SECTIONS]
    lines += ["  - _self_", ""]
    config = PPOConfig()
    lines += _lines(config, 0, leave_out={place.split(".")[0] for place in SECTIONS})
    roles = _lines(config.actor_rollout_ref, 1, leave_out={"model", "actor", "ref", "rollout"})
    return "\n".join([*lines, "actor_rollout_ref:", *roles]) + "\n"


def _lines(config: Any, depth: int, leave_out: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    indent, lines = "  " * depth, []
    for field in dataclasses.fields(config):
        if field.name in leave_out:
            continue
        value, known = getattr(config, field.name), key_of(field)
        if dataclasses.is_dataclass(value):
            lines += [f"{indent}# {known.help}", f"{indent}{field.name}:", *_lines(value, depth + 1)]
            continue
        unit = f" [{known.unit}]" if known.unit else ""
        options = [show(choice) for choice in known.choices if choice is not None]
        choices = f" ({', '.join(options)})" if options and known.only is None else ""
        lines += [f"{indent}# {known.help}{choices}{unit}", f"{indent}{field.name}: {_scalar(value)}"]
    return lines


def _scalar(value: Any) -> str:
    """JSON is YAML, but for the exponents that YAML 1.1 takes for text; truth values are written as users do."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "True", False: "False"}[value]
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa if '.' in mantissa or not e else mantissa + '.0'}{e}{exponent}"
    if isinstance(value, str):
        return (
            value if value.replace("_", "").replace("-", "").isalnum() and value not in ("null",) else json.dumps(value)
        )
    return json.dumps(value)


def main() -> None:
    """Write every file that differs."""
    for path, text in files().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
