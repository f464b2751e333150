"""The process behind the mount: FUSE adapter, upper folder, holder, wiring.  Owner of pyfuse3."""
