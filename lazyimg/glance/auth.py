"""Where Glance is and what proves who we are: an `Access`, kept fresh.

Owner of openstacksdk, which is imported at the first login and not before: it takes half a second, and a
restarted daemon must serve at once.  Guards: one renewal for all who wait, a valid token is never given up
because its renewal failed, and no secret in a repr, a message, a log or the frames of a traceback.
"""

from __future__ import annotations

import calendar
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import urlsplit

import trio

from lazyimg.config import Config
from lazyimg.errors import ConfigError, CredentialsRefused, GlanceUnavailable, LazyImgError
from lazyimg.glance.tls import Tls

if TYPE_CHECKING:
    from openstack.config.cloud_region import CloudRegion

logger = logging.getLogger(__name__)
_E = TypeVar("_E", bound=BaseException)

# A token is renewed this long before it ends; one that lives less than twice as long, at half its life.
RENEW_AHEAD_S = 180.0
# Pause after a renewal ahead of time that failed: the old token still serves, Keystone need not be pressed.
AHEAD_RETRY_PAUSE_S = 15.0
# Longest wait of the one request that renews ahead of time; the others go on with the old token meanwhile.
AHEAD_TIMEOUT_S = 5.0
# Longest wait for a login that somebody needs.
LOGIN_TIMEOUT_S = 30.0
# What one HTTP exchange of the SDK may take, unless the cloud's own api_timeout says otherwise: without it an
# abandoned login would hold its thread for ever.
SDK_TIMEOUT_S = 20.0
# Glance answers 401 to good tokens too while it cannot reach Keystone; without a pause each of its answers
# would cost a login.
REFUSED_RETRY_PAUSE_S = 5.0
# Pauses after a failed login, in which its outcome is repeated: many requests that find Keystone down ask it
# once a second, and a wrong password is not sent often enough to get the account locked.
FAILURE_RETRY_PAUSE_S = 1.0
REFUSAL_RETRY_PAUSE_S = 20.0
# One login runs and one hung one may still be ending.
LOGIN_THREADS = 2

# These write request lines at INFO and headers, bodies or frames at DEBUG.
_TALKATIVE_LOGGERS = (
    "httpx",
    "httpcore",
    "hpack",
    "keystoneauth",
    "urllib3",
    "requests",
    "openstack",
    "stevedore",
)


@dataclass(frozen=True, slots=True)
class Access:
    """What a request to Glance needs.

    endpoints: base URLs without a slash or /v2 at the end, to be tried in turn.
    headers: what authenticates a request; secret.
    expires_at_s: Unix time at which the headers stop being valid; None: never, or unknown.
    tls: None means the system's certificates.
    """

    endpoints: tuple[str, ...]
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    issued_at_s: float = 0.0
    expires_at_s: float | None = None
    tls: Tls | None = field(default=None, repr=False)


class Auth(Protocol):
    """Gives access, and another one when Glance refuses it."""

    async def access(self) -> Access:
        """Return an access that is valid as far as we know, logging in or renewing when needed.

        Raises ConfigError, CredentialsRefused or GlanceUnavailable.
        """
        ...

    async def renew(self, refused: Access) -> Access:
        """Return an access other than the one Glance answered 401 to; callers at one time share one login.

        Raises as `access` does.
        """
        ...


def make_auth(config: Config) -> Auth:
    """Return the Auth that the configuration asks for; only the endpoints' syntax and files are judged yet."""
    if config.key_file is not None and config.cert_file is None:
        raise ConfigError("key_file: give cert_file too, the certificate that it is the key of")
    if not config.endpoint:
        if config.ca_file is not None or config.cert_file is not None:
            raise ConfigError(
                "ca_file and cert_file go with endpoint; a cloud has cacert and cert in clouds.yaml"
            )
        return KeystoneAuth(config.cloud)
    if config.ca_file is None and config.cert_file is None:
        return NoAuth(config.endpoint)
    authorities = True if config.ca_file is None else str(config.ca_file)
    return NoAuth(
        config.endpoint, Tls(authorities, [str(f) for f in (config.cert_file, config.key_file) if f])
    )


class NoAuth:
    """Bare endpoints, tried in turn, that ask for no token."""

    def __init__(self, endpoints: Sequence[str], tls: Tls | None = None) -> None:
        self._access = Access(tuple(base_url(endpoint) for endpoint in endpoints), tls=tls)

    async def access(self) -> Access:
        """Return the endpoints."""
        return self._access

    async def renew(self, refused: Access) -> Access:
        """Raise GlanceUnavailable: there is nothing to renew."""
        raise GlanceUnavailable(
            f"Glance at {refused.endpoints[0]} asks for a token (401); name a cloud with --cloud"
        )


