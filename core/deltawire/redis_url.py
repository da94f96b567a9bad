"""Where Redis is, as one URL says it. Pure.

    redis://[user:password@]host:port[/db]     one server; also rediss:// (TLS) and unix:///path
    redis+sentinel://[user:password@]host:port[,host:port…]/master_name[/db]
    redis+cluster://[user:password@]host:port[,host:port…]

The latter two have rediss+… forms as well. Their hosts are the sentinels, or some of the cluster's nodes.
Options (`?ssl_ca_certs=…`) are redis-py's and hold for every server behind the URL.
"""

from typing import Final, Literal
from urllib.parse import unquote, urlsplit

import msgspec

SERVER_SCHEMES: Final = ("redis", "rediss", "unix")
SENTINEL_SCHEMES: Final = ("redis+sentinel", "rediss+sentinel")
CLUSTER_SCHEMES: Final = ("redis+cluster", "rediss+cluster")
DEFAULT_PORT: Final = 6379
DEFAULT_SENTINEL_PORT: Final = 26379

FORMS: Final = (
    "redis://host:port/db, rediss://…, unix:///path, "
    "redis+sentinel://host:port,host:port/master_name/db or redis+cluster://host:port,host:port"
)


class RedisUrl(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed URL. `hosts` is empty for a single server, which `url` itself is the address of."""

    kind: Literal["server", "sentinel", "cluster"]
    url: str
    scheme: str  # of each server
    credentials: str = ""  # as they stand in the URL, with the @
    hosts: tuple[tuple[str, int], ...] = ()
    master_name: str = ""
    db: int = 0
    query: str = ""

    def __repr__(self) -> str:
        return f"RedisUrl(kind={self.kind!r}, hosts={self.hosts!r})"  # the rest may hold a password

    def server_url(self, host: str, port: int) -> str:
        """The URL of a server behind this one: a primary that sentinels name, or a node."""
        return self._url(host, port, self.credentials, f"/{self.db}")

    def sentinel_url(self, host: str, port: int) -> str:
        """The URL of a sentinel. It gets the password, which one that has none ignores, but no user's:
        users are those of the data's servers.
        """
        return self._url(host, port, self.credentials if self.credentials.startswith(":") else "")

    def _url(self, host: str, port: int, credentials: str, path: str = "") -> str:
        address = f"[{host}]" if ":" in host else host
        return f"{self.scheme}://{credentials}{address}:{port}{path}{self.query}"


def parse(url: str) -> RedisUrl:
    """Raises ValueError, which says what is wrong and repeats nothing of the URL: it may hold a password."""
    try:
        parts = urlsplit(url)
        is_right = parts.scheme not in SERVER_SCHEMES or parts.port != 0
    except ValueError:
        is_right = False
    if not is_right:
        raise ValueError(f"must be a URL: {FORMS}")
    if parts.scheme in SERVER_SCHEMES:
        return RedisUrl(kind="server", url=url, scheme=parts.scheme)
    userinfo, at, hosts = parts.netloc.rpartition("@")
    path = [unquote(segment) for segment in parts.path.split("/")[1:] if segment]
    master_name, db = "", 0
    if parts.scheme in SENTINEL_SCHEMES:
        match path:
            case [master_name]:
                pass
            case [master_name, number] if number.isdecimal():
                db = int(number)
            case _:
                raise ValueError("must end in /master_name or /master_name/db, in the sentinels' words")
    elif parts.scheme not in CLUSTER_SCHEMES:
        raise ValueError(f"must be a URL: {FORMS}")
    elif path not in ([], ["0"]):
        raise ValueError("must have no path: a cluster has one database only")
    return RedisUrl(
        kind="sentinel" if master_name else "cluster",
        url=url,
        scheme=parts.scheme.partition("+")[0],
        credentials=userinfo + at,
        hosts=_hosts(hosts, DEFAULT_SENTINEL_PORT if master_name else DEFAULT_PORT),
        master_name=master_name,
        db=db,
        query=f"?{parts.query}" if parts.query else "",
    )


def _hosts(netloc: str, default_port: int) -> tuple[tuple[str, int], ...]:
    hosts: list[tuple[str, int]] = []
    for item in netloc.split(","):
        try:
            parts = urlsplit(f"//{item}")
            port = parts.port
        except ValueError:
            port, parts = 0, urlsplit("")
        if not parts.hostname or port == 0 or parts.path:
            raise ValueError("must name host:port, or several of them with commas between")
        hosts.append((parts.hostname, port or default_port))
    return tuple(hosts)
