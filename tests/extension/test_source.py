import ast
import gc

import pytest

from verl.extension.source import parse_python


class ParsesWhenCollected:
    """In a cycle, so that only the collector ends it, as it ends an asyncio task that failed."""

    def __init__(self):
        self.cycle = self

    def __del__(self):
        ast.parse("1 + 1")


def test_a_collection_does_not_parse_within_the_parser(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("value = [[[1 + 2 * x] for x in range(3)]]\n" * 100)
    thresholds = gc.get_threshold()
    try:
        gc.collect()
        gc.set_threshold(300)  # less than the parser makes, more than the test makes before it
        for _ in range(20):
            ParsesWhenCollected()
            assert len(parse_python(file).body) == 100
    finally:
        gc.set_threshold(*thresholds)
        gc.collect()
    assert gc.isenabled()


@pytest.mark.parametrize("source", ["(" * 5000 + ")" * 5000, "x = " + "-" * 200_000 + "1", "x" + ".x" * 100_000])
def test_source_nested_too_deeply_is_a_syntax_error(tmp_path, source):
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(SyntaxError, match="nested"):
        parse_python(tmp_path / "own.py")
