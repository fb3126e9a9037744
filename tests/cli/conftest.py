"""A valid training script, and `verl check` in this process."""

import json

import pytest

from fixtures.script import Script
from verl.cli import main


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


@pytest.fixture
def check(capsys):
    """Return a function that runs `verl check ... --json` and returns the exit status and the JSON object."""

    def run(*arguments):
        status = main(["check", *map(str, arguments), "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run
