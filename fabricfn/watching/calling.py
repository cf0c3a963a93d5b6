"""Public functions that every rank must call, as calls that are counted and whose errors name the rank behind them."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from fabricfn.watching.explaining import explained
from fabricfn.watching.watch import Watch
from fabricfn.world import World

P = ParamSpec("P")
T = TypeVar("T")


def nothing(*args: Any, **kwargs: Any) -> str:
    """A call that is about nothing in particular."""
    return ""


def watch_of(world: World) -> Watch | None:
    """The watch that counts the calls in this world's process group, if there is one."""
    watch = world.watch
    return watch if watch is not None and watch.group is world.whole.group else None


def counted(
    world: World, name: str, fn: Callable[..., Any], *, subject: Callable[..., Any] = nothing, apart: bool = False
) -> Callable[..., Any]:
    """`fn` as a call that every rank must make; see [Note: watch]. With one rank, `fn` itself.

    Args:
        world: this process' place.
        name: what must be the same on all ranks, as the user wrote it.
        fn: anything.
        subject: of the arguments: what the call is about, which must be alike on all ranks, too. An object that lives
            on, known by its identity.
        apart: whether it finds out by itself that another rank is in another such call.
    """
    watch = watch_of(world)
    if watch is None:
        return fn

    def call(*args: Any, **kwargs: Any) -> Any:
        if not watch.begin(name, subject(*args, **kwargs), apart=apart):
            return fn(*args, **kwargs)
        try:
            return fn(*args, **kwargs)
        except RuntimeError as error:
            better = explained(watch, error)
            if better is error:
                raise
            raise better from None
        finally:
            watch.end()

    return call


def collective(name: str, *, apart: bool = False, sharded: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator for functions of a runtime that every rank must call. A call for some ranks, `axis`, is not counted.

    Args:
        name: the function's name, as the user wrote it.
        apart: see `counted`.
        sharded: whether only a strategy that shards communicates there.
    """

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            rt = cast(Any, args[0] if args else kwargs["rt"])
            if rt.world.watch is None or kwargs.get("axis") is not None or (sharded and rt.strategy.shard is None):
                return fn(*args, **kwargs)
            return counted(rt.world, name, fn, apart=apart)(*args, **kwargs)

        return call

    return decorate
