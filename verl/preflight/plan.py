"""The plan of a run: numbers derived from a checked config, and their table."""

from __future__ import annotations

from dataclasses import dataclass, field

from verl.preflight.device_memory import DeviceMemory
from verl.preflight.estimate import MemoryEstimate
from verl.utils.byte_size import GB, format_bytes, format_gb
from verl.utils.text import without_controls

# Smaller parts of a device's memory are left out of the table.
MIN_SHOWN_BYTES = 5e7
Row = tuple[str, str]


@dataclass(frozen=True)
class PromptLengths:
    """Lengths of a sample of the training prompts.

    Attributes:
        measured: number of prompts in the sample.
        median, longest: tokens.
        over: number of prompts that are longer than data.max_prompt_length.
    """

    measured: int
    median: int
    longest: int
    over: int

    def text(self) -> str:
        """Return the lengths as one line."""
        return f"median {self.median:,}, longest {self.longest:,} tokens in a sample of {self.measured:,} prompts"


@dataclass
class CriticPlan:
    """The critic's part of the plan.

    Attributes:
        parameters: number of parameters; None if the files do not give it.
        compute_dtype, master_dtype: torch dtype names.
        optimizer_steps_per_step: mini-batches of a training step times `ppo_epochs`.
        samples_per_mini_batch: over all ranks.
        samples_per_rank: one rank's share of a mini-batch, or that of the ranks that share sequences.
        sequence_parallel: ranks that share sequences.
    """

    parameters: int | None
    compute_dtype: str
    master_dtype: str
    optimizer_steps_per_step: int
    samples_per_mini_batch: int
    samples_per_rank: int
    sequence_parallel: int

    def rows(self) -> list[Row]:
        size = "unknown size" if self.parameters is None else f"{_format_parameters(self.parameters)} parameters"
        return [
            ("critic", f"{size}, computes in {self.compute_dtype}; master weights {self.master_dtype}"),
            (
                "",
                f"{_format_count(self.optimizer_steps_per_step)} optimizer steps per step, mini-batch of "
                f"{_format_count(self.samples_per_mini_batch)} samples, {_format_count(self.samples_per_rank)} on each "
                f"{_ranks_text(self.sequence_parallel)}",
            ),
        ]


