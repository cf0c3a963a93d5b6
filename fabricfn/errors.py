"""Every exception that fabricfn raises for its users, and nothing else.

A message states the law, what was found, what was expected, the rank where that matters, and what to write instead.
"""


class FabricfnError(Exception):
    """The base of all exceptions of this package."""

    elsewhere: bool = False
    """Whether it tells of what went wrong on another rank alone."""


class ConfigurationError(FabricfnError, ValueError):
    """An argument names something that does not exist, or two arguments contradict each other."""


class CapabilityError(FabricfnError, NotImplementedError):
    """The chosen strategy cannot do this; the message names one that can."""


class ModelError(FabricfnError, RuntimeError):
    """A module or a `Model` cannot be used like this: lazy parameters, other shapes, two devices, no engine."""


class DonatedError(ModelError):
    """A record was used after its tensors had been given away with `donate=True` or changed in place."""


class GradientError(FabricfnError, RuntimeError):
    """Gradients are missing, not finite, not synchronised, or belong to another model."""


class MismatchError(FabricfnError, RuntimeError):
    """The ranks disagree on collective calls (kind, number, shape, dtype, structure) or on replicated values."""


class PeerError(FabricfnError, RuntimeError):
    """Another rank has failed, died or cannot be reached, so this one cannot go on."""


class LeftError(MismatchError, PeerError):
    """Another rank has left before the call that this one makes: fewer calls, or a `sys.exit` of its own."""


class HangError(PeerError):
    """Another rank did not answer within the limit, `init_runtime(timeout=...)`."""


class LaunchError(FabricfnError, RuntimeError):
    """The processes could not be started, or one of them failed without an exception of its own."""


class DataError(FabricfnError, ValueError):
    """A loader cannot be sharded, or a cursor does not fit it."""


class UnevenBatchesWarning(UserWarning):
    """The ranks' batches differ in rows, so a mean over ranks of their means is not the mean over the rows."""


class CheckpointError(FabricfnError, RuntimeError):
    """A checkpoint is missing, damaged, of another format, or does not fit the template."""
