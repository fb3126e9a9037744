"""`verl describe --budget` from the options to the files."""

import json

import pytest

from fixtures.data_files import parquet, row
from fixtures.tiny import write_tiny_model
from verl.cli.entry import main
from verl.config import RolloutConfig
from verl.precision.command import parse_budget
from verl.preflight import check
from verl.utils.quantization.ascend_description import build_description, load_description
from verl.workers.rollout.quantization import get_scheme

SLOW = pytest.mark.slow


@pytest.fixture(scope="module", params=["qwen3", pytest.param("qwen3_moe", marks=SLOW)])
def model_dir(request, tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), kind=request.param, dtype="bfloat16")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), dtype="bfloat16")


@pytest.fixture
def describe(dense, tmp_path, capsys):
    """Return a function that runs the command and returns its exit status, output and errors."""

    def run(*options, model=dense):
        output = [] if "-o" in options else ["-o", str(tmp_path / "layers.json")]
        status = main(["describe", str(model), *map(str, options), *output])
        return status, *capsys.readouterr()

    return run


def quantized(description):
    return {layer.name: layer.scheme for layer in description.layers if layer.quantized}


def test_written_file_is_within_the_budget_and_gives_the_engine_its_layers(model_dir, describe, tmp_path):
    file, picture = tmp_path / "layers.json", tmp_path / "curve.png"
    status, printed, errors = describe(
        "--budget", "kl=0.002", "--tokens", "200", "--device", "cpu", "--picture", picture, model=model_dir
    )
    assert status == 0, errors
    chosen = quantized(load_description(file, model_dir))
    assert 0 < len(chosen) < len(quantized(build_description(model_dir)))
    for layer in range(2):
        for together in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            names = [name for name in chosen if f"layers.{layer}." in name and name.endswith(together)]
            in_model = [n for n in quantized(build_description(model_dir)) if f"layers.{layer}." in n]
            assert len(names) in (0, sum(name.endswith(together) for name in in_model))
    # The engine takes its layers from here.
    rollout = RolloutConfig(quantization="ascend", quantization_config_file=str(file), tensor_model_parallel_size=1)
    scheme = get_scheme(rollout, str(model_dir))
    scheme.format.validate("cpu", installed=False)
    assert set(scheme.quantized_names()) == {f"{name}.weight" for name in chosen}
    [line] = [line for line in printed.splitlines() if line.startswith("KL divergence of the chosen plan: ")]
    measured, predicted = float(line.split()[6]), float(line.split()[11])
    assert 0 < measured <= 0.002 and abs(predicted / measured - 1) < 0.5, line
    assert "<- chosen" in printed and "left out by the budget" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@SLOW
def test_preflight_accepts_the_file(run_files, dense, describe, tmp_path):
    file = tmp_path / "layers.json"
    assert describe("--budget", "kl=0.002", "--tokens", "100")[0] == 0
    from fixtures.run_files import with_overrides

    rollout = "actor_rollout_ref__rollout__"
    changes = {f"{rollout}quantization": "ascend", f"{rollout}quantization_config_file": file}
    changes |= {"actor_rollout_ref__model__path": dense, f"{rollout}tensor_model_parallel_size": 1}
    plan = check(with_overrides(run_files.overrides(**changes)))
    number = len(quantized(load_description(file, dense)))
    assert any(f"{number} of 25 weights" in str(value) for value in vars(plan).values())


@SLOW
def test_layers_get_one_of_two_precisions(dense, describe, tmp_path):
    assert describe("--budget", "kl=0.01", "--tokens", "100", "--scheme", "W4A8_MXFP")[0] == 0
    assert set(quantized(load_description(tmp_path / "layers.json", dense)).values()) == {"W8A8_MXFP8", "W4A8_MXFP"}


@SLOW
def test_prompts_of_the_user(describe, tmp_path):
    file = parquet(tmp_path / "data.parquet", [row("a cat and a dog"), row("2 + 2")])
    status, printed, _ = describe("--budget", "kl=0.01", "--data", file)
    assert status == 0 and "24 tokens of 2 prompts" in printed


@SLOW
def test_budget_that_cannot_be_met(describe, tmp_path):
    status, _, errors = describe("--budget", "kl=1e-7", "--tokens", "100")
    assert status == 2 and not (tmp_path / "layers.json").exists()
    assert errors.startswith("--budget kl=1e-07: cannot be met: the least sensitive layers, model.layers.")
    smallest = errors.partition("the smallest budget that can be met is ")[2].partition(";")[0]
    assert describe("--budget", smallest, "--tokens", "100")[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entropy=1", "--budget entropy=1: unknown budget 'entropy'; must be kl=NUMBER, for example kl=0.01"),
        ("0.01", "unknown budget '0.01'"),
        ("kl", "--budget kl: must be a positive number"),
        ("kl=much", "--budget kl=much: must be a positive number"),
        ("kl=0", "--budget kl=0: must be a positive number"),
        ("kl=-0.1", "must be a positive number"),
        ("kl=nan", "must be a positive number"),
        ("kl=inf", "must be a positive number"),
    ],
)
def test_budget_of_another_form_is_rejected(text, message):
    with pytest.raises(ValueError) as caught:
        parse_budget(text)
    assert message in str(caught.value)
    assert parse_budget("kl=0.01") == 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens 0: must be 1 or more"),
        (["--bandwidth", "-1"], "--bandwidth -1: must be a positive number of GB/s"),
        (["--picture", "curve.svg"], "--picture curve.svg: only PNG is supported"),
        (["-o", "/missing/layers.json"], "--output /missing/layers.json: its directory does not exist"),
        (["--data", "/missing/data.parquet"], "--data: data file /missing/data.parquet does not exist"),
        (["--ignore", "nothing"], "ignore 'nothing': matches no layer"),
        (["--ignore", "re:.*_proj"], "no layer is left to quantize"),
    ],
)
def test_option_that_cannot_work_is_rejected(describe, options, message):
    status, _, errors = describe("--budget", "kl=0.01", *options)
    assert status == 2 and message in errors and errors.count("\n") == 1


def test_files_without_prompts_are_rejected(describe, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    errors = describe("--budget", "kl=0.01", "--data", empty)[2]
    assert f"--data: data file {empty} is empty" in errors and "without --data, short texts" in errors
    file = parquet(tmp_path / "data.parquet", [row("cat")])
    errors = describe("--budget", "kl=0.01", "--data", file, "--prompt-key", "question")[2]
    assert "has no column 'question'" in errors and "set --prompt-key to the column of the messages" in errors


def test_directory_without_weights_is_rejected(dense, describe, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text((dense / "config.json").read_text())
    status, _, errors = describe("--budget", "kl=0.01", model=tmp_path / "model")
    assert status == 2 and str(tmp_path / "model") in errors and "weights" in errors


def test_options_of_the_measurement_need_a_budget(describe, tmp_path):
    status, _, errors = describe("--prompt-key", "question")
    assert (
        status == 2 and errors == "--prompt-key has no effect without --budget; add --budget kl=NUMBER, or remove it\n"
    )
    assert not (tmp_path / "layers.json").exists()


def test_without_a_budget_every_layer_is_described(dense, describe, tmp_path):
    assert describe()[0] == 0
    written = json.loads((tmp_path / "layers.json").read_text())
    assert written == build_description(dense).to_json_dict()
