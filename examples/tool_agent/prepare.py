"""Prepare the calculator example: write a tokenizer, a small Qwen3 model and two parquet files.

The task is to add two numbers of three digits; the model is too small to learn addition itself. It is warm-started on
two kinds of demonstrations: half of them call the calculator and repeat its result, the others guess. The model then
knows the format of a call, but not that a call increases the reward: it learns this by reinforcement learning.

Prepared files are used again if the same script wrote them with the same settings; `--force` writes new ones.
"""

import argparse
import hashlib
import json
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl.utils.atomic_io import atomic_write_text
from verl.utils.dataset.prepare import write_splits

DATA_SOURCE = "sums"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS = 0, 1, 2
# The fixed parts of a call are one token each, so that a small model learns the format quickly.
CALL_BEGIN, CALL_END = '{"name": "calculator", "arguments": {"expression": "', '"}}'
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", CALL_BEGIN, CALL_END)
CHARACTERS = "".join(chr(code) for code in range(32, 127))
# "[calculator]<s>123+456=" is a prompt. A tool response is between its markers; "=" starts every turn of the model.
CHAT_TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<s>' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '=' + message.content + '</s>' }}"
    "{% elif message.role == 'tool' %}{{ '<tool_response>' + message.content + '</tool_response>' }}"
    "{% else %}{{ raise_exception('this tokenizer knows the roles user, assistant and tool only') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '=' }}{% endif %}"
)
MANIFEST = "manifest.json"
# Numbers from 100 to 499: every sum also has three digits, so that positions are fixed and learning is fast.
NUMBERS = 400


@dataclass(frozen=True)
class Settings:
    """Settings that determine the prepared files."""

    seed: int = 1
    train_rows: int = 2048
    test_rows: int = 64
    warm_steps: int = 300
    warm_batch: int = 32  # demonstrations per step
    warm_lr: float = 2e-3
    calls: float = 0.5  # share of the demonstrations that call the calculator


def pairs(settings: Settings) -> list[tuple[int, int]]:
    """Draw different pairs of numbers, those of the test rows first."""
    rng = random.Random(settings.seed)
    numbers = rng.sample(range(NUMBERS * NUMBERS), settings.test_rows + settings.train_rows)
    return [(100 + number // NUMBERS, 100 + number % NUMBERS) for number in numbers]


def row(pair: tuple[int, int], split: str, index: int) -> dict[str, Any]:
    """Convert a sum to verl's columns."""
    a, b = pair
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": f"{a}+{b}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(a + b)},
        "extra_info": {"index": index, "split": split},
    }


def write_data(directory: Path, settings: Settings) -> None:
    """Write train.parquet and test.parquet."""
    drawn = pairs(settings)
    parts = {"test": drawn[: settings.test_rows], "train": drawn[settings.test_rows :]}
    write_splits(
        directory,
        {split: [row(pair, split, index) for index, pair in enumerate(part)] for split, part in parts.items()},
    )


def make_tokenizer():
    """Create a tokenizer with one token per character and one for each of `MARKERS`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(seed: int):
    """Create a Qwen3 model with 0.8 million random float32 weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model


def demonstration(pair: tuple[int, int], calls: float, rng: random.Random) -> list[tuple[str, bool]]:
    """Return the continuation of a prompt as pieces (text, whether the model learns it).

    With probability `calls`: a call, the calculator's response, and its result as the answer. Otherwise: a random
    number as the answer.
    """
    a, b = pair
    if rng.random() >= calls:
        return [(str(rng.randrange(200, 999)), True), ("</s>", True)]
    call = f"<tool_call>{CALL_BEGIN}{a}+{b}{CALL_END}</tool_call></s>"
    return [(call, True), (f"<tool_response>{a + b}</tool_response>=", False), (f"{a + b}</s>", True)]


def demonstration_batch(tokenizer, settings: Settings, rng: random.Random):
    """Return token ids and labels, int64 [warm_batch, longest], right-padded; labels outside model text are -100."""
    import torch

    rows = []
    for _ in range(settings.warm_batch):
        pair = rng.randrange(100, 100 + NUMBERS), rng.randrange(100, 100 + NUMBERS)
        ids = tokenizer.encode(f"[calculator]<s>{pair[0]}+{pair[1]}=", add_special_tokens=False)
        labels = [-100] * len(ids)
        for text, learned in demonstration(pair, settings.calls, rng):
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            labels += piece if learned else [-100] * len(piece)
        rows.append((ids, labels))
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in rows])
    targets = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return tokens, targets


def warm_start(model, tokenizer, settings: Settings) -> None:
    """Train the model on demonstrations, in place."""
    import torch

    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.warm_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(settings.warm_steps):
        scale = min((step + 1) / 20, 1.0) * max(1.0 - step / settings.warm_steps, 0.05)
        for group in optimizer.param_groups:
            group["lr"] = settings.warm_lr * scale
        tokens, labels = demonstration_batch(tokenizer, settings, rng)
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == settings.warm_steps:
            print(f"  warm start: step {step + 1}/{settings.warm_steps}, loss {loss.item():.3f}", flush=True)


def fingerprint(settings: Settings) -> dict[str, Any]:
    """Values that must be equal for a reuse of prepared files."""
    return {"settings": asdict(settings), "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}


def is_prepared(directory: Path, settings: Settings) -> bool:
    """Return whether the files exist and were written with the same settings and script."""
    try:
        made_with = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = ("train.parquet", "test.parquet", "model/model.safetensors", "model/tokenizer.json")
    return made_with == fingerprint(settings) and all((directory / name).is_file() for name in files)


def prepare(directory: str | Path, settings: Settings, force: bool = False) -> bool:
    """Write model/, train.parquet and test.parquet to `directory`, unless it contains them already.

    Returns:
        True if the files were written, False if existing ones are used again.
    """
    from transformers.utils import logging

    for name in ("train_rows", "test_rows"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(settings, name)}: must be at least 1")
    directory = Path(directory)
    if not force and is_prepared(directory, settings):
        print(f"{directory}: using the model and the data prepared earlier")
        return False
    print(f"{directory}: preparing the model and the data", flush=True)
    (directory / "model").mkdir(parents=True, exist_ok=True)
    # Files without a manifest are not used again, so an interrupted preparation starts over.
    (directory / MANIFEST).unlink(missing_ok=True)
    write_data(directory, settings)
    logging.disable_progress_bar()
    tokenizer, model = make_tokenizer(), make_model(settings.seed)
    warm_start(model, tokenizer, settings)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    atomic_write_text(directory / MANIFEST, json.dumps(fingerprint(settings), indent=2) + "\n")
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/tool_agent"), metavar="DIR")
    parser.add_argument("--force", action="store_true", help="write the files again")
    for name, value in asdict(Settings()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value, metavar=str(value))
    given = vars(parser.parse_args(arguments))
    output, force = given.pop("output"), given.pop("force")
    # OpenMP reads this variable when torch is first imported: idle threads that spin slow down programs on the same
    # cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        prepare(output, Settings(**given), force)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare.py: {error}")


if __name__ == "__main__":
    main()
