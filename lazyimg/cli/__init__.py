"""The command line: reads flags, calls one thing, prints the outcome.

Errors are one line on standard error and an exit code (errors.py has the table).  Everything heavy is
imported inside the command that needs it.
"""

# Each module adds its commands to the application, in the order in which help shows them.
from lazyimg.cli import mount, status, doctor, images, disks  # noqa: I001  # help's order, not the alphabet's
from lazyimg.cli.app import main

__all__ = ["disks", "doctor", "images", "main", "mount", "status"]
