"""`lazyimg doctor`: whether this machine, its Glance and its daemon are fit for lazyimg, and what to do if not.

It runs without a daemon, changes nothing, and each check ends within a limit, whatever hangs.
"""

from lazyimg.doctor.examination import examine
from lazyimg.doctor.finding import Finding

__all__ = ["Finding", "examine"]
