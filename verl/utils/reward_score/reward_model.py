"""Scores of a discriminative reward model: a sequence classifier with one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp
    from transformers import PreTrainedTokenizerBase


class RewardModelScorer:
    """Scores a response by the value of the reward model's head at the last token, without an activation.

    The model reads the conversation in its own chat template: the messages of the prompt, then the response.

    Args:
        address: address of vLLM's server of the model, `host:port`.
        model: name of the model at the server.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, address: str, model: str, tokenizer: PreTrainedTokenizerBase):
        self._url, self._model, self._tokenizer = f"http://{address}/classify", model, tokenizer
        self._session: aiohttp.ClientSession | None = None

    async def __call__(
        self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Any, raw_prompt: Any
    ) -> dict[str, float]:
        """Return the `score`.

        Raises:
            RuntimeError: the server refuses the request, for example because the conversation is too long.
        """
        import aiohttp

        if self._session is None:
            # The time limit of a sample is that of the caller, and it also limits the number of connections.
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0)
            )
        body = {
            "model": self._model,
            "input": self.token_ids(raw_prompt, solution_str),
            "use_activation": False,
        }
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"the reward model gave no score: HTTP {response.status}: {await response.text()}")
            values = (await response.json())["data"][0]["probs"]
        if len(values) != 1:
            raise RuntimeError(f"the reward model gave {len(values)} values, a score is one")
        return {"score": values[0]}

    def token_ids(self, raw_prompt: Sequence[Mapping[str, Any]], response: str) -> list[int]:
        """Return the tokens of the conversation: the messages of the prompt, and the response as the assistant's.

        Raises:
            ValueError: the row of the data has no messages.
        """
        if isinstance(raw_prompt, str) or not isinstance(raw_prompt, Sequence):
            raise ValueError(
                f"'raw_prompt' is a {type(raw_prompt).__name__}; a reward model that scores needs the messages of the "
                "prompt"
            )
        messages = [*map(dict, raw_prompt), {"role": "assistant", "content": response}]
        # The template writes the special tokens itself.
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
