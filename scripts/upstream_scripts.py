"""Check the training scripts of upstream verl, and write the table in docs/migrating.md.

    python scripts/upstream_scripts.py CHECKOUT [--results FILE] [--data FILE] [--only PART_OF_A_PATH]

Each script is checked as by `verl check SCRIPT --without-files`, without running its programs. A script with npu,
ascend or mindspeed in its path is checked for an Ascend 950, all others for an H100; a script that asks which device
there is, is checked for both. A model that is not known by name is checked without its sizes. Variables that a script
leaves to its user have fixed values.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from verl.cli.capture import CaptureError, capture
from verl.cli.check import examine_command
from verl.config.engine_keys import translate
from verl.preflight.checks.model import MULTI_MODAL_NAME
from verl.preflight.target import Hardware, Target

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/migrating.md"
FOLDERS = ("examples", "tests/special_e2e", "tests/special_npu", "tests/special_distributed", "verl/experimental")
_NPU_PATH = re.compile(r"npu|ascend|mindspeed")
_ENGINES = ("megatron", "veomni", "torchtitan", "fsdp_turbo", "automodel")
_MARKS = ("<!-- upstream scripts -->", "<!-- /upstream scripts -->")
_SHOWN = 25
# Features that a problem names, by a pattern of its text.
_FEATURES = {
    "images, video or sound": r"multi-modal model|images are not supported",
    "another training engine": r"^the command trains with|megatron|veomni|torchtitan|config-name=",
    "another rollout engine": r"rollout\.name=(sglang|trtllm)",
    "memory of the device": r"^[a-z ]+ needs about .* GB",
    "fully asynchronous training": r"fully_async",
    "a variable that the user must set": r"needs the environment variable",
    "a reward model": r"reward\.reward_model",
    "a file of the user": r"no such file|does not exist",
}
# Values of the variables that a script leaves to its user, so that the rest of the script is checked.
_VARIABLES = {
    "INFER_BACKEND": "vllm",
    "LORA_ADAPTER_PATH": "adapter",
    "USE_DUMMY_MODEL": "False",
    "VERL_PROFILE_SAVE_PATH": "profiles",
}
# Keys that name files, which are not at hand when the accepted scripts are checked again.
_FILE_KEYS = ("custom_reward_function.path", "config_path", "custom_cls.path", "tool_path", "lora_adapter_path")


@dataclass(frozen=True)
class Result:
    """One script on one device.

    Attributes:
        script: path in the checkout.
        device: name of the hardware.
        module: the module that it starts; empty if it starts none that trains.
        words: arguments of the training command.
        errors: problems of the check.
    """

    script: str
    device: str
    module: str
    words: list[str]
    errors: list[str]

    @property
    def passes(self) -> bool:
        """True without problems."""
        return not self.errors

    @property
    def values(self) -> dict[str, str]:
        """The overrides by key."""
        pairs = (word.lstrip("+").split("=", 1) for word in self.words if "=" in word and not word.startswith("-"))
        return dict(pairs)

    @property
    def families(self) -> list[str]:
        """Names of the families of this script, which overlap."""
        text, values = " ".join(self.words), self.values
        engine = next((name for name in _ENGINES if name in text.replace("dist_megatron", "")), "FSDP")
        if engine == "FSDP" and any(name in self.script for name in _ENGINES):
            engine = next(name for name in _ENGINES if name in self.script)
        found = [engine]
        npu = self.device.startswith("npu")
        found += ["NPU and FSDP"] if npu and engine == "FSDP" else []
        found += ["NPU, dedicated"] if npu and _NPU_PATH.search(self.script) else []
        engines = {"sglang": "SGLang rollout", "trtllm": "TensorRT-LLM rollout"}
        found += [engines[name] for name in [values.get("actor_rollout_ref.rollout.name")] if name in engines]
        model = Path(values.get("actor_rollout_ref.model.path", "")).name
        images = MULTI_MODAL_NAME.search(model) or "geo3k" in values.get("data.train_files", "")
        found += ["images or video"] if images else []
        found += ["FSDP, text only"] if "FSDP" in found and not images else []
        found += ["LoRA"] if values.get("actor_rollout_ref.model.lora_rank", "0") != "0" else []
        asynchronous = "async" in self.module or "one_step_off" in self.module or "async" in self.script
        found += ["asynchronous"] if asynchronous else []
        found += ["distillation"] if values.get("distillation.enabled") == "True" else []
        return found


def scripts_of(checkout: Path) -> list[str]:
    """Return the paths of all shell scripts in the folders of scripts.

    Raises:
        FileNotFoundError: the folder is no checkout of upstream verl.
    """
    found = [path for folder in FOLDERS for path in sorted((checkout / folder).rglob("*.sh"))]
    if not found:
        raise FileNotFoundError(f"{checkout}: has no scripts in {', '.join(FOLDERS)}; give a checkout of upstream verl")
    return [str(path.relative_to(checkout)) for path in found]


def devices_of(checkout: Path, script: str) -> list[str]:
    """Return the hardware that a script is checked for."""
    if _NPU_PATH.search(script):
        return ["npu:ascend950"]
    asks = "torch_npu" in (checkout / script).read_text(encoding="utf-8", errors="replace")
    return ["cuda:h100", "npu:ascend950"] if asks else ["cuda:h100"]


def check_script(checkout: Path, script: str, device: str) -> Result | None:
    """Check a script; None if it trains no policy."""
    target = Target(starting=False, hardware=Hardware(device, None), without_files=True)
    # Without it, scripts start `uv run --frozen`, which needs the uv.lock of upstream verl.
    os.environ |= {"VERL_USE_UV": "0"} | _VARIABLES
    with contextlib.chdir(checkout):
        try:
            command = capture(Path(script), npu=device.startswith("npu"), seconds=120).trainings[0]
        except CaptureError as error:
            trains = re.search(r"fully_async_main|main_dapo|environment variable", str(error))
            return Result(script, device, "", [], [str(error)]) if trains else None
        run = examine_command(command, translate(command.words), target, written=False)
    return Result(script, device, command.entry.module, list(command.words), list(run.found.errors))


def head_of(problem: str) -> str:
    """Return what a problem is about: a feature, or a key without the role of the model."""
    for feature, pattern in _FEATURES.items():
        if re.search(pattern, problem):
            return feature
    unknown = re.match(r"unknown keys? '([^']+)'", problem)
    key = unknown[1] if unknown else re.split(r"[=:, ]", problem, maxsplit=1)[0]
    return f"`{re.sub(r'^[+]*(actor_rollout_ref[.](actor|ref|rollout|model)|critic)[.]', '', key)}`"


def table(results: Sequence[Result]) -> str:
    """Return the part of docs/migrating.md: families, and the keys that are refused most often."""
    lines = ["| scripts of upstream verl | number | accepted as they are |", "|---|---|---|"]
    families = Counter(name for result in results for name in result.families)
    passing = Counter(name for result in results if result.passes for name in result.families)
    lines.append(f"| all | {len(results)} | {sum(result.passes for result in results)} |")
    lines += [f"| {name} | {count} | {passing[name]} |" for name, count in families.most_common()]
    heads = Counter(head for result in results for head in {head_of(problem) for problem in result.errors})
    lines += ["", "| refused | in scripts |", "|---|---|"]
    lines += [f"| {head} | {count} |" for head, count in heads.most_common(_SHOWN)]
    return "\n".join(lines)


def write_page(text: str) -> None:
    """Replace the table in docs/migrating.md."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(_MARKS[0])
    after = rest.split(_MARKS[1])[1]
    PAGE.write_text(f"{before}{_MARKS[0]}\n{text}\n{_MARKS[1]}{after}", encoding="utf-8")


