"""Requests to a store: what fails for a moment is tried again, with growing pauses and not for ever. No torch."""

import errno
import itertools
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from fabricfn.errors import CheckpointError

T = TypeVar("T")

TRIES = 6
PAUSE = 0.1
"""Seconds before the second try; twice as long before each further one, up to PAUSES."""
PAUSES = 8.0
PATIENCE = 60.0
"""Seconds after which no request is begun again. The other ranks wait in a collective meanwhile."""

ERRNOS = {
    *(errno.EBUSY, errno.EREMOTEIO),  # what s3fs makes of 503 and 500
    *(errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.EAGAIN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}
STATUSES = {408, 425, 429, 500, 502, 503, 504}
CODES = {"BadDigest", "IncompleteBody", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
"""Codes of S3; the first two say that a body was damaged on its way."""
NAMES = {
    *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
    *("ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseStreamingError"),  # botocore, requests
    *("ServiceRequestError", "ServiceResponseError", "IncompleteRead", "Timeout"),  # azure, http.client, requests
}
"""Classes of libraries that are not imported here, so that none of them is needed."""
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, CheckpointError)


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, FINAL):
        return False
    return any(_passing(cause) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was made from: s3fs and others translate those of their libraries."""
    found: BaseException | None = error
    for _ in range(8):
        if found is None:
            return
        yield found
        found = found.__cause__


def _passing(error: BaseException) -> bool:
    if isinstance(error, TimeoutError | ConnectionError) or getattr(error, "errno", None) in ERRNOS:
        return True
    if NAMES & {cls.__name__ for cls in type(error).__mro__}:
        return True
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        facts = cast("dict[str, Any]", response)
        if facts.get("Error", {}).get("Code") in CODES:
            return True
        return facts.get("ResponseMetadata", {}).get("HTTPStatusCode") in STATUSES
    return any(str(getattr(error, name, None)) in map(str, STATUSES) for name in ("status", "status_code", "code"))


def patient(what: str, work: Callable[[], T], patience: float | None = None) -> T:
    """The result of `work`, which is called again while it fails for reasons that pass.

    Args:
        what: begins the message of an error, as "reading s3://bucket/last/manifest.json".
        work: may be called several times.
        patience: seconds after which it is not called again; PATIENCE by default.

    Raises:
        FileNotFoundError: as `work` raised it: what it means, the caller knows.
        CheckpointError: anything else, or too often.
    """
    began, limit = time.monotonic(), PATIENCE if patience is None else patience
    for tries in itertools.count(1):
        try:
            return work()
        except (FileNotFoundError, CheckpointError):
            raise
        except Exception as error:  # each kind of store raises its own
            took = time.monotonic() - began
            if tries >= TRIES or took > limit or not transient(error):
                often = f" {tries} times in {took:.1f} s" if tries > 1 else ""
                raise CheckpointError(f"{what} failed{often}: {type(error).__name__}: {error}.") from error
        # not of `random`: its state belongs to the training
        time.sleep(min(PAUSE * 2 ** (tries - 1), PAUSES) * (0.5 + secrets.randbelow(1000) / 1000))
    raise AssertionError("unreachable")
