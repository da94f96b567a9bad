"""The configured upstreams, and which of them a job goes to. Pure but for files that hold keys.

One gateway needs two variables; several, or one with a switch, are TOML in DELTAWIRE_UPSTREAMS, or in the
file that DELTAWIRE_UPSTREAMS_FILE names, as in EXAMPLE.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from deltawire.environment import ConfigurationError, Environment
from deltawire.errors import WireError
from deltawire.tables import read_tables

EXAMPLE: Final = """\
[upstreams.azure]
base_url = "https://example.openai.azure.com/openai/deployments/gpt"   # ends before /chat/completions
api_key_env = "AZURE_KEY"                # or api_key_file = "/run/secrets/azure", or api_key = "…"
auth_header = "api-key"                  # takes the key alone; by default Authorization takes "Bearer …"
headers = { X-Team = "chat" }
query = { api-version = "2024-10-21" }
models = ["gpt-5.4"]                     # by default it takes whatever no other upstream lists
aliases = { fast = "gpt-5.4" }           # what requests may say instead
max_streams = 200                        # at a time, in each worker process; further jobs wait in order
stream_options = false                   # it refuses this field of requests (Mistral)
omit = ["service_tier"]                  # and these
done_completes = true                    # its streams end in [DONE] without any finish_reason
"""

_HEADER: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 §5.1
_OURS: Final = frozenset({"host", "content-length", "content-type", "transfer-encoding", "connection"})


class Upstream(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A configured gateway. `base_url` ends before `/chat/completions`; `api_key` is the key itself."""

    name: str
    base_url: str
    api_key: str = ""
    api_key_env: str = ""
    api_key_file: str = ""
    auth_header: str = "Authorization"
    headers: dict[str, str] = {}
    query: dict[str, str] = {}
    models: list[str] | None = None
    aliases: dict[str, str] = {}
    max_streams: int | None = None
    stream_options: bool = True
    omit: list[str] = []
    done_completes: bool = False

    def __repr__(self) -> str:
        return f"Upstream({self.name!r}, {self.base_url!r})"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must show nowhere. What is shorter than a key can be is a word like any other."""
        known = (self.api_key, *self.headers.values(), *self.query.values())
        return tuple(secret for secret in known if len(secret) >= 8)

    @property
    def names(self) -> tuple[str, ...]:
        """The models that requests can name, as far as that is configured."""
        return (*(self.models or ()), *self.aliases)

    def has(self, model: str) -> bool:
        return model in self.aliases or model in (self.models or ())


class Upstreams:
    """All of them, in the order of their configuration."""

    def __init__(self, upstreams: Iterable[Upstream]) -> None:
        self._by_name = {upstream.name: upstream for upstream in upstreams}

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._by_name.values())

    def __repr__(self) -> str:
        return repr(list(self._by_name.values()))

    def route(self, wanted: str, model: str) -> tuple[Upstream, str]:
        """The upstream for a job, and the model to name there.

        `wanted` is the job's option: `default` leaves it to the model. Raises WireError `unknown_upstream`
        and `model_not_found`.
        """
        upstream = self._by_name.get(wanted)
        if wanted == "default":
            open_to_all = (upstream for upstream in self if upstream.models is None)
            upstream = next((each for each in self if each.has(model)), None) or next(open_to_all, None)
            if upstream is None:
                message = f"no upstream has the model {model!r}"
                raise WireError("model_not_found", message, param="request.model")
        elif upstream is None:
            known = ", ".join(sorted(self._by_name))
            message = f"there is no upstream of this name; known are {known}"
            raise WireError("unknown_upstream", message, param="options.upstream")
        return upstream, upstream.aliases.get(model, model)


def read_upstreams(environment: Environment) -> Upstreams:
    """Those that are configured. Raises ConfigurationError that says what to change, and no secret."""
    if not environment.secret("DELTAWIRE_UPSTREAMS"):
        if not environment.is_set("DELTAWIRE_UPSTREAM_BASE_URL"):
            raise ConfigurationError(
                "DELTAWIRE_UPSTREAM_BASE_URL is not set: the gateway's address (https://…/v1); for several "
                "gateways set DELTAWIRE_UPSTREAMS_FILE instead"
            )
        base_url = environment.url("DELTAWIRE_UPSTREAM_BASE_URL", schemes=("https", "http"))
        api_key = environment.header_secret("DELTAWIRE_UPSTREAM_API_KEY")
        problem = _problem_of_url(base_url)
        if problem:
            raise ConfigurationError(f"DELTAWIRE_UPSTREAM_BASE_URL {problem}")
        return Upstreams([Upstream(name="default", base_url=base_url.rstrip("/"), api_key=api_key)])
    where = environment.source("DELTAWIRE_UPSTREAMS")
    if environment.is_set("DELTAWIRE_UPSTREAM_BASE_URL"):
        raise ConfigurationError(f"{where} and DELTAWIRE_UPSTREAM_BASE_URL are both set; unset one of them")
    return Upstreams(
        _checked(each, upstream, environment)
        for each, upstream in read_tables(environment, "DELTAWIRE_UPSTREAMS", "upstreams", Upstream)
    )


def _checked(where: str, upstream: Upstream, environment: Environment) -> Upstream:
    if problem := _problem(upstream):
        raise ConfigurationError(f"{where}: {problem}")
    key = _key(where, upstream, environment)
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            f"{where}: the key holds what cannot stand in a header (blanks, or other than ASCII)"
        )
    return msgspec.structs.replace(upstream, base_url=upstream.base_url.rstrip("/"), api_key=key)


def _key(where: str, upstream: Upstream, environment: Environment) -> str:
    ways = [way for way in ("api_key", "api_key_env", "api_key_file") if getattr(upstream, way)]
    if len(ways) > 1:
        raise ConfigurationError(f"{where}: {' and '.join(ways)} are both set; leave one")
    if upstream.api_key_env:
        key = environment.text(upstream.api_key_env)
        if not key:
            raise ConfigurationError(f"{where}: api_key_env names a variable that is not set")
        return key
    if upstream.api_key_file:
        try:
            key = Path(upstream.api_key_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{where}: api_key_file cannot be read: {type(error).__name__}"
            ) from None
        if not key:
            raise ConfigurationError(f"{where}: api_key_file is empty")
        return key
    return upstream.api_key


def _problem(upstream: Upstream) -> str:
    """What is wrong with the values of an upstream; empty if nothing is."""
    if problem := _problem_of_url(upstream.base_url):
        return f"base_url {problem}"
    for header in (*upstream.headers, upstream.auth_header):
        if not _HEADER.fullmatch(header) or header.lower() in _OURS:
            return f"headers: {header!r} cannot be set"
    has_key = upstream.api_key or upstream.api_key_env or upstream.api_key_file
    if has_key and upstream.auth_header.lower() in map(str.lower, upstream.headers):
        return f"headers: {upstream.auth_header!r} carries the key; leave it out, or set another auth_header"
    for header, value in upstream.headers.items():
        if not value.isascii() or not value.isprintable() or value != value.strip():
            return f"headers: the value of {header!r} cannot stand in a header"
    if upstream.models is not None:
        if not upstream.models:
            return "models lists none; leave it out for an upstream that takes any"
        for alias, model in upstream.aliases.items():
            if model not in upstream.models:
                return f"aliases: {alias!r} stands for a model that is not among its models"
    if upstream.max_streams is not None and upstream.max_streams < 1:
        return "max_streams must be 1 or more"
    if needed := sorted({"model", "messages", "stream"} & set(upstream.omit)):
        return f"omit: {needed[0]!r} cannot be left out"
    return ""


def _problem_of_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_right = False
    if not is_right or not url.isprintable() or " " in url:
        return "must be a URL (https://…, http://…)"
    if parts.username is not None or parts.password is not None:
        return "must hold no credentials; they have settings of their own"
    if parts.path.rstrip("/").endswith("/chat/completions"):
        return "must end before /chat/completions"
    if parts.query or parts.fragment:
        return "must end before the query; put it into `query` of a table in DELTAWIRE_UPSTREAMS"
    return ""
