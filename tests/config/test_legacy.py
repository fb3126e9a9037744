from verl.config.legacy import migrate


def test_keys_of_a_critic_in_earlier_versions_are_migrated():
    old = {
        "critic": {
            "grad_clip": 0.5,
            "model": {"path": "/m", "fsdp_config": {"param_offload": False}},
            "optim": {"warmup_style": "cosine"},
        }
    }
    assert migrate(old) == {
        "critic": {
            "model": {"path": "/m"},
            "optim": {"lr_scheduler_type": "cosine", "clip_grad": 0.5},
            "fsdp": {"param_offload": False},
        }
    }
