"""Configuration: every key, refused early with its name and what would do; file < environment < flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lazyimg import config as config_module
from lazyimg.config import Config, load_config, parse_size
from lazyimg.errors import ConfigError

GIB = 1 << 30

# For each key: a value for a TOML file, the same in an environment variable, what it becomes; then values
# that are impossible (as written in the file) and a word of the message that says what would do.
KEYS: dict[str, tuple[str, str, Any, list[str], str]] = {
    "endpoint": ('["http://a", "https://b/v2"]', "http://a https://b/v2", ("http://a", "https://b/v2"),
                 ['"ftp://a"', '["a"]', "5"], "http://|valid"),
    "cloud": ('"prod"', "prod", "prod", ["5", "true"], "string"),
    "ca_file": ('"/ca.pem"', "/ca.pem", Path("/ca.pem"), ["5"], "path"),
    "cert_file": ('"/me.pem"', "/me.pem", Path("/me.pem"), ["5"], "path"),
    "key_file": ('"/me.key"', "/me.key", Path("/me.key"), ["5"], "path"),
    "connect_timeout": ("2.5", "2.5", 2.5, ["0", "-1", '"soon"', "1e9", "inf", "nan"], "number|than"),
    "first_byte_timeout": ("7", "7", 7, ["0", "86401"], "than"),
    "between_bytes_timeout": ("7", "7", 7, ["0", "-1"], "than"),
    "negative_ttl": ("0", "0", 0, ["-1", "3601"], "than"),
    "cache_dir": ('"/c"', "/c", Path("/c"), ["5"], "path"),
    "cache_size_max": ('"20 GiB"', "20 GiB", 20 * GIB, ['"much"', "-1"], "byte|than"),
    "cache_free_min": ("4096", "4096", 4096, ['"GiB"'], "byte"),
    "control": ('"/s"', "/s", Path("/s"), ["[]"], "path"),
    "control_group": ('"nova"', "nova", "nova", ["5"], "string"),
    "metrics_listen": (
        '"[::1]:9177"',
        "[::1]:9177",
        "[::1]:9177",
        ['"9177"', '":9177"', '"h:"', '"h:0"', '"h:65536"', '"h:x"', "1"],
        "host and port|string",
    ),
    "control_mode": ('"0660"', "0660", "0660", ['"0x"', '"888"', '"17777"', '"-1"', "432"], "octal|string"),
    "view": ('"stored"', "stored", "stored", ['"decoded"', '""'], "raw"),
    "allow_other": ("false", "false", False, ['"perhaps"', "2"], "boolean"),
    "image_owner": ('"nova:kvm"', "nova:kvm", "nova:kvm", ["5", '""', '"a:b:c"', '":x"'], "string|pattern"),
    "image_mode": ('"0444"', "0444", "0444", ['"0x"', '"888"', "444"], "octal|string"),
    "read_ahead": ('"2 MiB"', "2MiB", 2 << 20, ['"x"', "-1"], "byte|than"),
    "read_timeout": ("60", "60", 60, ["0", '"5 min"'], "than|number"),
    "lookup_timeout": ("1", "1", 1, ["0"], "than"),
    "disk_timeout": ("3", "3", 3, ["0"], "than"),
    "retry_pause_max": ("1", "1", 1, ["0"], "than"),
    "restart_timeout": ("4", "4", 4, ["0"], "than"),
    "requests_max": ("8", "8", 8, ["0", "257", "1.5"], "than|integer"),
    "background_requests_max": ("2", "2", 2, ["0", "257"], "than"),
    "request_bytes_max": ('"16 MiB"', "16 MiB", 16 << 20, ['"x"', "-1"], "byte|than"),
    "random_request_bytes_max": ('"128 KiB"', "128KiB", 128 << 10, ['"x"', "-1"], "byte|than"),
    "hedge": ("false", "false", False, ['"perhaps"', "2"], "boolean"),
    "tasks_max": ("500", "500", 500, ["99", "100001"], "than"),
    "cache_read_threads": ("2", "2", 2, ["0", "257"], "than"),
    "cache_write_threads": ("2", "2", 2, ["0", "257"], "than"),
    "upper_threads": ("2", "2", 2, ["0", "257"], "than"),
    "decode_threads": ("4", "4", 4, ["0", "257"], "than"),
    "tables_memory_max": ('"1 MiB"', "1 MiB", 1 << 20, ['"x"', "1000"], "byte|than"),
    "open_files_max": ("100", "100", 100, ["15", "1000001"], "than"),
    "write_buffer_max": ('"1 MiB"', "1 MiB", 1 << 20, ['"x"', "-1"], "byte|than"),
    "hydrate": ("false", "false", False, ['"perhaps"', "2"], "boolean"),
    "hydrate_delay": ("5", "5", 5, ["-1", "86401"], "than"),
    "hash_rate": ('"10 MiB"', "10 MiB", 10 << 20, ['"x"', "-1"], "byte|than"),
    "hydrate_rate": ('"10 MiB"', "10 MiB", 10 << 20, ['"x"', "-1"], "byte|than"),
    "graduate": ("false", "0", False, ["true"], "set it to false"),
    "log_level": ('"DEBUG"', "DEBUG", "DEBUG", ['"debug"', '"LOUD"', "10"], "INFO"),
}  # fmt: skip
IMPOSSIBLE = [(key, value, row[4]) for key, row in KEYS.items() for value in row[3]]


@pytest.fixture(autouse=True)
def _no_file_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config_module, "CONFIG_PATH", tmp_path / "etc" / "lazyimg.toml")


def written(folder: Path, text: str) -> Path:
    path = folder / "lazyimg.toml"
    path.write_text(text)
    return path


def test_every_key_is_tested() -> None:
    """The table above has every key there is, and no other."""
    assert set(KEYS) == set(Config.model_fields)


@pytest.mark.parametrize("key", KEYS)
def test_key_is_read_from_file_environment_and_flags(key: str, tmp_path: Path) -> None:
    """Each key can be set in each place, and means the same there."""
    in_file, in_environment, wanted, _, _ = KEYS[key]
    from_file = load_config(written(tmp_path, f"{key} = {in_file}"), environ={})
    from_environment = load_config(None, environ={f"LAZYIMG_{key.upper()}": in_environment})
    from_flags = load_config(None, {key: wanted}, environ={})
    assert [getattr(config, key) for config in (from_file, from_environment, from_flags)] == [wanted] * 3


@pytest.mark.parametrize(("key", "value", "what_would_do"), IMPOSSIBLE)
def test_impossible_value_names_key_place_and_what_would_do(
    key: str, value: str, what_would_do: str, tmp_path: Path
) -> None:
    """One line with the key, the file it is in, and what would do."""
    path = written(tmp_path, f"{key} = {value}")
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ={})
    message = str(caught.value)
    assert message.startswith(f"config key {key!r} ({path}): ")
    assert re.search(what_would_do, message.partition(": ")[2])
    assert "\n" not in message


@pytest.mark.parametrize("key", KEYS)
def test_misspelt_key_is_refused_wherever_it_is(key: str, tmp_path: Path) -> None:
    """A key one letter off is refused by name in file and environment, and the known ones are listed."""
    path = written(tmp_path, f"{key}s = 1")
    with pytest.raises(
        ConfigError, match=rf"config key '{key}s' \({re.escape(str(path))}\): unknown; .*{key}"
    ):
        load_config(path, environ={})
    with pytest.raises(ConfigError, match=rf"config key '{key}s' \(environment\): unknown; .*{key}"):
        load_config(None, environ={f"LAZYIMG_{key.upper()}S": "1"})


def test_places_rise_in_order(tmp_path: Path) -> None:
    """The environment wins over the file, a flag over both; a flag that was not given says nothing."""
    path = written(tmp_path, "read_timeout = 1\nlookup_timeout = 1\nretry_pause_max = 1")
    environ = {"LAZYIMG_LOOKUP_TIMEOUT": "2", "LAZYIMG_RETRY_PAUSE_MAX": "2", "HOME": "/"}
    config = load_config(path, {"retry_pause_max": 3, "cloud": None, "read_timeout": None}, environ)
    assert (config.read_timeout, config.lookup_timeout, config.retry_pause_max) == (1, 2, 3)


def test_message_names_the_place_that_won(tmp_path: Path) -> None:
    """A bad flag over a good file is the command line's fault."""
    path = written(tmp_path, "requests_max = 5")
    with pytest.raises(ConfigError, match=r"'requests_max' \(command line\): .*not 0"):
        load_config(path, {"requests_max": 0}, {})


