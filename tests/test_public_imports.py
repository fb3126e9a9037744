"""`import verl` without torch, and the names of the top package."""

import subprocess
import sys

import pytest

import verl


def test_import_verl_imports_no_torch():
    code = (
        "import sys, verl; assert 'torch' not in sys.modules; from verl import DataProto; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dataproto_is_the_class_of_verl_protocol():
    from verl.protocol import DataProto

    assert verl.DataProto is DataProto
    with pytest.raises(AttributeError, match="no attribute 'Absent'"):
        _ = verl.Absent