@dataclass
class Plan:
    """Numbers derived from a config, the model, the data and the machine. The run uses `device` and the dtypes.

    Attributes:
        device: `cpu`, `cuda` or `npu`.
        compute_dtype, rollout_dtype: torch dtype names in which trainer and engine compute.
        compute_why, rollout_why: reasons for these dtypes.
        rollout_weights: the engine's format of quantized weights; None if weights are not quantized.
        weight_error: relative root mean square error of these weights; None if weights are not quantized.
        qat: mode of quantization-aware training; None without it.
        master_dtype: dtype of the weights that the optimizer updates.
        prompts_per_step, samples_per_step: of one training step.
        optimizer_steps_per_step: mini-batches of a training step times `ppo_epochs`.
        samples_per_mini_batch: over all ranks.
        samples_per_rank: one rank's share of a mini-batch, or that of the ranks that share samples.
        sequence_parallel: ranks that share the sequences of the actor.
        layer_parallel: ranks that share the layers of the actor.
        micro_batches_per_rank: number in one mini-batch; None if micro-batches have a token budget.
        micro_batch_tokens: this token budget, over the ranks that share a micro-batch, or None.
        prompt_tokens, response_tokens: upper limits.
        train_prompts, val_prompts: rows before overlong prompts are dropped; None if a dataset class decides.
        at_most: overlong prompts are dropped, so that the numbers of prompts and steps are upper bounds.
        steps_per_epoch, total_steps: training steps; None if a dataset class or a sampler decides.
        trainer_ranks, replicas, reward_workers: number of processes.
        tensor_parallel: devices of one replica.
        expert_parallel: devices of one replica that share its experts; 1: each has a slice of every expert.
        trainer_nodes: nodes of the trainer.
        replica_nodes: nodes that hold replicas only; 0 if the replicas are on the trainer's nodes.
        transport: transport of weights to the replicas, the result of `resolve_backend`.
        parameters: parameters of the model; None if its files do not give the number.
        critic: the critic's part; None without a critic.
        served: name and text of each model beside the policy that engines serve (teacher, reward model).
        update_bytes, update_buckets: minimum size of a full weight update; None if `parameters` is None.
        full_update_reason: reason why every update is full; None if updates after the first can be deltas.
        memory: estimate of the host's memory; None if `parameters` is None.
        available_bytes: free memory of the host; None if not known.
        checkpoints, logs: texts that give the directories of checkpoints and logs.
        warnings, notes: see `Findings`.
        hardware: name of the hardware that the run is planned for; None for this machine.
        device_memory: estimate for a device of this hardware, or None.
        prompt_lengths: lengths of a sample of the training prompts; None if not measured.
        resume: the checkpoint that the run resumes from, and the keys that differ from the run that wrote it.
    """

    device: str
    compute_dtype: str
    compute_why: str
    rollout_dtype: str
    rollout_why: str
    rollout_weights: str | None
    weight_error: float | None
    qat: str | None
    master_dtype: str
    prompts_per_step: int
    samples_per_step: int
    optimizer_steps_per_step: int
    samples_per_mini_batch: int
    samples_per_rank: int
    sequence_parallel: int
    layer_parallel: int
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
    expert_parallel: int
    reward_workers: int
    trainer_nodes: int
    replica_nodes: int
    transport: str
    parameters: int | None
    critic: CriticPlan | None
    served: list[Row]
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
    resume: list[str] = field(default_factory=list)

    @property
    def data_parallel(self) -> int:
        """Number of shards of a batch of the actor: the ranks, or groups of ranks that share samples."""
        return self.trainer_ranks // (self.sequence_parallel * self.layer_parallel)

    def render(self) -> str:
        """Return an aligned table in plain text, followed by notes and warnings; no text in it can steer a terminal."""
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        lines = ["plan", *(f"  {label:<{width}}  {text}" for label, text in rows)]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return without_controls("\n".join(lines))

    def rows(self) -> list[Row]:
        """Return label and text of each line of the table; the label is empty on continuation lines."""
        files = [("checkpoints", self.checkpoints), ("logs", self.logs)]
        resume = [("resumes" if number == 0 else "", line) for number, line in enumerate(self.resume)]
        return [*self._batch_rows(), *self._machine_rows(), *self._device_rows(), *files, *resume]

    def _batch_rows(self) -> list[Row]:
        each = _ranks_text(self.sequence_parallel, self.layer_parallel)
        if self.micro_batch_tokens is None:
            micro = f"{_format_count(self.micro_batches_per_rank)} per mini-batch on each {each}"
        else:
            of_group = f", on each {each}" if each != "rank" else ""
            micro = f"filled up to {_format_count(self.micro_batch_tokens)} tokens{of_group}"
        most = "at most " if self.at_most else ""
        unknown = "unknown: the dataset class or the sampler decides, or data files were not found"
        steps = unknown if self.total_steps is None else f"{_format_count(self.total_steps)}{self._epoch_text(most)}"
        prompts = unknown
        if self.train_prompts is not None or self.val_prompts is not None:
            train, val = _format_count(self.train_prompts), _format_count(self.val_prompts)
            prompts = f"{most}{train} for training, {most}{val} for validation"
        mini, share = _format_count(self.samples_per_mini_batch), _format_count(self.samples_per_rank)
        rows = [
            ("prompts per step", _format_count(self.prompts_per_step)),
            ("samples per step", _format_count(self.samples_per_step)),
            ("optimizer steps", f"{_format_count(self.optimizer_steps_per_step)} per step"),
            ("mini-batch", f"{mini} samples, {share} on each {each}"),
            ("micro-batches", micro),
            (
                "token limits",
                f"{_format_count(self.prompt_tokens)} prompt + {_format_count(self.response_tokens)} response",
            ),
            ("prompts", prompts),
            ("training steps", steps),
        ]
        return rows if self.prompt_lengths is None else [*rows, ("prompt lengths", self.prompt_lengths.text())]

    def _epoch_text(self, most: str) -> str:
        """Return the text in parentheses behind the number of training steps."""
        if self.steps_per_epoch is None or self.train_prompts is None:
            return ""
        unused = self.train_prompts - self.steps_per_epoch * self.prompts_per_step
        left_out = f", {_format_count(unused)} prompts left out" if unused and not most else ""
        return f" ({most}{_format_count(self.steps_per_epoch)} per epoch{left_out})"

    def _machine_rows(self) -> list[Row]:
        experts = f" and {self.expert_parallel} expert parallel" if self.expert_parallel > 1 else ""
        replicas = f"{self.replicas} replica(s) x {self.tensor_parallel} tensor parallel{experts}"
        rows = [
            ("device", self.device if self.hardware is None else f"{self.device}, planned for {self.hardware}"),
            ("processes", f"{self.trainer_ranks} trainer rank(s), {replicas}, {self.reward_workers} reward worker(s)"),
            *self._node_rows(),
            ("parameters", "unknown" if self.parameters is None else _format_parameters(self.parameters)),
            ("trainer computes in", f"{self.compute_dtype} ({self.compute_why}); master weights {self.master_dtype}"),
            ("engine computes in", f"{self.rollout_dtype} ({self.rollout_why})"),
        ]
        if self.critic is not None:
            rows += self.critic.rows()
        rows += self.served
        if self.rollout_weights is not None:
            rows.append(("engine's weights", self.rollout_weights))
        if self.qat is not None:
            rows.append(("quantization-aware", f"the trainer computes with the engine's numbers (mode: {self.qat})"))
        if self.update_bytes is not None:
            later = "later updates are deltas"
            if self.full_update_reason is not None:
                later = f"every update is full ({self.full_update_reason})"
            full = f"{format_bytes(self.update_bytes)} in {self.update_buckets} bucket(s)"
            rows.append(("weight update", f"{full}; {later}"))
        return rows + self._host_memory_rows()

    def _node_rows(self) -> list[Row]:
        """Return the line about nodes; a run on one node has none."""
        if self.trainer_nodes + self.replica_nodes == 1:
            return []
        replicas = f"{self.replica_nodes} for the replicas" if self.replica_nodes else "replicas on the same nodes"
        return [("nodes", f"{self.trainer_nodes} for the trainer, {replicas}; weights by {self.transport}")]

    def _host_memory_rows(self) -> list[Row]:
        if self.memory is None:
            return []
        free = "" if self.available_bytes is None else f", {format_bytes(self.available_bytes)} available"
        node = " on the driver's node" if self._node_rows() else ""
        total = f"about {format_bytes(self.memory.total_bytes)}{node}{free}"
        return [("host memory", total), *(("", f"{name}: {text}") for name, text in self.memory.parts())]

    def _device_rows(self) -> list[Row]:
        memory = self.device_memory
        if memory is None:
            return []
        rows: list[Row] = []
        for stage in memory.stages:
            shown = stage.parts.items()
            parts = ", ".join(f"{name} {part / GB:.1f}" for name, part in shown if part >= MIN_SHOWN_BYTES)
            label = "" if rows else "device memory"
            rows.append((label, f"{stage.name}: {stage.total / GB:.1f} of {memory.capacity / GB:.0f} GB ({parts})"))
        cache = f"{format_gb(max(0, memory.cache_bytes))} on each device"
        return [*rows, ("engine's KV cache", f"{cache}, {_format_count(memory.cache_tokens)} tokens in a replica")]


def _ranks_text(sequence_parallel: int, layer_parallel: int = 1) -> str:
    if layer_parallel > 1:
        return f"group of {layer_parallel} ranks, which share each layer"
    return "rank" if sequence_parallel == 1 else f"group of {sequence_parallel} ranks, which share each sequence"


def _format_count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _format_parameters(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"