def test_place_of_glance_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """An endpoint flag over a file's cloud is not a contradiction; both in one place are."""
    path = written(tmp_path, 'cloud = "prod"')
    config = load_config(path, {"endpoint": ("http://a",)}, {})
    assert (config.endpoint, config.cloud) == (("http://a",), None)
    config = load_config(path, None, {"LAZYIMG_ENDPOINT": "http://a"})
    assert (config.endpoint, config.cloud) == (("http://a",), None)
    with pytest.raises(ConfigError, match="endpoint and cloud exclude each other: give one"):
        load_config(written(tmp_path, 'cloud = "prod"\nendpoint = "http://a"'), environ={})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "requests_max = 2\nbackground_requests_max = 3",
            "background_requests_max must not be above requests_max",
        ),
        ("request_bytes_max = 4096", "random_request_bytes_max must not be above request_bytes_max"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    """Each value alone would do; together they name both keys."""
    with pytest.raises(ConfigError, match=reason):
        load_config(written(tmp_path, text), environ={})


@pytest.mark.parametrize("content", [b"no = ", b"a = 1\na = 2", b"\xff\xfe", b"[section]\nview = 'stored'"])
def test_file_that_is_no_config_is_named(content: bytes, tmp_path: Path) -> None:
    """Text that is not TOML, or has a table where keys should be, is refused with the file's name."""
    path = tmp_path / "lazyimg.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_config(path, environ={})


def test_file_given_must_be_there(tmp_path: Path) -> None:
    """A file named with --config that is missing or a folder is refused; the default one may be missing."""
    with pytest.raises(ConfigError, match=r"none: No such file.*--config"):
        load_config(tmp_path / "none", environ={})
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path, environ={})


