"""Prepare the quickstart: write a character tokenizer, a small Qwen3 model and two parquet files.

The task is reasoning-gym's `spell_backward`. The model is warm-started on demonstrations, most of which are wrong on
purpose (`--noise`): it learns the format of an answer but is seldom right, so that reinforcement learning has something
to improve. Test words appear neither in the training rows nor in the demonstrations.

Prepared files are used again if they are complete and were written with the same settings, script and version of
reasoning-gym; `--force` writes new ones.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from verl.utils.atomic_io import atomic_write_text, fsync_path
from verl.utils.dataset.prepare import write_splits

TASK = "spell_backward"
DATA_SOURCE = f"reasoning_gym/{TASK}"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS = 0, 1, 2
# A question "tab" with its answer "bat" is the text "<s>tab=bat</s>".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '=' + message['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('this tokenizer knows the roles user and assistant only') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '=' }}{% endif %}"
)
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Settings:
    """Settings that determine the prepared files."""

    seed: int = 1
    min_word_len: int = 5
    max_word_len: int = 5
    train_rows: int = 4096
    test_rows: int = 128
    warm_steps: int = 160
    warm_batch: int = 128  # demonstrations per step
    warm_lr: float = 2e-3
    noise: float = 0.65  # share of the demonstrations that show another word's answer
    experts: int = 0  # experts of a layer, two of which compute a token; 0: a dense model


def entries(settings: Settings, count: int, seed: int, taken: set[str]) -> list[dict[str, Any]]:
    """Return `count` items with different lower-case words that are not in `taken`, and add these words to `taken`.

    Raises:
        ValueError: reasoning-gym has too few such words.
    """
    import reasoning_gym

    lengths = dict(min_word_len=settings.min_word_len, max_word_len=settings.max_word_len)
    dataset = reasoning_gym.create_dataset(TASK, size=sys.maxsize, seed=seed, **lengths)
    usable = {word for word in dataset.words if set(word) <= set(LETTERS)} - taken
    # The items are random and repeat, so finding the last tenth of the words would take long.
    if count > 0.9 * len(usable):
        raise ValueError(
            f"--train-rows, --test-rows: {count} words of {settings.min_word_len} to {settings.max_word_len} letters "
            f"are needed, but only {int(0.9 * len(usable))} are available: use fewer rows or other lengths"
        )
    found: list[dict[str, Any]] = []
    for index in itertools.count():
        if len(found) == count:
            break
        entry = dataset[index]
        word = entry["metadata"]["word"]
        if word in usable:
            usable.remove(word)
            found.append(entry)
    taken.update(entry["metadata"]["word"] for entry in found)
    return found


def row(entry: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """Convert an item to verl's columns. The prompt is only the word, because the model knows no English."""
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": entry["metadata"]["word"]}],
        "ability": "spelling",
        "reward_model": {"style": "rule", "ground_truth": entry["answer"]},
        # The scorer of the task needs the item, as JSON.
        "extra_info": {"index": index, "split": split, "entry": json.dumps(entry, sort_keys=True)},
    }


def write_data(directory: Path, settings: Settings) -> list[str]:
    """Write train.parquet and test.parquet; return the training words, which demonstrations may use."""
    taken: set[str] = set()
    # The test words are drawn first, so that they do not depend on the number of training rows.
    test = entries(settings, settings.test_rows, settings.seed, taken)
    train = entries(settings, settings.train_rows, settings.seed + 10_000_000, taken)
    items = {"train": train, "test": test}
    write_splits(
        directory,
        {split: [row(entry, split, index) for index, entry in enumerate(part)] for split, part in items.items()},
    )
    return [entry["metadata"]["word"] for entry in train]


