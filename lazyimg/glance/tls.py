"""Whom a server may be signed by, and what we show a server that asks who we are.

Certificates are verified unless the operator's clouds.yaml says otherwise; nothing here turns that off by itself.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lazyimg.errors import ConfigError


class Tls:
    """The files, and the context made of them.

    verify: True for the system's authorities, where operators put their own, rather than those httpx ships; a file
    or folder of authorities, which then are the only ones; False for none.  cert: files of our certificate
    and of its key, or one file with both.  keys: what the operator calls them.  Raises ConfigError where a file
    cannot be used.
    """

    def __init__(
        self,
        verify: bool | str | None = True,
        cert: Sequence[str] = (),
        *,
        keys: str = "ca_file, cert_file or key_file",
    ) -> None:
        authorities = verify if isinstance(verify, str) else None
        is_folder = authorities is not None and Path(authorities).is_dir()
        self._file = None if is_folder else authorities
        self._folder = authorities if is_folder else None
        self._cert = tuple(cert)
        try:
            self.context = ssl.create_default_context(cafile=self._file, capath=self._folder)
            self._load_own()
        except OSError as exc:
            raise ConfigError(f"{keys}: {exc}; give readable PEM files") from exc
        if verify is False:
            self.context.check_hostname = False
            self.context.verify_mode = ssl.CERT_NONE

    def reload(self) -> None:
        """Read the files again: somebody may have renewed them since.  Blocking."""
        # A file that cannot be read now: what was read before serves on, and who asked has an error to tell already.
        with suppress(OSError):
            if self._file is None and self._folder is None:
                self.context.load_default_certs()
            else:
                self.context.load_verify_locations(self._file, self._folder)
            self._load_own()

    def _load_own(self) -> None:
        if self._cert:
            # A key with a passphrase is an error; nobody is there to be asked for it.
            self.context.load_cert_chain(self._cert[0], self._cert[-1], password=bytes)