def test_default_file_is_read_if_it_is_there(tmp_path: Path) -> None:
    """Without --config the file in /etc counts, and is named in messages."""
    (tmp_path / "etc").mkdir()
    path = written(tmp_path / "etc", "read_timeout = 11")
    assert load_config(environ={}).read_timeout == 11
    path.write_text("read_timeout = 0")
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_config(environ={})


def test_variable_that_names_the_file_is_no_key() -> None:
    """LAZYIMG_CONFIG belongs to the command line."""
    assert load_config(None, environ={"LAZYIMG_CONFIG": "/x"}).read_timeout == 300


def test_config_cannot_be_changed() -> None:
    """What was checked at start stays as it was."""
    with pytest.raises(ValueError, match="frozen"):
        Config().requests_max = 5


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4096", 4096),
        ("20G", 20 * GIB),
        ("20g", 20 * GIB),
        (" 1 M ", 1 << 20),
        ("512K", 512 << 10),
        ("1T", 1 << 40),
        ("10 GiB", 10 * GIB),
        ("1.5G", 3 * GIB // 2),
    ],
)
def test_size_words_are_those_of_qemu_img(text: str, size_bytes: int) -> None:
    """A bare letter is a power of 1024."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", " ", "G", "0", "-1", "-1G", "x", "1X", "1 2", "0G", "1e400", "nan"])
def test_size_that_is_none_is_refused(text: str) -> None:
    """What is no positive number of bytes says what would do."""
    with pytest.raises(ConfigError, match="such as 20G"):
        parse_size(text)
