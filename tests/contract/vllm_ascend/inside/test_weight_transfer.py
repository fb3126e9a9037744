"""Weight transfer of the release, by vLLM's layer-wise reload, into MXFP8 layers; and verl's backend on them."""

import json
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from contract.vllm_ascend import ranks
from contract.vllm_ascend.harness import RELEASE, build_model, engine
from contract.vllm_ascend.reference import assert_same, engine_parameters, parameters_of
from contract.vllm_ascend.updates import BUCKET, Updates, addresses, checkpoints, config_of, scheme_of, weights_of
from vllm.config import vllm as vllm_config_module
from vllm_ascend.quantization.methods import get_scheme_class

from fixtures.ranks import run_ranks
from verl.utils.vllm import npu_vllm_patch
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.sender import WeightSender

OLD = RELEASE in ("0.18.0", "0.23.0", "0.26.0rc1")
pytestmark = [
    pytest.mark.feature("transfer"),
    pytest.mark.skipif(OLD, reason="the release has no weight transfer, or one whose reload its worker runs"),
]
if OLD:
    hccl = npu_ipc = None
else:
    hccl_engine, npu_ipc_engine = (
        import_module(f"vllm_ascend.distributed.weight_transfer.{name}_engine") for name in ("hccl", "npu_ipc")
    )
    hccl, npu_ipc = hccl_engine.HCCLWeightTransferEngine, npu_ipc_engine.NPUIPCWeightTransferEngine
RELOADING = [hccl] if RELEASE == "0.28.0rc1" else [hccl, npu_ipc]
PROCESS = "process_weights_after_loading"


@pytest.fixture
def unpatched(monkeypatch):
    """Take verl's patch of the layers off."""
    for kind in ("linear", "moe"):
        scheme = get_scheme_class("W8A8_MXFP8", kind)
        monkeypatch.setattr(scheme, PROCESS, getattr(scheme, PROCESS).__wrapped__)


@pytest.fixture
def transfer(monkeypatch):
    """`transfer(backend, model, config, encoded)`: an update by the release's engine, which receives `encoded`.

    Only the transport is replaced. As in vllm-ascend's worker, no configuration is current meanwhile.
    """

    def transfer(backend, model, config, encoded):
        tensors = list(encoded)

        def broadcast(post_unpack_func, **_):
            for pair in tensors:
                post_unpack_func([pair])

        with monkeypatch.context() as patch:
            patch.setattr(vllm_config_module, "_current_vllm_config", None)
            patch.setattr(hccl_engine, "packed_broadcast_consumer", broadcast)
            patch.setattr(npu_ipc_engine, "packed_npu_ipc_consumer", lambda **_: tensors)
            patch.setattr(npu_ipc_engine, "npu_generate_uuid", lambda: "npu")
            target = backend(config.weight_transfer_config, config, torch.device("cpu"), model)
            target.model_update_group, target.packed = object(), True
            target.start_weight_update()
            target.receive_weights(INFO)
            target.finish_weight_update()

    return transfer


# The fields that the transport would use.
INFO = SimpleNamespace(
    packed=True,
    packed_buffer_size_bytes=0,
    packed_num_buffers=0,
    names=[],
    shapes=[],
    dtype_names=[],
    tensor_sizes=[],
    ipc_handles={},
)


def only(kept, directory):
    """Write a description file that leaves all layers but those with the name `kept` unquantized."""
    file = directory / "ignore.json"
    file.write_text(json.dumps({"ignore": [rf"re:.*\.(?!{kept})[a-z0-9_]*_proj"]}))
    return {"quantization_config_file": str(file)}


@pytest.mark.parametrize("heads", [4, 2], ids=["64 x 128", "64 x 64"])
def test_release_without_the_patch_fails_or_is_silently_wrong(tmp_path, unpatched, transfer, heads):
    first, second = checkpoints(tmp_path, "qwen3", 2, num_attention_heads=heads)
    kept = only("o_proj", tmp_path)
    config, scheme = config_of(first, **kept), scheme_of(first, **kept)
    with engine(config):
        model = build_model(config)
        encoded = list(scheme.encode(weights_of(second).items()))
        if heads == 4:
            with pytest.raises(RuntimeError, match="size"):
                transfer(hccl, model, config, encoded)
            return
        transfer(hccl, model, config, encoded)
        left_out = ("qkv_proj", "gate_up_proj", "down_proj")
        with pytest.raises(AssertionError, match=r"o_proj\.weight: \d+ of \d+ differ"):
            assert_same(parameters_of(model), engine_parameters(weights_of(second), left_out=left_out))


def test_release_without_the_patch_has_no_configuration(tmp_path, transfer, monkeypatch):
    """Its quantization reads vLLM's configuration, which its worker does not set."""
    monkeypatch.setattr(hccl, "finish_weight_update", hccl.finish_weight_update.__wrapped__)
    first, second = checkpoints(tmp_path, "qwen3", 2)
    config, scheme = config_of(first), scheme_of(first)
    with engine(config):
        model = build_model(config)
        with pytest.raises(AssertionError, match="Current vLLM config is not set"):
            transfer(hccl, model, config, scheme.encode(weights_of(second).items()))


CASES = {
    "dense": ("qwen3", {}),
    "square": ("qwen3", {"num_attention_heads": 2}),
    "odd groups": ("qwen3", {"hidden_size": 96, "intermediate_size": 160}),
    "partial groups": ("qwen3", {"hidden_size": 80, "intermediate_size": 4304}),
    "experts": ("qwen3_moe", {"moe_intermediate_size": 128}),
}


