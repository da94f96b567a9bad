"""The relay's settings, read once from the environment (docs/configuration.md lists them all)."""

import ipaddress
from collections.abc import Callable
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from deltawire.environment import ConfigurationError, Environment
from deltawire.loopback import is_loopback
from deltawire.options import MAX_DURATION_S
from deltawire.settings import ServiceSettings
from deltawire.tokens import AUDIENCE, Key, PyJWTMissingError, public_keys, secret_key
from deltawire.variables import PORT, Variable, integer, read_settings

from .limits import Bounds, IPNetwork
from .origins import check_origin

_DEFAULT: Final = Bounds()
_COUNT: Final = integer(0, 1_000_000)


def _public_url(environment: Environment, name: str, default: str) -> str:
    return environment.text(name, default).rstrip("/")


def _is_set(environment: Environment, name: str, _: bool) -> bool:
    return environment.is_set(name)


def _is_on(environment: Environment, name: str, default: bool) -> bool:
    return environment.integer(name, int(default), minimum=0, maximum=1) == 1


def _origins(environment: Environment, name: str, _: Any) -> tuple[str, ...]:
    try:
        return tuple(check_origin(origin) for origin in environment.words(name))
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None


def _jwt_secrets(environment: Environment, name: str, _: Any) -> tuple[str, ...]:
    secrets = tuple(environment.secret(name).split())
    _keys_in(environment, name, lambda: tuple(map(secret_key, secrets)))
    return secrets


def _jwt_public_keys(environment: Environment, name: str, _: Any) -> tuple[Key, ...]:
    text = environment.secret(name)
    return _keys_in(environment, name, lambda: public_keys(text)) if text else ()


def _keys_in(environment: Environment, name: str, read: Callable[[], tuple[Key, ...]]) -> tuple[Key, ...]:
    try:
        return read()
    except (ConfigurationError, PyJWTMissingError) as error:
        raise ConfigurationError(f"{environment.source(name)}: {error}") from error


def _jwks_url(environment: Environment, name: str, _: Any) -> str:
    url = environment.text(name)
    if not url:
        return ""
    parts = urlsplit(environment.url(name, schemes=("https", "http")))
    if not parts.hostname or (parts.scheme == "http" and not is_loopback(parts.hostname)):
        raise ConfigurationError(f"{name} must be https, or http on loopback: who changes the keys is let in")
    return url


def _networks(environment: Environment, name: str, _: Any) -> tuple[IPNetwork, ...]:
    try:
        return tuple(ipaddress.ip_network(word) for word in environment.words(name))
    except ValueError as error:
        raise ConfigurationError(
            f"{name} must be addresses or networks, such as 10.0.0.7 or 10.0.0.0/24: {error}"
        ) from None


def _grace_s(environment: Environment, name: str, default: float) -> float | None:
    if environment.text(name) == "never":
        return None
    value = environment.number(name, default)
    if value > MAX_DURATION_S:
        raise ConfigurationError(f"{name} must be at most {MAX_DURATION_S:.0f}, or never")
    return value


