"""The update loop of actor and critic: order of the steps, names and means of the metrics."""

from types import SimpleNamespace

import pytest

from verl.workers.update_loop import loss_denominators, run_updates


def test_each_mini_batch_takes_one_step_per_epoch_and_metrics_are_averaged():
    calls = []

    def optimizer_step():
        calls.append("step")
        return {"grad_norm": float(len(calls)), "lr": 0.5}

    def forward_backward(epoch, number, mini_batch):
        calls.append((epoch, number, mini_batch))
        return {"critic/x": float(epoch), "loss": 2.0, "padding_fraction": 0.25}

    engine = SimpleNamespace(optimizer_step=optimizer_step, schedule_step=lambda: calls.append("schedule"))
    metrics = run_updates(engine, ["a", "b"], forward_backward, epochs=2, prefix="critic", loss_name="critic/vf_loss")
    assert calls == [(0, 0, "a"), "step", (0, 1, "b"), "step", (1, 0, "a"), "step", (1, 1, "b"), "step", "schedule"]
    assert list(metrics) == [
        "critic/x",
        "critic/vf_loss",
        "critic/perf/padding_fraction",
        "critic/grad_norm",
        "critic/lr",
    ]
    assert metrics == pytest.approx(
        {
            "critic/x": 0.5,
            "critic/vf_loss": 2.0,
            "critic/perf/padding_fraction": 0.25,
            "critic/grad_norm": (2 + 4 + 6 + 8) / 4,
            "critic/lr": 0.5,
        }
    )


def test_a_metric_that_some_steps_lack_is_averaged_over_the_others():
    returned = iter([{"x": 1.0}, {"y": 3.0}, {"x": 2.0}])
    engine = SimpleNamespace(optimizer_step=lambda: {"grad_norm": 1.0, "lr": 0.5}, schedule_step=lambda: None)
    metrics = run_updates(
        engine,
        ["a", "b", "c"],
        lambda *_: next(returned) | {"loss": 2.0, "padding_fraction": 0.25},
        epochs=1,
        prefix="actor",
        loss_name="actor/loss",
    )
    assert (metrics["x"], metrics["y"], metrics["actor/loss"]) == (1.5, 3.0, 2.0)


def test_loss_denominators_are_those_of_the_meta_info():
    counts = {"batch_num_tokens": 30, "global_batch_size": 4, "loss_scale_factor": 7}
    assert loss_denominators({**counts, "temperature": 1.0}) == {"dp_size": 1, **counts}
