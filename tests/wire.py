"""What lies between a client and a server, for tests that cut it: silence, a vanished server, TLS.

A proxy in a thread of its own, so that tests through a mount can use it as well as those on a trio loop.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import trio

BLOCK_SIZE_BYTES = 64 << 10


class Wire:
    """Connects 127.0.0.1:`port` with a server on 127.0.0.1:`target_port`.

    tls: the certificate it shows for the server, which speaks plainly; may be changed at any time.
    accepted: connections that came, those whose handshake failed included.
    """

    def __init__(self, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.port = 0
        self.accepted = 0
        self._is_https = tls is not None
        self._target_port = target_port
        # Connections that are alive but carry nothing any more, and whether those that come are such.
        self._is_gone = False
        self._generation = 0
        self._cancel = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,), name="wire")
        self._thread.start()
        self._is_up.wait()

    @property
    def url(self) -> str:
        return f"{'https' if self._is_https else 'http'}://127.0.0.1:{self.port}"

    def vanish(self) -> None:
        """From here on nothing moves: what stands stays silent for ever, what comes is accepted and silent too."""
        self._generation += 1
        self._is_gone = True

    def come_back(self) -> None:
        """The server is there again for new connections; those of before stay silent."""
        self._is_gone = False

    def close(self) -> None:
        """End it and all its connections."""
        assert self._token is not None
        self._token.run_sync_soon(self._cancel.cancel)
        self._thread.join()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        self._is_up.set()
        with self._cancel:
            await trio.serve_listeners(self._connect, [listener])

    async def _connect(self, client: trio.abc.Stream) -> None:
        self.accepted += 1
        generation, is_gone = self._generation, self._is_gone
        try:
            if is_gone:
                await trio.sleep_forever()
            if self.tls is not None:
                client = trio.SSLStream(client, self.tls, server_side=True, https_compatible=True)
                await client.do_handshake()
            server = await trio.open_tcp_stream("127.0.0.1", self._target_port)
            async with client, server, trio.open_nursery() as nursery:
                nursery.start_soon(self._carry, client, server, generation, nursery.cancel_scope)
                nursery.start_soon(self._carry, server, client, generation, nursery.cancel_scope)
        except (OSError, trio.BrokenResourceError):
            # The server is away, or the client did not like the certificate.
            await trio.aclose_forcefully(client)

    async def _carry(
        self, source: trio.abc.Stream, to: trio.abc.Stream, generation: int, scope: trio.CancelScope
    ) -> None:
        try:
            while data := await source.receive_some(BLOCK_SIZE_BYTES):
                if generation != self._generation:
                    await trio.sleep_forever()
                await to.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # One of the two has ended it: so does this.
            scope.cancel()
        # A client that ended an old connection does not hear of it either.
        if generation == self._generation:
            scope.cancel()


@contextmanager
def wire(target_port: int, tls: ssl.SSLContext | None = None) -> Iterator[Wire]:
    """Give a wire inside the block."""
    made = Wire(target_port, tls)
    try:
        yield made
    finally:
        made.close()
