"""Fixtures that load Python files of the examples as modules and run shell scripts without training."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def load_example():
    """`load_example("quickstart/prepare.py")` loads that script as a module."""

    def load(name: str) -> ModuleType:
        path = EXAMPLES / name
        spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def overrides_of(tmp_path):
    """`overrides_of(script, *arguments, **environment)`: the overrides that the script passes to main_ppo.

    main_ppo does not run: the first `python3` on the PATH only records its arguments.
    """
    caught, fake = tmp_path / "arguments", tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\nif [ "$2" = verl.trainer.main_ppo ]; then\n'
        f'shift 2; printf "%s\\0" "$@" > {shlex.quote(str(caught))}; fi\n'
    )
    fake.chmod(0o755)

    def run(script: Path, *arguments: str, **environment: str) -> list[str]:
        caught.unlink(missing_ok=True)
        full = {**os.environ, **environment, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
        subprocess.run([script, *arguments], env=full, cwd=tmp_path, check=True, timeout=30, capture_output=True)
        return caught.read_text().removesuffix("\0").split("\0")

    return run
