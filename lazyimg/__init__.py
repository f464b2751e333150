"""lazyimg: start virtual machines on Glance images that have not been downloaded."""

__version__ = "0.1.0"