def make_tokenizer():
    """Create a tokenizer with one token per lower-case letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS, "="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(seed: int, experts: int):
    """Create a Qwen3 model with 0.8 million random float32 weights; with eight experts they are 1.8 million."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    kind: dict[str, Any] = {"model_type": "qwen3", "intermediate_size": 384}
    if experts:
        kind = {"model_type": "qwen3_moe", "moe_intermediate_size": 128, "num_experts": experts}
        kind |= {"num_experts_per_tok": 2, "norm_topk_prob": True}
    config = AutoConfig.for_model(
        **kind,
        vocab_size=32,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model


def demonstration(word: str, words: list[str], noise: float, rng: random.Random) -> str:
    """Return an answer for `word`: the word backwards or, with probability `noise`, any of `words` backwards."""
    return (rng.choice(words) if rng.random() < noise else word)[::-1]


def demonstration_batch(words: list[str], settings: Settings, rng: random.Random):
    """Return token ids and labels, int64 [warm_batch, longest], right-padded; labels outside the answer are -100."""
    import torch

    ids_of = {letter: len(SPECIAL) + i for i, letter in enumerate([*LETTERS, "="])}
    width = 2 * settings.max_word_len + 3
    tokens = torch.full((settings.warm_batch, width), PAD)
    labels = torch.full((settings.warm_batch, width), -100)
    for i in range(settings.warm_batch):
        word = rng.choice(words)
        question = [BOS, *(ids_of[letter] for letter in word), ids_of["="]]
        answer = [*(ids_of[letter] for letter in demonstration(word, words, settings.noise, rng)), EOS]
        tokens[i, : len(question) + len(answer)] = torch.tensor(question + answer)
        labels[i, len(question) : len(question) + len(answer)] = torch.tensor(answer)
    return tokens, labels


def warm_start(model, words: list[str], settings: Settings) -> None:
    """Train the model on demonstrations, in place."""
    import torch

    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.warm_lr, betas=(0.9, 0.95), weight_decay=0.0)
    started = time.perf_counter()
    for step in range(settings.warm_steps):
        scale = min((step + 1) / 20, 1.0) * max(1.0 - step / settings.warm_steps, 0.05)
        for group in optimizer.param_groups:
            group["lr"] = settings.warm_lr * scale
        tokens, labels = demonstration_batch(words, settings, rng)
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 40 == 0 or step + 1 == settings.warm_steps:
            seconds = time.perf_counter() - started
            print(
                f"  warm start: step {step + 1}/{settings.warm_steps}, loss {loss.item():.3f}, {seconds:.0f} s",
                flush=True,
            )


def write_model(directory: Path, words: list[str], settings: Settings) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = make_model(settings.seed, settings.experts)
    warm_start(model, words, settings)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def fingerprint(settings: Settings) -> dict[str, Any]:
    """Values that must be equal for a reuse of prepared files."""
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {"settings": asdict(settings), "script": script, "reasoning-gym": version("reasoning-gym")}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why_not_reusable(directory: Path, settings: Settings) -> str | None:
    """Return the reason why the files in `directory` cannot be used again; None if they can."""
    path = directory / MANIFEST
    if not path.exists():
        return "nothing is prepared yet"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, made_with = dict(manifest["files"]), manifest["made_with"]
    except (ValueError, TypeError, KeyError):
        return f"{path} is damaged"
    if made_with != fingerprint(settings):
        return "the files have other settings, or another version of the script or of reasoning-gym wrote them"
    for name, digest in files.items():
        if not (directory / name).is_file():
            return f"{directory / name} is missing"
        if sha256(directory / name) != digest:
            return f"{directory / name} has changed"
    return None


def prepare(directory: str | Path, settings: Settings, force: bool = False) -> bool:
    """Write model/, train.parquet, test.parquet and their manifest to `directory`, unless it contains them already.

    Returns:
        True if the files were written, False if existing ones are used again.

    Raises:
        ValueError: a number of rows is below 1, or there are too few words of the requested lengths.
        OSError: the files cannot be written.
    """
    for name in ("train_rows", "test_rows"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(settings, name)}: must be at least 1")
    directory = Path(directory)
    reason = "--force" if force else why_not_reusable(directory, settings)
    if reason is None:
        print(f"{directory}: using the model and the data prepared earlier")
        return False
    print(f"{directory}: preparing the model and the data ({reason})", flush=True)
    model_directory = directory / "model"
    model_directory.mkdir(parents=True, exist_ok=True)
    # Files without a manifest are not used again, so an interrupted preparation starts over.
    (directory / MANIFEST).unlink(missing_ok=True)
    words = write_data(directory, settings)
    write_model(model_directory, words, settings)
    written = [directory / "train.parquet", directory / "test.parquet", *sorted(model_directory.iterdir())]
    for path in written:
        fsync_path(path)
    files = {str(path.relative_to(directory)): sha256(path) for path in written}
    atomic_write_text(
        directory / MANIFEST, json.dumps({"made_with": fingerprint(settings), "files": files}, indent=2) + "\n"
    )
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), metavar="DIR")
    parser.add_argument("--force", action="store_true", help="write the files again")
    for name, value in asdict(Settings()).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, metavar=str(value))
    given = vars(parser.parse_args(arguments))
    output, force = given.pop("output"), given.pop("force")
    # OpenMP reads this variable when torch is first imported. On cores shared with other programs, idle threads that
    # spin make a step 30 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        prepare(output, Settings(**given), force)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare.py: {error}")


if __name__ == "__main__":
    main()
