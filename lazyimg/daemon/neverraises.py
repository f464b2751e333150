"""Lets nothing but FUSEError out of a handler: for anything else pyfuse3 ends the mount, for every guest (I6)."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3

from lazyimg.daemon.errnos import ERRNO
from lazyimg.daemon.inflight import InFlight
from lazyimg.errors import LazyImgError

# The handlers are the file system's.
logger = logging.getLogger("lazyimg.daemon.filesystem")


class Answering(Protocol):
    """Whose methods the handlers are."""

    in_flight: InFlight


S = TypeVar("S", bound=Answering)
P = ParamSpec("P")
T = TypeVar("T")


def never_raises(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Let nothing but FUSEError out of a handler."""

    @functools.wraps(handler)
    async def wrapped(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        self.in_flight.count += 1
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except LazyImgError as exc:
            number = ERRNO.get(type(exc), errno.EIO)
            level = logging.INFO if number == errno.EAGAIN else logging.WARNING
            logger.log(level, "%s: %s", handler.__name__, exc)
            raise pyfuse3.FUSEError(number) from None
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from None
        except Exception:
            self.in_flight.unforeseen_errors += 1
            logger.exception("%s failed in an unforeseen way; answered EIO", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            self.in_flight.count -= 1

    return wrapped  # type: ignore[return-value]  # mypy's _Wrapped is not the callable it stands for
