"""Text of ids, some of which the tokenizer lacks."""

import pytest

from fixtures.tiny import write_char_tokenizer
from verl.agent_loop.detokenize import decode
from verl.utils.tokenizer import hf_tokenizer


@pytest.mark.parametrize("error", [KeyError, IndexError, TypeError])
def test_ids_that_the_tokenizer_lacks_have_no_text(tmp_path, error):
    """A model with a padded vocabulary can sample such ids."""
    fast = hf_tokenizer(write_char_tokenizer(tmp_path))

    class InPython:
        """A tokenizer that raises for unknown ids, as those in Python do."""

        get_vocab = staticmethod(fast.get_vocab)

        def decode(self, ids, skip_special_tokens):
            if max(ids) >= len(fast):
                raise error(max(ids))
            return fast.decode(ids, skip_special_tokens=skip_special_tokens)

    ids = [2, *fast.encode("ab"), len(fast), 10**6, *fast.encode("c")]
    for tokenizer in (fast, InPython()):
        assert decode(tokenizer, ids, skip_special_tokens=True) == "abc"
        assert decode(tokenizer, ids, skip_special_tokens=False) == "</s>abc"


def test_other_errors_of_a_tokenizer_are_raised(tmp_path):
    class Broken:
        def get_vocab(self):
            return {"a": 1}

        def decode(self, ids, skip_special_tokens):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        decode(Broken(), [1], skip_special_tokens=True)