@pytest.mark.parametrize("backend", RELOADING, ids=["hccl", "npu_ipc"][: len(RELOADING)])
@pytest.mark.parametrize(("kind", "sizes"), CASES.values(), ids=CASES)
def test_every_transfer_writes_the_expected_bytes_at_the_same_addresses(tmp_path, transfer, kind, sizes, backend):
    first, *others = checkpoints(tmp_path, kind, 3, **sizes)
    config, scheme = config_of(first), scheme_of(first)
    with engine(config):
        model = build_model(config)
        before = addresses(model)
        for source in [*others, first, others[0]]:
            transfer(backend, model, config, scheme.encode(weights_of(source).items()))
            assert_same(parameters_of(model), engine_parameters(weights_of(source)))
            assert addresses(model) == before


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("qwen3", {"intermediate_size": 96}), ("qwen3_moe", {"moe_intermediate_size": 128})],
    ids=["padded shares", "experts"],
)
def test_each_of_two_ranks_gets_its_share(tmp_path, kind, sizes):
    run_ranks(2, ranks.transfer, 2, checkpoints(tmp_path, kind, 3, hidden_size=128, **sizes))


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_transfers_and_updates_of_verl_may_alternate(tmp_path, transfer, kind):
    first, *others = checkpoints(tmp_path, kind, 4)
    config, scheme = config_of(first), scheme_of(first)
    with engine(config):
        model = build_model(config)
        updates, before = Updates(model, config, scheme), addresses(model)
        for source, official in zip([*others, first], [True, False, True, False], strict=True):
            if official:
                transfer(hccl, model, config, scheme.encode(weights_of(source).items()))
            else:
                updates.send(weights_of(source))
            assert_same(parameters_of(model), engine_parameters(weights_of(source)))
            assert addresses(model) == before


O_PROJ, V_PROJ = "model.layers.1.self_attn.o_proj.weight", "model.layers.0.self_attn.v_proj.weight"
FAULTS = {
    "plain weights": (lambda weights, encoded: weights, r"weight: received torch\.bfloat16, expected .*float8_e4m3fn"),
    "no scales": (
        lambda weights, encoded: {name: t for name, t in encoded.items() if name != f"{O_PROJ}_scale"},
        r"o_proj\.weight_scale: received nothing, expected torch\.uint8",
    ),
    "a missing projection": (
        lambda weights, encoded: {name: t for name, t in encoded.items() if not name.startswith(V_PROJ)},
        r"qkv_proj: received \d+ of \d+ elements",
    ),
}


@pytest.mark.parametrize("choose", FAULTS)
def test_incomplete_or_plain_weights_are_refused_and_the_next_update_of_verl_succeeds(tmp_path, transfer, choose):
    """Without the patch's check, memory that nobody has written would become the scales."""
    first, second = checkpoints(tmp_path, "qwen3", 2)
    config, scheme = config_of(first), scheme_of(first)
    weights = weights_of(second)
    change, message = FAULTS[choose]
    with engine(config):
        model = build_model(config)
        before = addresses(model)
        with pytest.raises(ValueError, match=message):
            transfer(hccl, model, config, change(weights, dict(scheme.encode(weights.items()))).items())
        Updates(model, config, scheme).send(weights)
        assert_same(parameters_of(model), engine_parameters(weights))
        assert addresses(model) == before


REFUSED = [("W4A8_MXFP", hccl), ("W4A8_MXFP", npu_ipc)] + ([] if npu_ipc in RELOADING else [(None, npu_ipc)])


@pytest.mark.parametrize(("quantization_scheme", "backend"), REFUSED)
def test_layers_that_the_release_cannot_update_are_refused(tmp_path, transfer, quantization_scheme, backend):
    """npu_ipc of 0.28 loads into the kernel layout; of MXFP4 layers the reload keeps the mark, as of MXFP8 ones."""
    first, second = checkpoints(tmp_path, "qwen3", 2)
    rollout = {"quantization_scheme": quantization_scheme}
    config, scheme = config_of(first, **rollout), scheme_of(first, **rollout)
    with engine(config):
        model = build_model(config)
        before = parameters_of(model)
        with pytest.raises(NotImplementedError, match=rf"{backend.__name__} .* does not update.*backend=\"verl\""):
            transfer(backend, model, config, scheme.encode(weights_of(second).items()))
        assert_same(parameters_of(model), before)


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_backend_of_verl_updates_the_layers_of_the_release(tmp_path, kind, side):
    from verl.workers.rollout.vllm_rollout.weight_transfer import VerlWeightTransferEngine

    first, second = checkpoints(tmp_path, kind, 2)
    config, scheme = config_of(first), scheme_of(first)
    with engine(config):
        model = build_model(config)
        target = VerlWeightTransferEngine(config.weight_transfer_config, config, torch.device("cpu"), model)
        target.init_transfer_engine(target.parse_init_info({"quantization": "ascend", "quantization_side": side}))
        before, sender = addresses(model), WeightSender(BUCKET)
        for version, source in enumerate([second, first, second]):
            weights = weights_of(source)
            target.start_weight_update()
            sender.begin(version, scheme.encode(weights.items()) if side == "sender" else weights.items())
            last = False
            while not last:
                bucket = sender.next_bucket()
                target.update_weights({"bucket": bucket})
                last = bucket["last"]
            with pytest.raises(WeightUpdateError, match="a weight update is in progress"):
                model(None, None)
            target.update_weights({"manifest": sender.manifest()})
            target.finish_weight_update()
            assert_same(parameters_of(model), engine_parameters(weights))
            assert addresses(model) == before


def test_patch_is_applied_once():
    linear = get_scheme_class("W8A8_MXFP8", "linear")
    assert getattr(linear, PROCESS)._verl_patched
    assert hccl.start_weight_update._verl_patched and npu_ipc.start_weight_update._verl_patched
    assert npu_vllm_patch.apply_patches() == []