def passing_data(results: Sequence[Result], checkout: Path, number: int = 40) -> list[str]:
    """Return one JSON line for each of `number` accepted scripts, of all families in turn."""
    by_family: dict[str, list[Result]] = {}
    for result in results:
        if result.passes and not any(key.endswith(_FILE_KEYS) for key in result.values):
            by_family.setdefault(" ".join(result.families), []).append(result)
    chosen: list[Result] = []
    while by_family and len(chosen) < number:
        for name in list(by_family):
            chosen.append(by_family[name].pop(0))
            if not by_family[name]:
                del by_family[name]
    folders = {str(checkout): "/home/user/verl", os.path.expanduser("~"): "/home/user"}
    rows = ({name: value for name, value in asdict(result).items() if name != "errors"} for result in chosen[:number])
    lines = [json.dumps(row) for row in rows]
    for folder, other in folders.items():
        lines = [line.replace(folder, other) for line in lines]
    return lines


def main() -> None:
    """Check, print the numbers, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--results", type=Path, help="JSON file for the problems of each script")
    parser.add_argument("--data", type=Path, help="file for keys and values of 40 accepted scripts")
    parser.add_argument("--only", default="", help="check the scripts whose path contains this; writes no page")
    options = parser.parse_args()
    checkout, results = options.checkout.resolve(), []
    for script in scripts_of(checkout):
        for device in devices_of(checkout, script) if options.only in script else []:
            result = check_script(checkout, script, device)
            if result is not None:
                results.append(result)
                sys.stderr.write(f"{'ok  ' if result.passes else f'{len(result.errors):3} '} {device:14} {script}\n")
    if options.results is not None:
        options.results.write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    if options.data is not None:
        options.data.write_text("\n".join(passing_data(results, checkout)) + "\n", encoding="utf-8")
    text = table(results)
    sys.stdout.write(text + "\n")
    if not options.only:
        write_page(text)


if __name__ == "__main__":
    main()
