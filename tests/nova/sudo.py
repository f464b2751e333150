"""The stand-in for sudo: asks the tests, which run as root, to run a command as root, and ends as it does.

Nova runs `sudo nova-rootwrap CONFIG privsep-helper …`; all behind the first word is the real thing.
"""

import json
import socket
import sys


def main() -> int:
    """Send the command to the socket named by the first argument; return the command's exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        connection.sendall(json.dumps(sys.argv[2:]).encode())
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(16) or b"1")


if __name__ == "__main__":
    sys.exit(main())
