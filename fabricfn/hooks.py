"""Hooks: code of others at places that a training loop names."""

import inspect
import warnings
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Any

from fabricfn.errors import ConfigurationError
from fabricfn.runtimes import Runtime


def call(rt: Runtime, hook: str, /, *args: Any, **kwargs: Any) -> list[Any]:
    """Call a hook on every callback of the runtime that has it, in the order in which they were given.

    A callback is any object, whose method of that name is called, or a function of that name. Those without it are
    skipped; a name of theirs that differs by a slip is warned about.

    Args:
        rt: the runtime. Not collective; a hook may be, when every rank calls it.
        hook: as "on_train_epoch_end". No name means anything to fabricfn.
        args: each hook is given as many as it takes.
        kwargs: each hook is given those that its signature has, or all when it takes any. A parameter `rt` is given the
            runtime.

    Returns:
        What the hooks returned.

    Raises:
        ConfigurationError: a hook needs an argument that the call does not have.
        Exception: what a hook raised.

    Example:
        >>> import fabricfn as ff
        >>> class Tell:
        ...     def on_epoch_end(self, epoch):
        ...         print("epoch", epoch)
        >>> with ff.runtime(devices=1, accelerator="cpu", callbacks=Tell()) as rt:
        ...     ff.call(rt, "on_epoch_end", epoch=3, results=[0.5])
        epoch 3
        [None]
    """
    found: list[Any] = []
    for callback in rt.callbacks:
        function = _function(callback, hook)
        if function is not None:
            positional, named = _fitting(function, hook, rt, args, kwargs)
            found.append(function(*positional, **named))
    return found


def _function(callback: Any, hook: str) -> Callable[..., Any] | None:
    if inspect.isroutine(callback):
        names = [callback.__name__]
        own = callback if callback.__name__ == hook else None
    else:
        own = getattr(callback, hook, None)
        names = [name for name in dir(callback) if name[0] != "_"] if own is None else []
    if callable(own):
        return own
    for name in names:
        if _is_slip(name, hook):
            text = f"ff.call: no {hook!r} in {callback!r:.80}, which has {name!r}. Is one of the two misspelt?"
            warnings.warn(text, stacklevel=3)
    return None


def _is_slip(one: str, other: str) -> bool:
    """Whether the names differ by one letter, or by two neighbours that changed places."""
    if one == other or abs(len(one) - len(other)) > 1 or min(len(one), len(other)) < 4:
        return False
    matching = sum(block.size for block in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks())
    return matching >= max(len(one), len(other)) - 1


def _fitting(
    function: Callable[..., Any], hook: str, rt: Runtime, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of some functions in C there is none
        return args, kwargs
    kinds = {parameter.kind for parameter in parameters}
    offered = {**kwargs, "rt": rt}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [parameter.name for parameter in parameters if parameter.kind in by_name]
    named = {name: offered[name] for name in names if name in offered}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        named = {**kwargs, **named}
    if kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}:
        return args, named
    named.update(zip((name for name in names if name not in named), args, strict=False))
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.name in names and parameter.name not in named
    ]
    if missing:
        has = ", ".join([*(["positional ones"] if args else []), *map(repr, kwargs)]) or "none"
        raise ConfigurationError(
            f"the hook {hook!r} of {function!r:.120} needs the argument {missing[0]!r}; the call has {has}. Write"
            f" ff.call(rt, {hook!r}, {missing[0]}=...), or give the parameter a default."
        )
    return (), named
