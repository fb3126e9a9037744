"""Metrics of one step about turns and tool calls."""

from __future__ import annotations

from collections.abc import Iterable

from verl.protocol import DataProto

# Kinds of failed calls; `dropped` calls exceed `max_parallel_calls`.
FAILURES = ("malformed", "unknown_tool", "wrong_arguments", "raised", "timed_out", "dropped", "release")


def compute_agent_metrics(batch: DataProto) -> dict[str, float]:
    """Return metrics of the turns, and of the tool calls if an agent loop reports them.

    Args:
        batch: object column num_turns; with tools also tool_call_counts, tool_seconds and tool_failures; with a loop
            that reports metrics also agent_loop_metrics.

    Returns:
        num_turns/{min,max,mean}: messages, the prompt included. With tools, over the samples whose loop supports tools:
        tool_call_counts/{min,max,mean}; agent_loop/tool_calls/{min,max,mean}: seconds that a sample waited for tools;
        agent_loop/tool_failures/KIND: failed calls of the step, for each of `FAILURES`. agent_loop/NAME/{min,max,mean}
        for each metric that a loop reports.
    """
    columns = batch.non_tensor_batch
    metrics = summary(columns["num_turns"], "num_turns") if "num_turns" in columns else {}
    reported = list(columns.get("agent_loop_metrics", ()))
    for name in dict.fromkeys(name for one in reported for name in one):
        metrics |= summary([one.get(name) for one in reported], f"agent_loop/{name}")
    if "tool_call_counts" not in columns:
        return metrics
    failures = [found for found in columns["tool_failures"] if found is not None]
    return {
        **metrics,
        **summary(columns["tool_call_counts"], "tool_call_counts"),
        **summary(columns["tool_seconds"], "agent_loop/tool_calls"),
        **{f"agent_loop/tool_failures/{kind}": sum(found.get(kind, 0) for found in failures) for kind in FAILURES},
    }


def summary(values: Iterable[float | None], name: str) -> dict[str, float]:
    """Return `NAME/{min,max,mean}` of the values that are not None; nothing if there is none."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return {}
    return {f"{name}/min": min(known), f"{name}/max": max(known), f"{name}/mean": sum(known) / len(known)}
