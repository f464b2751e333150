"""The fixtures of a real mount and of a client alone, for the tests of this folder."""

from bad_disk import mount, read_timeout_s, whole  # noqa: F401  (used by name)
from client_rig import here  # noqa: F401  (used by name)
from mount_fixtures import (  # noqa: F401  (used by name)
    _shared_glance,
    _shared_mount,
    faulty_disk,
    glance,
    guest,
    make_glance,
    make_mount,
    mountable,
    mounted,
)
