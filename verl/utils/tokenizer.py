"""Loading of a Hugging Face tokenizer, with checks that find problems before a run starts."""

import logging
import re
from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from verl.extension.paths import expand_user

logger = logging.getLogger(__name__)

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def hf_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or of a Hugging Face model id, with a padding token.

    A tokenizer without a padding token pads with its end-of-sequence token. Attention masks are built from lengths, so
    any valid id works.

    Args:
        path: a directory (`~` is expanded), or a model id such as "Qwen/Qwen3-0.6B".
        trust_remote_code: allow running Python files of the model; there is no prompt on the terminal.

    Raises:
        FileNotFoundError: `path` is not a directory and cannot be a model id.
        ValueError: the tokenizer does not load, has an empty vocabulary, or has neither a pad nor an eos token.
    """
    directory = expand_user(path)
    local = directory.is_dir()
    if not local and (directory.exists() or not _MODEL_ID.fullmatch(str(path))):
        problem = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(
            f"model path {str(path)!r} {problem}: set it to a model directory or a Hugging Face model id"
        )
    name = str(directory) if local else str(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises Exception itself for a damaged tokenizer.json
        raise ValueError(_load_failure(name, local, error)) from error
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise ValueError(
            f"model path {name!r}: the tokenizer's vocabulary is empty, so its files (tokenizer.json, or vocab.json "
            "and merges.txt, or tokenizer.model) are missing; copy them into the directory of the weights"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"model path {name!r}: the tokenizer has neither a pad_token nor an eos_token; "
                "set one of them in tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("the tokenizer of %s has no pad token; padding with its eos token %r", name, tokenizer.eos_token)
    return tokenizer


def hf_processor(path: str | Path, trust_remote_code: bool = False) -> ProcessorMixin | None:
    """Load the processor of a multi-modal model; return None for a model of text only, or if it does not load.

    Args:
        path: a directory (`~` is expanded), or a model id.
        trust_remote_code: allow running Python files of the model.
    """
    directory = expand_user(path)
    try:
        processor = AutoProcessor.from_pretrained(
            str(directory) if directory.is_dir() else str(path), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        logger.info("%s has no processor (%s)", path, error)
        return None
    # transformers returns the tokenizer of a model of text only.
    return processor if isinstance(processor, ProcessorMixin) else None


def _load_failure(name: str, local: bool, error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    cause = f"{type(error).__name__}: {first_line}"
    if "trust_remote_code" in str(error):
        return (
            f"model path {name!r}: its tokenizer is Python code in the model directory. If you trust it, set "
            "data.trust_remote_code=True and actor_rollout_ref.model.trust_remote_code=True"
        )
    if local:
        return (
            f"model path {name!r}: the tokenizer does not load ({cause}); check that tokenizer.json and "
            "tokenizer_config.json exist and are complete"
        )
    return (
        f"model path {name!r} is not a directory on this machine, and its tokenizer cannot be downloaded as a model id "
        f"({cause})"
    )
