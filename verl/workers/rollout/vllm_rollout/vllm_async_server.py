"""Rollout server: one actor that hosts a vLLM engine, with tokens as input and output.

States of a replica's weights:

    starting --(weights from the checkpoint)--> serving(v)
    starting --(load_format=dummy)------------> waiting for the first update
    serving(v) --begin_update--> updating --finish_update--> serving(v + 1)
    updating --any error--> refusing, until a full update succeeds

Requests that arrive during an update wait; requests that arrive while it refuses get `ReplicaUnavailable`. An update
first completes the requests in flight or, with `rollout.partial_rollout`, cuts them: they return their current tokens
(`stop_reason` "abort"), and the client requests the rest.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from verl.config import ModelConfig, RolloutConfig
from verl.config.profiles import RolloutProfiles
from verl.timeline.spans import Timeline, join_timeline, spanned
from verl.utils.heap import freeze_heap
from verl.utils.quantization.ascend_releases import installed_vllm_ascend, untested_release
from verl.utils.quantization.schemes import SCHEME_NAMES, weight_format
from verl.utils.sampling_masks import SamplingMasks
from verl.utils.vllm.engine_profiler import engine_objects, engine_profiler
from verl.utils.vllm.npu_settings import check_npu_settings
from verl.utils.vllm.sampling_replay import SamplingReplay
from verl.utils.vllm.server import call_app, drain, openai_app
from verl.workers.rollout.quantization import worker_settings
from verl.workers.rollout.request_channel import Request, RequestDesk, Response
from verl.workers.rollout.types import EngineDied, ReplicaHealth, ReplicaReport, ReplicaUnavailable, TokenOutput
from verl.workers.rollout.vllm_rollout.engine_args import engine_args
from verl.workers.rollout.vllm_rollout.engine_failure import failure_text
from verl.workers.rollout.vllm_rollout.sampling_params import vllm_sampling_params
from verl.workers.rollout.vllm_rollout.worker_calls import call_workers, merge_bucket_reports, merge_reports, results
from verl.workers.rollout.vllm_rollout.worker_extension import WeightUpdateExtension
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.messages import Bucket, BucketReport, EngineReport, ManifestMessage, WorkerReply

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_SUPPORTED_QUANTIZATION = list(SCHEME_NAMES)


class vLLMHttpServer:
    """Hosts vLLM's `AsyncLLM`; `vLLMReplica` starts it as a Ray actor.

    Args:
        rollout, model: the config sections `actor_rollout_ref.rollout` and `.model`.
        replica_rank: index of this replica, from 0.
        device: `cpu`, `cuda` or `npu`.
        dtype: name of the torch dtype in which the engine computes.
        prompt_length, response_length: limits in tokens.
        seed: seed of the engine's sampler; each replica adds its rank.
        profiles: profiles of the replicas; None without any.
        timeline: argument of `join_timeline`.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        model: ModelConfig,
        *,
        replica_rank: int,
        device: str,
        dtype: str,
        prompt_length: int,
        response_length: int,
        seed: int = 0,
        profiles: RolloutProfiles | None = None,
        timeline: Timeline | None = None,
    ):
        join_timeline(timeline, f"replica {replica_rank}")
        self._timeline = timeline
        if device == "npu":
            check_npu_settings(
                os.environ,
                sleep_mode=rollout.free_cache_engine,
                engine_kwargs=rollout.engine_kwargs.get("vllm"),
                release=installed_vllm_ascend(),
            )
        self._rollout = rollout
        self._model = model
        self._rank = replica_rank
        self._device = device
        self._response_length = response_length
        assert model.path is not None, "preflight checks that it is set"
        chosen = weight_format(rollout, model.path)
        self._self_test = chosen.runs_self_test(device)
        self._args = engine_args(
            rollout,
            model,
            device=device,
            dtype=dtype,
            prompt_length=prompt_length,
            response_length=response_length,
            seed=seed + replica_rank,
            quantization=chosen.engine_overrides(device),
        )
        self._profiler = None if profiles is None else engine_profiler(profiles, replica_rank)
        if self._profiler is not None:
            self._args["profiler_config"] = self._profiler.config
        self._version: int | None = None
        self._refusal: str | None = None
        self._serving = asyncio.Event()
        self._in_flight: set[str] = set()
        self._engine: Any = None
        self._http: Any = None
        self._app: asyncio.Future[Any] | None = None
        self._replay: SamplingReplay | None = None
        self._desk = RequestDesk(self.generate, (EngineDied, ReplicaUnavailable, ValueError))

    async def start(self) -> ReplicaReport:
        """Start the engine, and the HTTP endpoint if it is enabled.

        Raises:
            ValueError: vLLM refuses the arguments of the engine.
            RuntimeError: the engine's processes ended.
            WeightUpdateError: weights in the layouts of the engine's layers cannot be replaced, or the self-test of
                these layers failed.
        """
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        started = time.perf_counter()
        arguments = AsyncEngineArgs(**engine_objects(self._args))
        # This blocks for many seconds, during which the actor must respond to health checks.
        try:
            config = await asyncio.to_thread(arguments.create_engine_config)
        except ValueError as error:
            # Pydantic's exceptions cannot be pickled.
            raise ValueError(f"vLLM refuses the arguments of its engine: {error}") from None
        try:
            self._engine = AsyncLLM.from_vllm_config(config, disable_log_stats=self._rollout.disable_log_stats)
        except RuntimeError as error:
            raise RuntimeError(f"replica {self._rank}: its engine did not start: {failure_text(error)}") from error
        if self._timeline is not None:
            await call_workers(
                self._engine, WeightUpdateExtension.verl_join_timeline, self._timeline, f"replica {self._rank}"
            )
        await self._workers(WeightUpdateExtension.verl_check_engine, worker_settings(self._rollout), self._self_test)
        if self._device == "npu" and (warning := untested_release(installed_vllm_ascend() or "0")) is not None:
            logger.warning(warning)
        self._max_len = config.model_config.max_model_len
        if self._rollout.replay_sampling_mask:
            self._replay = SamplingReplay(self._rollout.top_k, config.model_config.get_vocab_size())
        if self._rollout.load_format != "dummy":
            self._commit(0)
        address = await self._start_http(arguments) if self._rollout.listens else None
        key = self._http.api_key if self._http is not None and self._rollout.server.enable_http else None
        freeze_heap()
        return {"seconds": time.perf_counter() - started, "pid": os.getpid(), "http": address, "api_key": key}

    async def _start_http(self, arguments: Any) -> str:
        from verl.workers.rollout.vllm_rollout.http_endpoint import HttpEndpoint

        self._http = HttpEndpoint(self._rollout.server, self._rank, refusal=self._http_refusal)
        return await self._http.start(self._engine, arguments)

    def _http_refusal(self) -> str | None:
        if self._serving.is_set():
            return None
        return self._refusal or "a weight update is in progress"

    async def http_request(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, str, bytes]:
        """Respond to a request of vLLM's OpenAI-compatible server; arguments and result as for `call_app`.

        Raises:
            ReplicaUnavailable: the engine died.
        """
        if self._app is None:
            self._app = asyncio.ensure_future(openai_app(self._engine, self._args["model"], api_key=None))
        response = await call_app(await self._app, method, path, headers, body)
        if self._engine.errored:
            self._refuse("its engine died")
            raise ReplicaUnavailable(f"replica {self._rank}: {self._refusal}")
        return response

    async def submit_requests(self, requests: Sequence[Request]) -> None:
        """Start `generate` for each request."""
        self._desk.submit(requests)

    async def next_responses(self) -> list[Response]:
        """Wait for a result or an error of `generate`, then return all available ones."""
        return await self._desk.next_responses()

    @spanned("request", "request", overlaps=True)
    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, generated: list[int]
    ) -> TokenOutput:
        """Generate one response, or its continuation after the tokens `generated`.

        Args:
            prompt_ids: prompt tokens.
            sampling_params: vLLM's sampling parameters by name, for the full response; `max_tokens` defaults to the
                response limit.
            request_id: unique among the requests in flight.
            generated: tokens of the response so far.

        Returns:
            the new tokens. `stop_reason` is "abort" if an update or `sleep` cut the request.

        Raises:
            EngineDied: the engine died.
            ReplicaUnavailable: the replica refuses to serve.
            ValueError: the prompt leaves no room for a response, a sampling parameter is unknown or, with
                `partial_rollout`, does not support a cut, or the sampling masks are not bounded or incomplete.
        """
        from vllm.inputs import TokensPrompt

        candidates = 0 if self._replay is None else self._replay.candidates(sampling_params)
        parameters = self._sampling_params(len(prompt_ids), sampling_params, len(generated), candidates)
        prompt = TokensPrompt(prompt_token_ids=[*prompt_ids, *generated])
        await self._wait_until_serving()
        version, final, prompt_log_probs = self._version, None, []
        self._in_flight.add(request_id)
        try:
            async with self._engine_errors():
                async for output in self._engine.generate(prompt, parameters, request_id):
                    final, prompt_log_probs = output.outputs[0], _prompt_log_probs(output)
        finally:
            self._in_flight.discard(request_id)
        assert final is not None and version is not None
        # An update completes or cuts the requests in flight before it begins, so a request sees one version.
        assert version == self._version
        log_probs, masks = self._log_probs(final, candidates)
        return TokenOutput(
            token_ids=list(final.token_ids),
            log_probs=log_probs,
            stop_reason=final.finish_reason or "abort",
            weight_versions=[version] * len(final.token_ids),
            prompt_log_probs=prompt_log_probs,
            sampling_masks=masks,
        )

    def _log_probs(self, output: Any, candidates: int) -> tuple[list[float], SamplingMasks]:
        """Return log-probabilities and sampling masks of the generated tokens, each empty if not requested."""
        if output.logprobs is None:
            return [], SamplingMasks.full(0)
        if candidates:
            assert self._replay is not None, "only it returns candidates"
            return self._replay.read(output, candidates)
        values = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
        return values, SamplingMasks.full(0 if self._replay is None else len(values))

    def _sampling_params(self, prompt_length: int, given: dict[str, Any], num_generated: int, candidates: int) -> Any:
        room = self._max_len - prompt_length
        if room < 1:
            raise ValueError(
                f"a prompt of {prompt_length} tokens leaves no room in max_model_len={self._max_len}: "
                "shorten data.max_prompt_length or raise actor_rollout_ref.rollout.max_model_len"
            )
        return vllm_sampling_params(
            given,
            max_tokens=self._response_length,
            room=room,
            num_generated=num_generated,
            partial_rollout=self._rollout.partial_rollout,
            candidates=candidates,
        )

    async def _wait_until_serving(self) -> None:
        while not self._serving.is_set():
            if self._refusal is not None:
                raise ReplicaUnavailable(f"replica {self._rank} serves nothing: {self._refusal}")
            waiting = asyncio.create_task(self._serving.wait())
            await asyncio.wait([waiting], timeout=0.5)
            waiting.cancel()

    # ---- the weight update ----

    @spanned("update: drain or cut, begin")
    async def begin_update(self, version: int, base: int | None = None) -> None:
        """Drain or cut the requests in flight, and bring the engine to the checkpoint layout or prepare it for a delta.

        Args:
            base: the version that a delta is relative to; None for a full update.
        """
        self._serving.clear()
        self._refusal = None
        try:
            if self._rollout.partial_rollout:
                await self._cut()
            # HTTP requests cannot be resumed after a cut, so complete them.
            async with self._engine_errors():
                await drain(self._engine)
            settings = worker_settings(self._rollout)
            await self._workers(WeightUpdateExtension.verl_begin_update, version, settings, base)
        except BaseException as error:
            self._refuse(str(error))
            raise

    async def _cut(self) -> None:
        """End every response at its current token."""
        while self._in_flight:
            await self._engine.abort(list(self._in_flight))
            # Repeat for a request that had not reached the engine yet.
            await asyncio.sleep(0.001)

    @spanned("update: load a bucket")
    async def load_bucket(self, bucket: Bucket) -> BucketReport:
        """Load one bucket in every worker of this replica, and return the merged report of all workers."""
        try:
            reports = await self._workers(WeightUpdateExtension.verl_load_bucket, bucket)
        except BaseException as error:
            self._refuse(str(error))
            raise
        return merge_bucket_reports(reports)

    @spanned("update: finish")
    async def finish_update(self, manifest: ManifestMessage) -> EngineReport:
        """Check the update, bring the engine to the kernel layout, commit the version, and serve again.

        Returns:
            The merged report of all workers; see `merge_reports`.
        """
        try:
            reports = await self._workers(WeightUpdateExtension.verl_finish_update, manifest)
            # Cached keys and values of the old weights must not be used under the new ones.
            async with self._engine_errors():
                if not await self._engine.reset_prefix_cache():
                    raise WeightUpdateError("the engine kept its prefix cache: requests are still in flight")
                await self._engine.resume_generation()
        except BaseException as error:
            self._refuse(str(error))
            raise
        self._commit(int(manifest["version"]))
        return merge_reports(reports)

    async def abort_update(self, reason: str) -> None:
        """Abort an update. The replica refuses every request until a full update succeeds."""
        self._refuse(reason)

    async def parameter_hashes(self) -> list[dict[str, str]]:
        """SHA-256 of every parameter, by engine name, for each worker."""
        return await call_workers(self._engine, WeightUpdateExtension.verl_parameter_hashes)

    async def parameter_addresses(self) -> list[dict[str, int]]:
        """Address of every parameter, by engine name, for each worker."""
        return await call_workers(self._engine, WeightUpdateExtension.verl_parameter_addresses)

    async def _workers(
        self,
        method: Callable[Concatenate[WeightUpdateExtension, P], WorkerReply[R]],
        *arguments: P.args,
        **keywords: P.kwargs,
    ) -> list[R]:
        async with self._engine_errors():
            return results(await call_workers(self._engine, method, *arguments, **keywords), self._rank)

    @asynccontextmanager
    async def _engine_errors(self) -> AsyncIterator[None]:
        """Refuse to serve once the engine is dead, and raise `EngineDied` with its own error."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            self._refuse(f"its engine died: {failure_text(error)}")
            raise EngineDied(f"replica {self._rank}: {self._refusal}") from error

    def _refuse(self, reason: str) -> None:
        self._serving.clear()
        self._version, self._refusal = None, reason

    def _commit(self, version: int) -> None:
        self._version, self._refusal = version, None
        self._serving.set()

    # ---- life ----

    async def start_profile(self, first_step: int) -> None:
        """Begin the engine's trace with a training step; no effect on a replica that is not profiled."""
        if self._profiler is not None:
            await self._profiler.start(self._engine, first_step)

    async def stop_profile(self) -> None:
        """End the engine's trace and write it."""
        if self._profiler is not None:
            await self._profiler.stop(self._engine)

    async def health(self) -> ReplicaHealth:
        """Return the served version, or the reason for a refusal.

        Raises:
            EngineDied: the engine died.
        """
        async with self._engine_errors():
            await self._engine.check_health()
        return {"version": self._version, "refusal": self._refusal}

    @spanned("sleep")
    async def sleep(self) -> None:
        """Free the key-value cache and offload the weights (level 1 on an NPU, 2 elsewhere). No effect on a CPU."""
        if self._device != "cpu" and self._rollout.free_cache_engine:
            self._serving.clear()
            if self._rollout.partial_rollout:
                await self._cut()
            async with self._engine_errors():
                await self._engine.sleep(level=1 if self._device == "npu" else 2)

    @spanned("wake up")
    async def wake_up(self, tags: list[str]) -> None:
        """Allocate memory again: `["weights"]` before an update, `["kv_cache"]` after it. No effect on a CPU."""
        if self._device != "cpu" and self._rollout.free_cache_engine:
            async with self._engine_errors():
                await self._engine.wake_up(tags=tags)

    async def stop(self) -> None:
        """Stop the endpoint and the engine with all its processes."""
        self._refuse("it was stopped")
        if self._http is not None:
            await self._http.stop()
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await asyncio.to_thread(engine.shutdown)


def _prompt_log_probs(output: Any) -> list[float]:
    """Return the log-probability of each prompt token but the first, which has none; empty if not requested."""
    if output.prompt_logprobs is None:
        return []
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    return [entry[token].logprob for token, entry in pairs if entry is not None]
