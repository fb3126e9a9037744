"""Output that no encoding and no closed reader stops."""

import io
import subprocess
import sys

import pytest

from verl.utils.console import write_line


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("utf-8", "é\\ud83d 中"), ("latin-1", "é\\ud83d \\u4e2d"), ("ascii", "\\xe9\\ud83d \\u4e2d")],
)
def test_characters_that_the_encoding_lacks_are_escaped(encoding, expected):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    write_line("é\ud83d 中", stream)
    assert raw.getvalue().decode(encoding) == expected + "\n"


CODE = """
import logging, sys
from verl.utils.console import escape_unencodable, write_line
logging.basicConfig()
escape_unencodable()
for i in range(3):
    write_line(f"{i} \\u4e2d")
sys.stdout.write("\\u4e2d\\n")
sys.exit(7)
"""


def test_a_process_without_utf8_and_without_a_reader_goes_on():
    command = [sys.executable, "-X", "utf8=0", "-c", CODE]
    done = subprocess.run(
        command, env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)}, capture_output=True
    )
    assert done.returncode == 7 and done.stdout.split() == [
        b"0",
        b"\\u4e2d",
        b"1",
        b"\\u4e2d",
        b"2",
        b"\\u4e2d",
        b"\\u4e2d",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", CODE], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 7 and done.stderr.count("the console accepts no more output") == 1, done.stderr