class KeystoneAuth:
    """Logs in through openstacksdk: clouds.yaml, OS_CLOUD or OS_*, and every plugin Keystone has.

    `login` blocks and returns a new Access each time; it runs in a thread.
    """

    def __init__(
        self,
        cloud: str | None,
        *,
        login: Callable[[], Access] | None = None,
        wall_clock: Callable[[], float] = time.time,
        login_timeout_s: float = LOGIN_TIMEOUT_S,
    ) -> None:
        self._name = f"cloud {cloud!r}" if cloud else "the cloud of OS_*"
        self._login = login or SdkLogin(cloud)
        self._wall_clock = wall_clock
        self._login_timeout_s = login_timeout_s
        self._limiter = trio.CapacityLimiter(LOGIN_THREADS)
        # The lock is held during a login.  `_access`, `_failure` and `_login_not_before` change together,
        # without an await between, before it is released: who waited for it takes that outcome for its own.
        self._lock = trio.Lock()
        self._access: Access | None = None
        self._failure: LazyImgError | None = None
        self._login_not_before = -math.inf
        self._ahead_not_before = -math.inf
        self._refused_not_before = -math.inf
        quiet_loggers()

    async def access(self) -> Access:
        """Return the current access; the first caller logs in, one caller renews it ahead of its end."""
        current = self._access
        if current is None or self._is_over(current):
            return await self._another_than(current, self._login_timeout_s)
        if (
            self._ends_soon(current)
            and not self._lock.locked()
            and trio.current_time() >= self._ahead_not_before
        ):
            self._ahead_not_before = trio.current_time() + AHEAD_RETRY_PAUSE_S
            try:
                return await self._another_than(current, AHEAD_TIMEOUT_S)
            except LazyImgError as exc:
                logger.warning("renewing the token ahead of its end failed; the old one serves on: %s", exc)
        return current

    async def renew(self, refused: Access) -> Access:
        """Return another access than the refused one, at most one login in REFUSED_RETRY_PAUSE_S."""
        now_s = trio.current_time()
        if self._access is refused and not self._lock.locked():
            if now_s < self._refused_not_before and self._failure is None:
                raise GlanceUnavailable(
                    f"Glance refuses a token that {self._name} just gave (401); does it reach Keystone?",
                    retry_after_s=self._refused_not_before - now_s,
                )
            self._refused_not_before = now_s + REFUSED_RETRY_PAUSE_S
        return await self._another_than(refused, self._login_timeout_s)

    async def _another_than(self, old: Access | None, timeout_s: float) -> Access:
        async with self._lock:
            if self._access is not None and self._access is not old:
                return self._access
            if self._failure is not None and trio.current_time() < self._login_not_before:
                raise _same(self._failure) from self._failure.__cause__
            try:
                with trio.fail_after(timeout_s):
                    fresh = await trio.to_thread.run_sync(
                        self._login, abandon_on_cancel=True, limiter=self._limiter
                    )
            except trio.TooSlowError:
                failure: LazyImgError = GlanceUnavailable(
                    f"{self._name}: Keystone did not answer a login in {timeout_s:g} s; is it reachable?"
                )
            except LazyImgError as exc:
                failure = exc
            else:
                self._access, self._failure = fresh, None
                return fresh
            is_refusal = isinstance(failure, CredentialsRefused)
            pause_s = REFUSAL_RETRY_PAUSE_S if is_refusal else FAILURE_RETRY_PAUSE_S
            self._failure, self._login_not_before = failure, trio.current_time() + pause_s
            raise _same(failure) from failure.__cause__

    def _is_over(self, access: Access) -> bool:
        return access.expires_at_s is not None and self._wall_clock() >= access.expires_at_s

    def _ends_soon(self, access: Access) -> bool:
        if access.expires_at_s is None:
            return False
        ahead_s = min(RENEW_AHEAD_S, (access.expires_at_s - access.issued_at_s) / 2)
        return self._wall_clock() >= access.expires_at_s - ahead_s


