"""What a kernel can do, by its release."""

from __future__ import annotations

import pytest

from lazyimg.core.kernel import can_resend


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("6.9.0", True),
        ("6.10-rc1", True),
        ("7.0.1-custom", True),
        ("6.8.0-45-generic", False),
        ("6.1.0-25-amd64", False),
        ("5.14.0-427.el9", False),
        ("unknown", False),
    ],
)
def test_kernels_that_send_again(release: str, expected: bool) -> None:
    """From 6.9 on a killed daemon's requests go to the next; what is no number is not trusted to."""
    assert can_resend(release) is expected
