"""The command line's end of the control socket; synchronous, one connection a call.

Raises what the daemon raised, as the same class, and DaemonUnreachable where none answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyimg.control.messages import ImageFacts, Message, Progress, parse_message, raise_error
from lazyimg.errors import DaemonUnreachable, LazyImgError

if TYPE_CHECKING:
    import httpx

# An answer larger than this is not one of ours: status of 10,000 images takes about 4 MB.
ANSWER_BYTES_MAX = 64 << 20
PROGRESS_LINE_BYTES_MAX = 64 << 10
# The daemon answers at once or within its own limits; this one only ends a wait for a daemon that hangs.
ANSWER_TIMEOUT_S = 300.0
# Of what asks nobody and no disk.  One that was killed and hangs in its end does not answer, its successor does.
STATUS_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 10.0
# The other daemon answers reads first and here half a second later; a busy machine may take long.
OTHER_DAEMON_TIMEOUT_S = 60.0
OTHER_DAEMON_LOOK_S = 0.05
# struct ucred of unix(7): process, user, group.
_UCRED = struct.Struct("iII")


class ControlClient:
    """Asks a daemon through its control socket; synchronous.

    All methods raise DaemonUnreachable if none answers, and whatever LazyImgError the daemon raised.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def status(self) -> dict[str, Any]:
        """Return the JSON object of `lazyimg status --json`."""
        return self._object(self._body("GET", "v1/status", None, timeout_s=STATUS_TIMEOUT_S))

    def metrics(self) -> str:
        """Return the page that Prometheus reads."""
        body = self._body("GET", "metrics", None)
        if body.startswith(b"{"):
            self._object(body)
        return body.decode(errors="replace")

    def image_facts(self, image: str) -> ImageFacts:
        """Return what the companion must know of an image (id or unique name)."""
        answer = self._ask("GET", "v1/image", image)
        return self._parsed(ImageFacts, answer)

    def evict(self, image: str) -> int:
        """Drop an image's chunks and return the bytes freed."""
        return int(self._ask("POST", "v1/evict", image)["freed_bytes"])

    def restart(self) -> tuple[int, int]:
        """Let another daemon take over; return the pid of the old one and of the one that answers now.

        Raises RestartRefused, after which the old one goes on.
        """
        old_pid = int(self.status()["daemon_pid"])
        # An old daemon that ends before its answer is sent has let the other one take over too.
        with contextlib.suppress(DaemonUnreachable):
            self._ask("POST", "v1/restart", None)
        return old_pid, self._wait_other(old_pid)

    def give_up_mount(self) -> None:
        """Let the daemon end without unmounting, and wait until it has; the caller holds the mount."""
        with contextlib.suppress(DaemonUnreachable):
            self._ask("POST", "v1/give-up-mount", None)

    def _wait_other(self, old_pid: int) -> int:
        deadline_s = time.monotonic() + OTHER_DAEMON_TIMEOUT_S
        while True:
            with contextlib.suppress(DaemonUnreachable):
                pid = int(self.status()["daemon_pid"])
                if pid != old_pid:
                    return pid
            if time.monotonic() > deadline_s:
                raise DaemonUnreachable(
                    f"control socket {self._path}: no other daemon answers yet; see the daemon's log"
                )
            time.sleep(OTHER_DAEMON_LOOK_S)

    def prefetch(self, image: str) -> Generator[Progress, None, None]:
        """Fetch all of an image; closing the generator stops the work."""
        return self._watch("v1/prefetch", image)

    def verify(self, image: str) -> Generator[Progress, None, None]:
        """Check an image's chunks and its source's hash; the last step has the verdict."""
        return self._watch("v1/verify", image)

    def _ask(self, method: str, what: str, image: str | None) -> dict[str, Any]:
        return self._object(self._body(method, what, image))

    def _body(
        self, method: str, what: str, image: str | None, *, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> bytes:
        with self._response(method, what, image, timeout_s=timeout_s) as response:
            body = bytearray()
            for part in response.iter_raw():
                body += part
                if len(body) > ANSWER_BYTES_MAX:
                    raise self._not_ours(f"more than {ANSWER_BYTES_MAX} bytes")
            return bytes(body)

    def _watch(self, what: str, image: str) -> Generator[Progress, None, None]:
        # No limit between two steps: Glance may be away, and the work waits for it.
        with self._response("POST", what, image, timeout_s=None) as response:
            rest = b""
            for part in response.iter_raw():
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    yield self._parsed(Progress, self._object(line))
                if len(rest) > PROGRESS_LINE_BYTES_MAX:
                    raise self._not_ours("a line without end")

    @contextmanager
    def _response(
        self, method: str, what: str, image: str | None, *, timeout_s: float | None
    ) -> Iterator[httpx.Response]:
        self._check_reachable()
        import httpx

        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        # verify=False: there is no TLS here, and loading the certificates takes 20 ms.
        transport = httpx.HTTPTransport(uds=str(self._path), verify=False)
        params = {} if image is None else {"image": image}
        try:
            with (
                httpx.Client(transport=transport, timeout=timeout, trust_env=False) as client,
                client.stream(method, f"http://lazyimg/{what}", params=params) as response,
            ):
                yield response
        except httpx.TimeoutException as exc:
            message = f"control socket {self._path}: no answer in time; see the daemon's log"
            raise DaemonUnreachable(message) from exc
        except httpx.HTTPError as exc:
            raise self._went_away() from exc

    def _check_reachable(self) -> None:
        # httpx hides which error connect() had, and leaves the failed socket to the garbage collector.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(CONNECT_TIMEOUT_S)
            try:
                probe.connect(str(self._path))
            except PermissionError as exc:
                raise DaemonUnreachable(
                    f"control socket {self._path}: permission denied; run as its owner, or set control_group"
                    " and control_mode in the daemon's config"
                ) from exc
            except OSError as exc:
                raise DaemonUnreachable(
                    f"control socket {self._path}: no daemon answers ({exc.strerror or exc});"
                    " start it with lazyimg mount, or give --control"
                ) from exc
            self._check_peer(probe)

    def _check_peer(self, connection: socket.socket) -> None:
        """Refuse an answer from a user who could be anybody: what it says of images would make guests' disks."""
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, _ = _UCRED.unpack(peer)
        # The folder's owner decides which socket lies in it.
        trusted = {0, os.geteuid(), self._path.parent.stat().st_uid}
        if uid not in trusted:
            raise DaemonUnreachable(
                f"control socket {self._path}: user {uid} answers there, who is neither root, you, nor the owner"
                " of its folder; give the daemon's own --control"
            )

    def _object(self, body: bytes) -> dict[str, Any]:
        if not body:
            # What the web server says for a daemon that ended over the question.
            raise self._went_away()
        try:
            answer = json.loads(body)
        except ValueError as exc:
            raise self._not_ours("not JSON") from exc
        if not isinstance(answer, dict):
            raise self._not_ours("not a JSON object")
        raise_error(answer)
        return answer

    def _parsed(self, kind: type[Message], answer: dict[str, Any]) -> Message:
        try:
            return parse_message(kind, answer)
        except TypeError as exc:
            raise self._not_ours(f"an object without all fields of {kind.__name__}") from exc

    def _went_away(self) -> DaemonUnreachable:
        return DaemonUnreachable(
            f"control socket {self._path}: the daemon went away; see its log, then try again"
        )

    def _not_ours(self, what: str) -> LazyImgError:
        return LazyImgError(
            f"control socket {self._path}: {what} is no answer of lazyimg's; update client and daemon"
        )