class SdkLogin:
    """One login through openstacksdk per call; blocking, so call it in a thread."""

    def __init__(self, cloud: str | None) -> None:
        self._cloud = cloud
        self._name = f"cloud {cloud!r}" if cloud else "the cloud of OS_*"
        self._region: CloudRegion | None = None

    def __repr__(self) -> str:
        return f"SdkLogin({self._cloud!r})"

    def __call__(self) -> Access:
        """Return a new Access.  Raises ConfigError, CredentialsRefused or GlanceUnavailable."""
        from keystoneauth1 import exceptions as keystone_errors

        region = self._region = self._region or self._load()
        try:
            return self._log_in(region)
        except keystone_errors.Unauthorized as exc:
            # The next try reads clouds.yaml anew: the operator may have corrected it.
            self._region = None
            raise CredentialsRefused(
                f"{self._name}: Keystone does not accept the credentials; correct clouds.yaml or OS_*"
            ) from without_frames(exc)
        except keystone_errors.AuthPluginException as exc:
            raise ConfigError(
                f"{self._name}: {_line(exc)}; complete clouds.yaml or OS_*"
            ) from without_frames(exc)
        except keystone_errors.ClientException as exc:
            raise GlanceUnavailable(f"{self._name}: login failed: {_line(exc)}") from without_frames(exc)

    def _load(self) -> CloudRegion:
        import openstack.config
        import openstack.exceptions
        from keystoneauth1 import exceptions as keystone_errors

        # The import creates these loggers and may set their levels.
        quiet_loggers()
        advice = "name a cloud of clouds.yaml with --cloud, set OS_*, or give --endpoint"
        try:
            region = openstack.config.OpenStackConfig().get_one(cloud=self._cloud)
            if region.config.get("api_timeout") is None:
                region.config["api_timeout"] = SDK_TIMEOUT_S
            region.get_session()
            return region
        except (openstack.exceptions.ConfigException, keystone_errors.ClientException) as exc:
            raise ConfigError(f"{self._name}: {_line(exc)}; {advice}") from without_frames(exc)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as exc:
            # A broken file; the SDK lets such errors through, and their text may quote the file's secrets.
            raise ConfigError(f"{self._name}: cannot be read ({type(exc).__name__}); {advice}") from None
        except Exception as exc:
            # PyYAML's errors, told by their module: it belongs to the SDK, not to us.
            if not type(exc).__module__.startswith("yaml"):
                raise
            raise ConfigError(f"{self._name}: clouds.yaml is not YAML; {advice}") from None

    def _log_in(self, region: CloudRegion) -> Access:
        session = region.get_session()
        session.invalidate()
        headers = session.get_auth_headers() or {}
        endpoint = region.get_session_endpoint("image")
        if not endpoint:
            where = f"region {region.get_region_name('image')!r}, interface {region.get_interface('image')!r}"
            raise GlanceUnavailable(
                f"{self._name}: no image endpoint in the catalog for {where}; correct clouds.yaml or OS_*"
            )
        expires_at_s = None
        # Only Keystone's own plugins know when a token ends; "none" and "http_basic" have none.
        get_access = getattr(session.auth, "get_access", None)
        if get_access is not None and (expires := get_access(session).expires) is not None:
            expires_at_s = float(calendar.timegm(expires.utctimetuple()))
        return Access(
            (base_url(str(endpoint)),),
            headers,
            time.time(),
            expires_at_s,
            self._tls_of(*region.get_requests_verify_args()),
        )

    def _tls_of(self, verify: bool | str | None, cert: str | tuple[str, str] | None) -> Tls | None:
        if verify in (True, None) and cert is None:
            return None
        return Tls(
            verify, [cert] if isinstance(cert, str) else cert or [], keys="cacert, cert or key of the cloud"
        )


def base_url(endpoint: str) -> str:
    """Return the endpoint without /v2 or slash at its end.  Raises ConfigError unless it is plain http(s)."""
    try:
        parts = urlsplit(endpoint)
        has_user, host = "@" in parts.netloc, parts.hostname
        _ = parts.port
    except ValueError:
        has_user, host = False, None
    if has_user:
        # Such a password would be in every log line and error that names the endpoint.
        raise ConfigError("endpoint: a URL with user or password is refused; use --cloud with http_basic")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(f"endpoint {endpoint!r}: give a URL such as http://glance:9292")
    return endpoint.rstrip("/").removesuffix("/v2").rstrip("/")


def quiet_loggers() -> None:
    """Keep the libraries that handle tokens from logging below WARNING, whatever the root logger says."""
    for name in _TALKATIVE_LOGGERS:
        talkative = logging.getLogger(name)
        if talkative.level < logging.WARNING:
            talkative.setLevel(logging.WARNING)


def without_frames(exc: _E) -> _E:
    """Return `exc` with no traceback in it or in what it is chained to.

    The frames of HTTP libraries hold requests with tokens: a traceback that prints locals would show them.
    """
    todo: list[BaseException | None] = [exc]
    seen: set[int] = set()
    while todo:
        chained = todo.pop()
        if chained is not None and id(chained) not in seen:
            seen.add(id(chained))
            chained.__traceback__ = None
            todo += [chained.__cause__, chained.__context__]
    return exc


def _same(failure: LazyImgError) -> LazyImgError:
    # Each waiter raises its own object: one object raised in many tasks would gather all their tracebacks.
    if isinstance(failure, GlanceUnavailable):
        return GlanceUnavailable(str(failure), retry_after_s=failure.retry_after_s)
    return type(failure)(str(failure))


def _line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(exc).__name__