class Settings(ServiceSettings, frozen=True, kw_only=True):
    port: Annotated[
        int,
        Variable(
            "DELTAWIRE_PORT",
            "The relay's port. With docker compose: the port on this machine's loopback.",
            PORT,
        ),
    ] = 8080
    has_console: Annotated[
        bool,
        Variable(
            "DELTAWIRE_CONSOLE",
            "The page at the relay's `/`: 1, or 0 to have none. It needs no credential, what it shows does.",
            _is_on,
            default="1",
        ),
    ] = True
    public_url: Annotated[
        str,
        Variable(
            "DELTAWIRE_PUBLIC_URL",
            "The relay's address as clients see it, put before the paths in `urls`; without it they are "
            "relative. The command line looks for the relay there, by default on this machine at "
            "`DELTAWIRE_PORT`.",
            _public_url,
        ),
    ] = ""
    allowed_origins: Annotated[
        tuple[str, ...],
        Variable(
            "DELTAWIRE_ALLOWED_ORIGINS",
            "Web origins whose pages may use the relay, separated by commas: exact ones "
            "(`https://app.example.com`, no slash at the end), or `https://*.example.com` for all below a "
            "name.",
            _origins,
        ),
    ] = ()
    jwt_secrets: Annotated[
        tuple[str, ...],
        Variable(
            "DELTAWIRE_JWT_SECRET",
            "The secret of tokens for clients (HS256), at least 32 bytes: `openssl rand -base64 32`. With it "
            "the relay makes tokens, too. Several, separated by blanks or lines, for rotation: the first one "
            "signs, all verify. See docs/authentication.md.",
            _jwt_secrets,
            is_secret=True,
        ),
    ] = ()
    jwt_public_keys: Annotated[
        tuple[Key, ...],
        Variable(
            "DELTAWIRE_JWT_PUBLIC_KEY",
            "The public keys of tokens that others sign: PEM blocks, RSA (RS256) or Ed25519 (EdDSA).",
            _jwt_public_keys,
            is_secret=True,
        ),
    ] = ()
    jwt_jwks_url: Annotated[
        str,
        Variable(
            "DELTAWIRE_JWT_JWKS_URL",
            "Where an issuer of tokens publishes its keys (a JSON Web Key Set), `https://…`.",
            _jwks_url,
        ),
    ] = ""
    jwt_audience: Annotated[
        str, Variable("DELTAWIRE_JWT_AUDIENCE", "What the `aud` of a token must be, or have among others.")
    ] = AUDIENCE
    jwt_issuer: Annotated[
        str, Variable("DELTAWIRE_JWT_ISSUER", "What the `iss` of a token must be; by default anything.")
    ] = ""
    chat_abandon_grace_s: Annotated[
        float | None,  # None: never
        Variable(
            "DELTAWIRE_CHAT_ABANDON_GRACE_S",
            "Seconds that a job of the OpenAI API (`/v1/chat/completions`) outlives its last reader "
            "before it is cancelled; 0 is at once, `never` lets it run to its end. A request can say "
            "otherwise.",
            _grace_s,
        ),
    ] = 2.0
    max_connections: Annotated[
        int,
        Variable(
            "DELTAWIRE_MAX_CONNECTIONS",
            "How many WebSockets, event streams and completions a relay process has at a time; further ones "
            "get 503. An eighth more of bare connections is let in for commands and probes. 0: as many as "
            "the limit on open files leaves, which is also the most that there can be.",
            _COUNT,
        ),
    ] = _DEFAULT.max_connections
    max_connections_per_ip: Annotated[
        int,
        Variable(
            "DELTAWIRE_MAX_CONNECTIONS_PER_IP",
            "How many of those one address has in a process (of IPv6: one /64); further ones get 429, or "
            "close code 4504. This machine and the trusted proxies are not counted. 0: no limit.",
            _COUNT,
        ),
    ] = _DEFAULT.max_connections_per_ip
    max_connections_per_subject: Annotated[
        int,
        Variable(
            "DELTAWIRE_MAX_CONNECTIONS_PER_SUBJECT",
            "How many of those one token's `sub` has in a process; API keys and their names, behind which "
            "many users may be, are not counted. 0: no limit.",
            _COUNT,
        ),
    ] = _DEFAULT.max_connections_per_subject
    handshakes_per_s: Annotated[
        int,
        Variable(
            "DELTAWIRE_HANDSHAKES_PER_S",
            "How many WebSockets may be opened per second, twice as many at once, and a tenth of that by one "
            "address; further ones get 503. 0: no limit.",
            _COUNT,
        ),
    ] = _DEFAULT.handshakes_per_s
    max_subscriptions: Annotated[
        int,
        Variable("DELTAWIRE_MAX_SUBSCRIPTIONS", "How many jobs one WebSocket watches. 0: no limit.", _COUNT),
    ] = _DEFAULT.max_subscriptions
    messages_per_s: Annotated[
        int,
        Variable(
            "DELTAWIRE_MESSAGES_PER_S",
            "How many messages and pings one WebSocket sends per second, after its first thousand; else it "
            "is closed with 4013. 0: no limit.",
            _COUNT,
        ),
    ] = _DEFAULT.messages_per_s
    max_message_bytes: Annotated[
        int,
        Variable(
            "DELTAWIRE_MAX_MESSAGE_BYTES",
            "The largest message that a WebSocket may send us.",
            integer(1_024, 16_777_216),
        ),
    ] = _DEFAULT.max_message_bytes
    max_body_bytes: Annotated[
        int,
        Variable(
            "DELTAWIRE_MAX_BODY_BYTES",
            "The largest body of a request.",
            integer(1_024, 1_073_741_824),
        ),
    ] = _DEFAULT.max_body_bytes
    trusted_proxies: Annotated[
        tuple[IPNetwork, ...],
        Variable(
            "DELTAWIRE_TRUSTED_PROXIES",
            "Addresses and networks of your proxies, separated by commas: `10.0.0.7, 172.16.0.0/12`. What "
            "they say in `X-Forwarded-For` is taken for the client's address; without it all that comes "
            "through a proxy counts as one client.",
            _networks,
        ),
    ] = ()

    @property
    def bounds(self) -> Bounds:
        return Bounds(**{name: getattr(self, name) for name in Bounds.__struct_fields__})

    has_webhooks: Annotated[
        bool,
        Variable(
            "DELTAWIRE_WEBHOOKS",
            "Whether there are any: then the ends of jobs are noted that no worker gets to see.",
            _is_set,
            is_secret=True,
            default="",
        ),
    ] = False

    def __repr__(self) -> str:
        # URLs may carry passwords.
        return (
            f"Settings(host={self.host!r}, port={self.port}, api_keys={[key.name for key in self.api_keys]})"
        )

    @property
    def takes_tokens(self) -> bool:
        """Whether there is any key for them, or a place to get some."""
        return bool(self.jwt_secrets or self.jwt_public_keys or self.jwt_jwks_url)

    @classmethod
    def from_environment(cls, environment: Environment) -> "Settings":
        """Raises ConfigurationError that says what to set."""
        settings = read_settings(cls, environment)
        if not (settings.api_keys or settings.takes_tokens or is_loopback(settings.host)):
            raise ConfigurationError(
                f"without an API key the relay serves loopback only, and DELTAWIRE_HOST is {settings.host}: "
                "make one (`deltawire keys new`) and set DELTAWIRE_API_KEYS (or DELTAWIRE_JWT_SECRET and its "
                "like, for clients with tokens alone), or set DELTAWIRE_HOST=127.0.0.1"
            )
        return settings
