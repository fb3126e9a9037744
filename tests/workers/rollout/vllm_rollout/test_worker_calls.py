"""Reports of several workers of one replica."""

from verl.workers.rollout.vllm_rollout.worker_calls import merge_bucket_reports


def test_a_tensor_is_unused_if_no_worker_read_it():
    """As with expert parallelism: worker 0 holds expert 0, worker 1 expert 1, and both hold the gate in float32."""
    reports = [
        {"unused": ["expert.1", "o_proj.bias"], "dtypes": {"gate": "float32"}},
        {"unused": ["o_proj.bias", "expert.0"], "dtypes": {"gate": "float32"}},
    ]
    assert merge_bucket_reports(reports) == {"unused": ["o_proj.bias"], "dtypes": {"gate": "float32"}}
