"""A typed Ray actor, and the only place that translates Ray's errors.

A method is named by the class's function, not by a string: `await actor.call(Worker.update, batch)`. An editor can then
follow the call into the other process, and mypy checks its arguments and its result.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import ray
from ray.exceptions import RayActorError, RayTaskError

ActorT_co = TypeVar("ActorT_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")


class ActorDied(RuntimeError):
    """An actor's process ended without raising an exception (out of memory, killed)."""


class Actor(Generic[ActorT_co]):
    """One object in a process started by Ray.

    Args:
        actor_class: a plain class, importable by name in the other process.
        options: Ray options of the actor: resources, placement, environment.
        arguments, keywords: of the class's constructor.
    """

    def __init__(
        self,
        actor_class: Callable[P, ActorT_co],
        options: Mapping[str, Any],
        *arguments: P.args,
        **keywords: P.kwargs,
    ):
        self._class_name = actor_class.__name__
        self._handle: Any = ray.remote(actor_class).options(**options).remote(*arguments, **keywords)

    @overload
    async def call(
        self,
        method: Callable[Concatenate[ActorT_co, P], Coroutine[Any, Any, R]],
        *arguments: P.args,
        **keywords: P.kwargs,
    ) -> R: ...

    @overload
    async def call(
        self, method: Callable[Concatenate[ActorT_co, P], R], *arguments: P.args, **keywords: P.kwargs
    ) -> R: ...

    async def call(self, method: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Call a method, plain or `async`, and return its result.

        Args:
            method: a function of the actor's class, for example `Worker.update`.

        Raises:
            ActorDied: the process ended.
            Exception: the method's own exception, with its type.
        """
        return await self.result(self.submit(method, *arguments, **keywords))

    async def run(self, function: Callable[Concatenate[Any, P], R], *arguments: P.args, **keywords: P.kwargs) -> R:
        """Return `function(actor, *arguments)`, evaluated in the actor's process. Raises as `call`."""
        return await self.result(self.submit_function(function, *arguments, **keywords))

    def submit(self, method: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Send a call now and return Ray's reference to its result; `result` waits for it."""
        return getattr(self._handle, method.__name__).remote(*arguments, **keywords)

    def submit_function(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Send `function` to the actor's process, as `run` does, and return Ray's reference to its result."""
        return self._handle.__ray_call__.remote(function, *arguments, **keywords)

    async def result(self, reference: Any) -> Any:
        """Wait for a submitted call. Raises as `call`."""
        try:
            return await reference
        except RayTaskError as error:
            if error.cause is None:
                raise
            raise error.cause from None
        except RayActorError as error:
            raise ActorDied(f"the {self._class_name} process died: {error}") from error

    def kill(self) -> None:
        """End the process at once."""
        ray.kill(self._handle)
