"""What a checked config amounts to, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from verl.preflight.device_memory import DeviceMemory
from verl.preflight.estimate import MemoryEstimate


@dataclass(frozen=True)
class PromptLengths:
    """Tokens of a sample of the training prompts.

    Attributes:
        measured: prompts.
        median, longest: tokens.
        over: how many are longer than data.max_prompt_length.
    """

    measured: int
    median: int
    longest: int
    over: int

    def text(self) -> str:
        """In one line."""
        return f"median {self.median:,}, longest {self.longest:,} tokens, of {self.measured:,} that were measured"


@dataclass
class CriticPlan:
    """The critic's part.

    Attributes:
        parameters: of its model; None where its files do not tell.
        compute_dtype, master_dtype: torch dtype names.
        optimizer_steps_per_step: mini-batches times `ppo_epochs`.
        samples_per_mini_batch: over all ranks; `samples_per_rank` the share of one.
    """

    parameters: int | None
    compute_dtype: str
    master_dtype: str
    optimizer_steps_per_step: int
    samples_per_mini_batch: int
    samples_per_rank: int

    def rows(self) -> list[tuple[str, str]]:
        size = "of unknown size" if self.parameters is None else f"{_millions(self.parameters)} parameters"
        return [
            ("critic", f"{size}, in {self.compute_dtype}; master weights {self.master_dtype}"),
            (
                "",
                f"{_count(self.optimizer_steps_per_step)} optimizer steps a step, of "
                f"{_count(self.samples_per_mini_batch)} samples, {_count(self.samples_per_rank)} on each rank",
            ),
        ]


@dataclass
class Plan:
    """Derived from a config, the model, the data and the machine; the run uses `device` and the dtypes.

    Attributes:
        device: `cpu`, `cuda` or `npu`.
        compute_dtype, rollout_dtype: torch dtype names that trainer and engine compute in; `*_why` the reason.
        rollout_weights: how the engine holds quantized weights; None where it holds them as they are sent.
        master_dtype: of the weights that the optimizer changes.
        prompts_per_step, samples_per_step: of one training step.
        optimizer_steps_per_step: mini-batches times `ppo_epochs`.
        samples_per_mini_batch: over all ranks; `samples_per_rank` the share of one.
        micro_batches_per_rank: in one mini-batch; None where a token budget decides.
        micro_batch_tokens: that budget, or None.
        prompt_tokens, response_tokens: caps.
        train_prompts, val_prompts: rows, before overlong prompts are dropped.
        steps_per_epoch, total_steps: training steps; None where a dataset class of the user's decides.
        trainer_ranks, replicas, tensor_parallel, reward_workers: processes.
        trainer_nodes: of the trainer; replica_nodes: of the replicas alone, 0 where they are on the trainer's.
        transport: how weights get to the replicas, as `resolve_backend` says.
        parameters: of the model; None where its files do not tell.
        critic: the critic's part; None without one.
        update_bytes, update_buckets: what a whole weight update moves, at least; None likewise.
        full_update_reason: why no update sends only what changed; None where updates do, after the first.
        memory: estimate for the host.
        available_bytes: host memory that is free now, or None.
        checkpoints, logs: where they go.
        warnings, notes: see `Findings`.
        hardware: that the run is planned for, where it does not start here; device_memory: an estimate for its devices.
        prompt_lengths: of a sample of the training prompts, where they were measured.
    """

    device: str
    compute_dtype: str
    compute_why: str
    rollout_dtype: str
    rollout_why: str
    rollout_weights: str | None
    master_dtype: str
    prompts_per_step: int
    samples_per_step: int
    optimizer_steps_per_step: int
    samples_per_mini_batch: int
    samples_per_rank: int
    micro_batches_per_rank: int | None
    micro_batch_tokens: int | None
    prompt_tokens: int
    response_tokens: int
    train_prompts: int | None
    val_prompts: int | None
    at_most: bool
    steps_per_epoch: int | None
    total_steps: int | None
    trainer_ranks: int
    replicas: int
    tensor_parallel: int
    reward_workers: int
    trainer_nodes: int
    replica_nodes: int
    transport: str
    parameters: int | None
    critic: CriticPlan | None
    update_bytes: int | None
    update_buckets: int | None
    full_update_reason: str | None
    memory: MemoryEstimate | None
    available_bytes: int | None
    checkpoints: str
    logs: str
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hardware: str | None = None
    device_memory: DeviceMemory | None = None
    prompt_lengths: PromptLengths | None = None

    def render(self) -> str:
        """An aligned table in plain text, warnings and notes below it."""
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        lines = ["plan", *(f"  {label:<{width}}  {text}" for label, text in rows)]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each line of the table; a line that goes on has no label."""
        where = [("checkpoints", self.checkpoints), ("logs", self.logs)]
        return [*self._batch_rows(), *self._machine_rows(), *self._device_rows(), *where]

    def _device_rows(self) -> list[tuple[str, str]]:
        memory = self.device_memory
        if memory is None:
            return []
        rows = []
        for stage in memory.stages:
            parts = ", ".join(f"{name} {part / 1e9:.1f}" for name, part in stage.parts.items() if part >= 5e7)
            label = "" if rows else "device memory"
            rows.append((label, f"{stage.name}: {stage.total / 1e9:.1f} of {memory.capacity / 1e9:.0f} GB ({parts})"))
        cache = f"{max(0, memory.cache_bytes) / 1e9:.1f} GB on a device, {_count(memory.cache_tokens)} tokens a replica"
        return [*rows, ("engine's cache", cache)]

    def _batch_rows(self) -> list[tuple[str, str]]:
        micro = (
            f"filled up to {_count(self.micro_batch_tokens)} tokens"
            if self.micro_batch_tokens is not None
            else f"{_count(self.micro_batches_per_rank)} for each mini-batch"
        )
        most = "at most " if self.at_most else ""
        unknown = "decided by the dataset class, or by data that is not here"
        steps = unknown if self.total_steps is None else f"{_count(self.total_steps)}{self._per_epoch(most)}"
        prompts = unknown
        if self.train_prompts is not None or self.val_prompts is not None:
            prompts = f"{most}{_count(self.train_prompts)} to train on, {most}{_count(self.val_prompts)} to validate on"
        return [
            ("prompts a step", _count(self.prompts_per_step)),
            ("samples a step", _count(self.samples_per_step)),
            ("optimizer steps a step", _count(self.optimizer_steps_per_step)),
            (
                "samples a mini-batch",
                f"{_count(self.samples_per_mini_batch)}, {_count(self.samples_per_rank)} on each rank",
            ),
            ("micro-batches a rank", micro),
            ("token caps", f"{_count(self.prompt_tokens)} prompt + {_count(self.response_tokens)} response"),
            ("prompts", prompts),
            ("training steps", steps),
        ] + ([] if self.prompt_lengths is None else [("prompt lengths", self.prompt_lengths.text())])

    def _per_epoch(self, most: str) -> str:
        if self.steps_per_epoch is None or self.train_prompts is None:
            return ""
        over = self.train_prompts - self.steps_per_epoch * self.prompts_per_step
        left_out = f", which leaves {_count(over)} prompts out" if over and not most else ""
        return f" ({most}{_count(self.steps_per_epoch)} an epoch{left_out})"

    def _node_rows(self) -> list[tuple[str, str]]:
        """Where there are several."""
        if self.trainer_nodes + self.replica_nodes == 1:
            return []
        replicas = f"{self.replica_nodes} of the replicas" if self.replica_nodes else "replicas on the same"
        return [("nodes", f"{self.trainer_nodes} of the trainer, {replicas}; weights by {self.transport}")]

    def _machine_rows(self) -> list[tuple[str, str]]:
        replicas = f"{self.replicas} replica(s) x {self.tensor_parallel} tensor parallel"
        rows = [
            ("device", self.device if self.hardware is None else f"{self.device}, planned for {self.hardware}"),
            ("processes", f"{self.trainer_ranks} trainer rank(s), {replicas}, {self.reward_workers} for rewards"),
            *self._node_rows(),
            ("parameters", "unknown" if self.parameters is None else _millions(self.parameters)),
            ("trainer computes in", f"{self.compute_dtype} ({self.compute_why}); master weights {self.master_dtype}"),
            ("engine computes in", f"{self.rollout_dtype} ({self.rollout_why})"),
        ]
        if self.critic is not None:
            rows += self.critic.rows()
        if self.rollout_weights is not None:
            rows.append(("engine's weights", self.rollout_weights))
        if self.update_bytes is not None:
            then = "then what changed" if self.full_update_reason is None else f"always ({self.full_update_reason})"
            rows.append(("weight update", f"{size(self.update_bytes)} in {self.update_buckets} bucket(s), {then}"))
        if self.memory is not None:
            free = "" if self.available_bytes is None else f", {size(self.available_bytes)} available"
            of_a_node = " on the driver's node" if self._node_rows() else ""
            rows.append(("host memory", f"about {size(self.memory.total_bytes)}{of_a_node}{free}"))
            rows += [("", f"{name}: {text}") for name, text in self.memory.parts()]
        return rows


def size(nbytes: int) -> str:
    """Bytes as GiB, or MiB below one."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _millions(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"
