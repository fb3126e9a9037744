"""Updates an MXFP8 engine through vLLM's own weight-transfer API, without verl's trainer: see README.md."""

import argparse
from collections.abc import Iterator, Mapping

import torch
from safetensors import safe_open
from vllm import LLM, SamplingParams

from verl.config import RolloutConfig
from verl.utils.quantization.schemes import weight_format
from verl.workers.weight_sync.sender import WeightSender


def start_engine(model: str, dtype: str) -> LLM:
    """Start an MXFP8 engine with random weights, emulated on a CPU."""
    rollout = RolloutConfig(quantization="ascend", tensor_model_parallel_size=1)
    llm = LLM(
        model,
        dtype=dtype,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=64 << 20,
        weight_transfer_config={"backend": "verl"},
        **weight_format(rollout, model).engine_overrides("cpu"),
    )
    # The client sends plain weights, and the engine quantizes them.
    llm.init_weight_transfer_engine({"init_info": {"quantization": "ascend", "quantization_side": "receiver"}})
    return llm


def checkpoint(directory: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors of a checkpoint in one file."""
    with safe_open(f"{directory}/model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dictionary)
            yield name, file.get_tensor(name)


def update(llm: LLM, sender: WeightSender, version: int, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Send one full update. An exception means that it was refused: the engine serves nothing until one succeeds."""
    llm.start_weight_update()
    sender.begin(version, weights)
    message: Mapping = {"last": False}
    while not message["last"]:
        message = sender.next_bucket()
        llm.update_weights({"update_info": {"bucket": message}})
    llm.update_weights({"update_info": {"manifest": sender.manifest()}})
    llm.finish_weight_update(weight_version=str(version))
    llm.reset_prefix_cache()  # its keys and values are those of the old weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face directory that the engine is built from")
    parser.add_argument("checkpoint", help="directory with the weights to send, in model.safetensors")
    parser.add_argument("--dtype", default="bfloat16", help="dtype in which the engine computes")
    options = parser.parse_args()
    llm, sender = start_engine(options.model, options.dtype), WeightSender(bucket_bytes=64 << 20)
    update(llm, sender, 1, checkpoint(options.checkpoint))
    for output in llm.generate(["2+3="], SamplingParams(temperature=0.0, max_tokens=8)):
        print(f"generated: {output.outputs[0].text!r}")
    for name, digest in llm.collective_rpc("compute_weight_checksums")[0].items():
        print(f"{digest}  {name}")


if __name__ == "__main__":
    main()
