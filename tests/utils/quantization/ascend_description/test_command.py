"""The command line under the name of the package."""

import json
import re
import subprocess
import sys

from verl.utils.quantization.ascend_description import build_description
from verl.utils.quantization.ascend_description.command import main


def test_module_prints_the_table_and_writes_the_json(model_dir, tmp_path):
    output = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "verl.utils.quantization.ascend_description",
        str(model_dir("Qwen3-0.6B")),
        "--tp",
        "2",
    ]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, check=True)
    expected = build_description(model_dir("Qwen3-0.6B"), tp_size=2)
    assert json.loads(output.read_text()) == expected.to_json_dict()
    row = r"model.layers.\*.mlp.down_proj +28 +1024 x 3072 +BF16 +row +168.0 MiB +86.6 MiB +MXFP8"
    assert re.search(row, done.stdout), done.stdout
    assert "In MXFP8: 196 of 311 weights, tensor-parallel size 2" in done.stdout


def test_errors_are_one_line_on_stderr(dense, tmp_path, capsys):
    assert main([str(dense), "--ignore", "nothing", "-o", str(tmp_path / "out.json")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ignore 'nothing': matches no layer") and captured.err.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_scheme_of_the_quantized_layers(dense, tmp_path, capsys):
    output = tmp_path / "out.json"
    assert main([str(dense), "--scheme", "W4A8_MXFP", "-o", str(output)]) == 0
    assert json.loads(output.read_text()) == build_description(dense, scheme="W4A8_MXFP").to_json_dict()
    printed = capsys.readouterr().out
    # 64 x 128 weights in two layers: half a byte each and one scale byte for 32
    assert re.search(r"mlp.down_proj +2 +64 x 128 +BF16 +row +32.0 KiB +8.5 KiB +MXFP4", printed), printed
    assert "In MXFP4: 14 of" in printed
