"""What some tests need of the kernel they run on."""

from __future__ import annotations

import os

import pytest

from lazyimg.core.kernel import can_resend

needs_resend = pytest.mark.skipif(
    not can_resend(os.uname().release), reason="Linux 6.9 is missing here: it sends requests again"
)
