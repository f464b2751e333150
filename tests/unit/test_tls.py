"""Which certificates are trusted; the handshakes are in tests/fault."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from certificates import Authority

from lazyimg.errors import ConfigError
from lazyimg.glance.tls import Tls


def trusted(tls: Tls) -> set[str]:
    return {dict(one[0] for one in ca["subject"])["commonName"] for ca in tls.context.get_ca_certs()}  # type: ignore[misc]


def test_certificates_are_verified_unless_the_operator_says_otherwise() -> None:
    """Host and authority are checked by default and with authorities of one's own."""
    assert Tls().context.verify_mode is ssl.CERT_REQUIRED
    assert Tls().context.check_hostname
    insecure = Tls(False)
    assert insecure.context.verify_mode is ssl.CERT_NONE
    insecure.reload()
    assert insecure.context.verify_mode is ssl.CERT_NONE


def test_own_authorities_are_the_only_ones(tmp_path: Path) -> None:
    """A file of authorities takes the place of the system's; a folder is taken too."""
    authority = Authority(tmp_path)
    assert trusted(Tls(str(authority.ca_file))) == {authority.name}
    assert Tls(str(tmp_path)).context.verify_mode is ssl.CERT_REQUIRED


def test_renewed_files_are_read_again(tmp_path: Path) -> None:
    """What is trusted follows the file; a file that is gone takes nothing away."""
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    path = tmp_path / "ca.pem"
    path.write_bytes(old.ca_file.read_bytes())
    tls = Tls(str(path))
    path.write_bytes(new.ca_file.read_bytes())
    tls.reload()
    assert len(tls.context.get_ca_certs()) == 2
    path.unlink()
    tls.reload()
    assert len(tls.context.get_ca_certs()) == 2


@pytest.mark.parametrize("content", [None, b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nx\n"])
def test_file_that_is_no_certificate_is_refused(content: bytes | None, tmp_path: Path) -> None:
    """Missing, empty or broken: told with the keys that name it."""
    path = tmp_path / "x.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="ca_file, cert_file or key_file"):
        Tls(str(path))
    with pytest.raises(ConfigError, match="cacert, cert or key of the cloud"):
        Tls(True, [str(path)], keys="cacert, cert or key of the cloud")
