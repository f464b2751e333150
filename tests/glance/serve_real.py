"""Serves the real Glance or Keystone on cheroot; runs in their virtual environment, not in ours.

`serve_real.py glance|keystone PORT`; OS_GLANCE_CONFIG_DIR or OS_KEYSTONE_CONFIG_DIR names its configuration.
"""

import importlib
import sys
import warnings


def main() -> None:
    """Serve until killed."""
    name, port = sys.argv[1:]
    # Keystone hands the command line to oslo.config.
    del sys.argv[1:]
    warnings.simplefilter("ignore")
    application = importlib.import_module(f"{name}.wsgi.api").application
    wsgi = importlib.import_module("cheroot.wsgi")
    wsgi.Server(("127.0.0.1", int(port)), application, numthreads=8).start()


if __name__ == "__main__":
    main()
