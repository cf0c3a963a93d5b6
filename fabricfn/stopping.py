"""Leaving the loop in time: all ranks at the same step."""

from fabricfn import flat
from fabricfn.collectives.groups import device_for_words
from fabricfn.errors import ConfigurationError
from fabricfn.runtimes import Runtime
from fabricfn.watching import counted


def should_stop(rt: Runtime, *, every: int = 1) -> bool:
    """Whether the loop should save and leave, since some rank was told to: SIGTERM, SIGUSR1. Every rank must call it.

    Laws: all ranks get the same answer in the same call. A signal that reaches any rank before it asks is answered with
    True by this call, and by every later one. Until the first call a signal does what it did without fabricfn; a
    handler of the user's own that was there before `init_runtime` is called, too.

    Args:
        rt: the runtime; which signals count is `init_runtime(stop_signals=...)`.
        every: the ranks speak with each other in each `every`-th call only, beginning with the first; the others answer
            False at once. One number goes around per conversation: docs/failures.md has the time.

    Returns:
        On every rank the same bool. One rank communicates with nobody.

    Raises:
        ConfigurationError: `every` is no positive whole number.
        PeerError: a rank is gone.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(accelerator="cpu")
        >>> for step in range(3):
        ...     if ff.should_stop(rt):
        ...         break  # after ff.save(rt, "checkpoints/last", ...)
        >>> step
        2
    """
    if type(every) is not int or every < 1:
        raise ConfigurationError(f"every={every!r} must be a whole number, at least 1.")
    flag = rt.stop
    if flag is None:
        return _anywhere(rt, wanted=False)
    flag.asked = True
    if flag.agreed:
        return True
    flag.calls += 1
    if (flag.calls - 1) % every == 0:
        flag.agreed = _anywhere(rt, wanted=flag.wanted)
    return flag.agreed


def _anywhere(rt: Runtime, *, wanted: bool) -> bool:
    rt = rt.whole
    group = rt.world.group
    if group is None:
        return wanted
    device = device_for_words(rt.world, group)

    def vote() -> bool:
        return flat.anywhere([wanted], group, device)[0]

    return counted(rt.world, "should_stop", vote)()
