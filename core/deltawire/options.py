"""What a job may ask for: its options and its request, checked with errors that say what to change."""

import re
from typing import Any, Final, Literal, get_args

import msgspec

from .errors import WireError

Restart = Literal["before_first_delta", "always", "never"]
OnAbandon = Literal["continue", "cancel"]
_CHOICES: Final = {"restart": get_args(Restart), "on_abandon": get_args(OnAbandon)}
MAX_DURATION_S = 86_400.0
MAX_MODEL_CHARACTERS = 512
FIRST: Final = 9
"""The priority of jobs that come before those of any other."""
TENANT_RULE: Final = "1 to 64 of A-Z a-z 0-9 . _ @ -"
_TENANT: Final = re.compile(r"[A-Za-z0-9._@-]{1,64}")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """A job's options (PROTOCOL.md §1.2). Durations are seconds, above 0 and at most a day."""

    queue_timeout_s: float = 3600
    timeout_s: float = 600
    first_delta_timeout_s: float = 120
    idle_timeout_s: float = 60
    retention_s: float = 3600
    max_attempts: int = 2
    max_retries: int = 3
    max_retry_wait_s: float = 600
    restart: Restart = "before_first_delta"
    on_abandon: OnAbandon = "continue"
    abandon_grace_s: float = 15
    upstream: str = "default"
    tenant: str = "default"
    priority: int = FIRST
    metadata: dict[str, str] = {}


_WHOLE: Final = {field.name for field in msgspec.structs.fields(Options) if field.type is int}


def is_tenant(name: str) -> bool:
    """Whether `name` may name a tenant. It stands in Redis keys and in log lines."""
    return _TENANT.fullmatch(name) is not None


def parse_options(value: Any, *, from_http: bool = False) -> Options:  # whatever JSON somebody sent
    """The options in `value` (None: all defaults). Raises WireError that names the field at fault."""
    if value is None:
        return Options()
    if not isinstance(value, dict):
        raise WireError("invalid_request", "options must be an object", param="options")
    known = set(Options.__struct_fields__) - ({"tenant"} if from_http else set())
    for name in value:
        if name not in known:
            hint = "; over HTTP the credential says it" if name == "tenant" else ""
            raise WireError(
                "unknown_option",
                f"there is no option {name!r} here{hint}; known are {', '.join(sorted(known))}",
                param=f"options.{name}",
            )
    for name, choices in _CHOICES.items():
        # Here, because msgspec's message repeats the value, and messages may go where it should not.
        if value.get(name, choices[0]) not in choices:
            raise WireError(
                "invalid_request",
                f"options.{name} must be one of {', '.join(choices)}",
                param=f"options.{name}",
            )
    # JSON does not tell 2.0 from 2, nor do all that write it.
    whole = {n: int(v) for n, v in value.items() if n in _WHOLE and isinstance(v, float) and v.is_integer()}
    try:
        options = msgspec.convert(value | whole, Options)
    except msgspec.ValidationError as error:
        raise WireError("invalid_request", f"options: {error}", param="options") from error
    for name in (field for field in Options.__struct_fields__ if field.endswith("_s")):
        value = getattr(options, name)
        may_be_0 = name == "abandon_grace_s"
        if not (0 < value <= MAX_DURATION_S or (may_be_0 and value == 0)):
            raise WireError(
                "invalid_request",
                f"options.{name} must be {'0 or more' if may_be_0 else 'above 0'} and at most "
                f"{MAX_DURATION_S:.0f} seconds",
                param=f"options.{name}",
            )
    for name, minimum, maximum in (("max_attempts", 1, 10), ("max_retries", 0, 10), ("priority", 0, FIRST)):
        if not minimum <= getattr(options, name) <= maximum:
            raise WireError(
                "invalid_request",
                f"options.{name} must be {minimum} to {maximum}",
                param=f"options.{name}",
            )
    if not is_tenant(options.tenant):
        raise WireError("invalid_request", f"options.tenant must be {TENANT_RULE}", param="options.tenant")
    return options


def check_request(request: Any) -> dict[str, Any]:  # whatever JSON somebody sent
    """The chat.completions body, checked for what we rely on; the gateway judges the rest."""
    if not isinstance(request, dict):
        raise WireError(
            "invalid_request", "request must be a chat.completions body (an object)", param="request"
        )
    model = request.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= MAX_MODEL_CHARACTERS:
        raise WireError("invalid_request", "request.model must be a model's name", param="request.model")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise WireError(
            "invalid_request", "request.messages must be an array with a message", param="request.messages"
        )
    stream_options = request.get("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise WireError(
            "invalid_request", "request.stream_options must be an object", param="request.stream_options"
        )
    return request
