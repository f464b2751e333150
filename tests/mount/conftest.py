"""The fixtures of a real mount, for the tests of this folder."""

from mount_fixtures import (  # noqa: F401  (used by name)
    _shared_glance,
    _shared_mount,
    _shared_raw_mount,
    glance,
    guest,
    make_glance,
    make_mount,
    mountable,
    mounted,
    raw_mount,
)
