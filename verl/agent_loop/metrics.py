"""Numbers of one step about turns and tools."""

from __future__ import annotations

from collections.abc import Sequence

from verl.protocol import DataProto

# What can go wrong with a call; `dropped` calls are those beyond `max_parallel_calls`.
FAILURES = ("malformed", "unknown_tool", "wrong_arguments", "raised", "timed_out", "dropped", "release")


def compute_agent_metrics(batch: DataProto) -> dict[str, float]:
    """Turns of the samples; and, where an agent loop reports them, their tool calls.

    Args:
        batch: object column num_turns; tool_call_counts, tool_seconds, tool_failures where tools were there.

    Returns:
        num_turns/{min,max,mean} (messages exchanged, the prompt included). With tools, over the samples that could use
        some: tool_call_counts/{min,max,mean}; agent_loop/tool_calls/{min,max,mean}, seconds a sample waited for tools;
        agent_loop/tool_failures/KIND, calls of the step that failed, for each of `FAILURES`.
    """
    columns = batch.non_tensor_batch
    metrics = _summary(columns["num_turns"], "num_turns") if "num_turns" in columns else {}
    if "tool_call_counts" not in columns:
        return metrics
    failures = [found for found in columns["tool_failures"] if found is not None]
    return {
        **metrics,
        **_summary(columns["tool_call_counts"], "tool_call_counts"),
        **_summary(columns["tool_seconds"], "agent_loop/tool_calls"),
        **{f"agent_loop/tool_failures/{kind}": sum(found.get(kind, 0) for found in failures) for kind in FAILURES},
    }


def _summary(values: Sequence[float | None], name: str) -> dict[str, float]:
    known = [float(value) for value in values if value is not None]
    if not known:
        return {}
    return {f"{name}/min": min(known), f"{name}/max": max(known), f"{name}/mean": sum(known) / len(known)}
