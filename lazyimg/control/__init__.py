"""Both ends of the control socket: HTTP/JSON on a Unix socket, progress as one JSON object a line.

`messages` is what both ends share, `server` asks a `Daemon` that it knows only as a Protocol, `client` gives
the same answers and raises the same errors as if it had asked the daemon itself.
"""

from lazyimg.control.client import ControlClient
from lazyimg.control.messages import ImageFacts, Progress
from lazyimg.control.server import Daemon, serve_control

__all__ = ["ControlClient", "Daemon", "ImageFacts", "Progress", "serve_control"]
