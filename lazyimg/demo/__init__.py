"""The embedded Glance-compatible server and the small guest of `lazyimg demo`."""
