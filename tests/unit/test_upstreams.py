"""Upstreams as they are configured, what is refused at the start, and which of them a job goes to."""

import json
from pathlib import Path

import pytest

from deltawire.environment import ConfigurationError, Environment
from deltawire.errors import WireError
from deltawire_worker.settings import Settings
from deltawire_worker.upstream import request_body
from deltawire_worker.upstreams import Upstream, Upstreams, read_upstreams

KEY = "sk-live-0123456789abcdef"
URL = 'base_url = "https://gateway.example/v1"\n'
ALL = """
[upstreams.azure]
base_url = "https://x.openai.azure.com/openai/deployments/gpt/"
api_key_env = "AZURE_KEY"
auth_header = "api-key"
query = { api-version = "2024-10-21" }
headers = { X-Team = "chat", Authorization = "Basic Z2F0ZXdheTpodW50ZXIy" }
models = ["gpt-5.4", "gpt-5.4-mini"]
aliases = { fast = "gpt-5.4-mini" }
max_streams = 200

[upstreams."mistral-eu.1"]
base_url = "https://api.mistral.ai/v1"
api_key = "sk-inline-0123456789"
stream_options = false
omit = ["service_tier"]
done_completes = true
"""


def read(text: str, **variables: str) -> Upstreams:
    return read_upstreams(Environment({"DELTAWIRE_UPSTREAMS": text, **variables}))


def test_every_key_arrives() -> None:
    """Each under its documented name, in the order of the file."""
    azure, mistral = read(ALL, AZURE_KEY=KEY)
    assert (azure.name, azure.base_url) == ("azure", "https://x.openai.azure.com/openai/deployments/gpt")
    assert (azure.api_key, azure.auth_header, azure.query) == (KEY, "api-key", {"api-version": "2024-10-21"})
    assert azure.headers["X-Team"] == "chat"
    assert (azure.models, azure.aliases) == (["gpt-5.4", "gpt-5.4-mini"], {"fast": "gpt-5.4-mini"})
    assert (azure.max_streams, azure.stream_options, azure.done_completes) == (200, True, False)
    assert (mistral.name, mistral.api_key, mistral.models) == ("mistral-eu.1", "sk-inline-0123456789", None)
    assert (mistral.stream_options, mistral.omit, mistral.done_completes) == (False, ["service_tier"], True)


def test_the_table_may_be_a_file_and_so_may_its_keys(tmp_path: Path) -> None:
    """As Docker and Kubernetes hand them out."""
    (tmp_path / "key").write_text(f"{KEY}\n")
    (tmp_path / "upstreams.toml").write_text(f"[upstreams.a]\n{URL}api_key_file = '{tmp_path}/key'\n")
    [upstream] = read_upstreams(Environment({"DELTAWIRE_UPSTREAMS_FILE": str(tmp_path / "upstreams.toml")}))
    assert upstream.api_key == KEY


WRONG = {
    "no table": ("", "DELTAWIRE_UPSTREAM_BASE_URL"),
    "not TOML": ("[upstreams.a", "DELTAWIRE_UPSTREAMS is not TOML"),
    "another table": (f"[upstreams.a]\n{URL}[other]\n", "nothing else"),
    "no upstream": ("[upstreams]\n", r"\[upstreams.NAME\]"),
    "no tables": ("upstreams = 1\n", r"\[upstreams.NAME\]"),
    "a value for a table": ("[upstreams]\na = 1\n", r"\[upstreams.a\] must be a table"),
    "a name with blanks": (f"[upstreams.'a b']\n{URL}", "a name is"),
    "an unknown key": (f"[upstreams.a]\n{URL}base_ulr = ''\n", r"\[upstreams.a\].*'base_ulr'.*base_url"),
    "name": (f"[upstreams.a]\n{URL}name = 'b'\n", "there is no key 'name'"),
    "no base_url": ("[upstreams.a]\napi_key = 'k'\n", r"\[upstreams.a\]: base_url is missing"),
    "no URL": ("[upstreams.a]\nbase_url = 'gateway/v1'\n", "base_url must be a URL"),
    "no host": ("[upstreams.a]\nbase_url = 'https:///v1'\n", "base_url must be a URL"),
    "a bad port": ("[upstreams.a]\nbase_url = 'https://g:x/v1'\n", "base_url must be a URL"),
    "another scheme": ("[upstreams.a]\nbase_url = 'ftp://g/v1'\n", "base_url must be a URL"),
    "a whole address": (
        "[upstreams.a]\nbase_url = 'https://g/v1/chat/completions/'\n",
        "must end before /chat/completions",
    ),
    "credentials": (f"[upstreams.a]\nbase_url = 'https://u:{KEY}@g/v1'\n", "no credentials"),
    "a query": (f"[upstreams.a]\nbase_url = 'https://g/v1?key={KEY}'\n", "`query`"),
    "a wrong type": (f"[upstreams.a]\n{URL}max_streams = 'many'\n", "max_streams"),
    "no streams": (f"[upstreams.a]\n{URL}max_streams = 0\n", "max_streams must be 1"),
    "two keys": (f"[upstreams.a]\n{URL}api_key = '{KEY}'\napi_key_env = 'X'\n", "api_key and api_key_env"),
    "a key with blanks": (f"[upstreams.a]\n{URL}api_key = '{KEY} x'\n", "the key holds"),
    "a key with an umlaut": (f"[upstreams.a]\n{URL}api_key = '{KEY}ü'\n", "the key holds"),
    "a variable that is not set": (f"[upstreams.a]\n{URL}api_key_env = 'NOWHERE'\n", "api_key_env names"),
    "a file that is not there": (f"[upstreams.a]\n{URL}api_key_file = '/nowhere'\n", "api_key_file cannot"),
    "an empty file": (f"[upstreams.a]\n{URL}api_key_file = '/dev/null'\n", "api_key_file is empty"),
    "a header that is none": (f"[upstreams.a]\n{URL}headers = {{ 'X Y' = '{KEY}' }}\n", "'X Y'"),
    "a header of ours": (f"[upstreams.a]\n{URL}headers = {{ Host = '{KEY}' }}\n", "'Host'"),
    "a value with a line end": (f'[upstreams.a]\n{URL}headers = {{ X = "{KEY}\\nY: 1" }}\n', "'X'"),
    "the key's header": (
        f"[upstreams.a]\n{URL}api_key = '{KEY}'\nheaders = {{ authorization = '{KEY}' }}\n",
        "'Authorization' carries the key",
    ),
    "no models": (f"[upstreams.a]\n{URL}models = []\n", "models lists none"),
    "an alias to nothing": (f"[upstreams.a]\n{URL}models = ['m']\naliases = {{ f = 'n' }}\n", "'f'"),
    "model omitted": (f"[upstreams.a]\n{URL}omit = ['model']\n", "'model' cannot be left out"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_refused_at_the_start(text: str, message: str) -> None:
    """By file, table and key, with what to change; and no secret is in the message."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        read(text)
    assert KEY not in str(caught.value)
    assert not text or "DELTAWIRE_UPSTREAMS" in str(caught.value)


def test_the_message_names_the_file(tmp_path: Path) -> None:
    """Who has two of them knows which."""
    path = tmp_path / "mine.toml"
    path.write_text("[upstreams.a]\n")
    with pytest.raises(ConfigurationError, match=f"DELTAWIRE_UPSTREAMS_FILE {path}: "):
        read_upstreams(Environment({"DELTAWIRE_UPSTREAMS_FILE": str(path)}))


def test_one_gateway_and_a_table_at_once_are_refused() -> None:
    """Nobody should have to guess which of them counts."""
    with pytest.raises(ConfigurationError, match="both set"):
        read(ALL, AZURE_KEY=KEY, DELTAWIRE_UPSTREAM_BASE_URL="https://g/v1")


@pytest.mark.parametrize("url", [f"https://u:{KEY}@g/v1", f"https://g/v1?key={KEY}"])
def test_an_address_with_a_secret_is_refused_in_the_short_form_too(url: str) -> None:
    """The address is logged."""
    with pytest.raises(ConfigurationError, match="DELTAWIRE_UPSTREAM_BASE_URL") as caught:
        read_upstreams(Environment({"DELTAWIRE_UPSTREAM_BASE_URL": url}))
    assert KEY not in str(caught.value)


def test_no_secret_shows() -> None:
    """Wherever somebody prints them; and all of them count as secrets."""
    upstreams = read(ALL, AZURE_KEY=KEY)
    made = Settings(redis_url="", broker_url="", upstreams=upstreams)
    shown = f"{upstreams!r} {list(upstreams)!r} {list(upstreams)} {made!r} {made}"
    for secret in (KEY, "sk-inline", "Z2F0ZXdheTpodW50ZXIy", "2024-10-21"):
        assert secret not in shown
    azure, _ = upstreams
    assert {KEY, "Basic Z2F0ZXdheTpodW50ZXIy", "2024-10-21"} == set(azure.secrets)


# Routing.

BIG = Upstream(name="big", base_url="https://b/v1", models=["m1", "m2"], aliases={"fast": "m2"})
TWIN = Upstream(name="twin", base_url="https://t/v1", models=["m2", "m3"])
OPEN = Upstream(name="open", base_url="https://o/v1", aliases={"smart": "m9"})
LAST = Upstream(name="last", base_url="https://l/v1")
ROUTES = Upstreams([BIG, TWIN, OPEN, LAST])


@pytest.mark.parametrize(
    ("wanted", "model", "name", "sent"),
    [
        ("default", "m1", "big", "m1"),
        ("default", "m2", "big", "m2"),
        ("default", "m3", "twin", "m3"),
        ("default", "fast", "big", "m2"),
        ("default", "smart", "open", "m9"),
        ("default", "anything", "open", "anything"),
        ("twin", "m2", "twin", "m2"),
        ("twin", "anything", "twin", "anything"),
        ("last", "fast", "last", "fast"),
        ("big", "fast", "big", "m2"),
    ],
)
def test_a_job_goes_to_the_upstream_that_it_names_or_that_has_its_model(
    wanted: str, model: str, name: str, sent: str
) -> None:
    """The first that lists it, else the first that lists none; an alias stands for its model."""
    upstream, model_there = ROUTES.route(wanted, model)
    assert (upstream.name, model_there) == (name, sent)


def test_a_name_that_is_none_is_refused_with_those_there_are() -> None:
    """Also where it is an address."""
    for wanted in ("nowhere", "https://evil.example/v1", ""):
        with pytest.raises(WireError) as caught:
            ROUTES.route(wanted, "m1")
        assert (caught.value.code, caught.value.error.param) == ("unknown_upstream", "options.upstream")
        assert "big, last, open, twin" in caught.value.error.message


def test_a_model_that_nobody_has_is_refused() -> None:
    """Where every upstream lists its own."""
    with pytest.raises(WireError) as caught:
        Upstreams([BIG, TWIN]).route("default", "m4")
    assert (caught.value.code, caught.value.status) == ("model_not_found", 404)


def test_an_upstream_that_is_called_default_is_one_like_any_other() -> None:
    """`default` leaves it to the model, whatever the names."""
    own = Upstream(name="default", base_url="https://d/v1", models=["m1"])
    upstream, _ = Upstreams([LAST, own]).route("default", "m1")
    assert upstream is own
    assert Upstreams([LAST, own]).route("default", "x")[0] is LAST


def test_what_goes_upstream_is_what_it_takes() -> None:
    """The model's own name; nothing of ours, and nothing that the upstream refuses."""
    request = {
        "model": "fast",
        "messages": [],
        "deltawire": {"a": 1},
        "service_tier": "x",
        "stream_options": {"y": 1},
    }
    plain = json.loads(request_body(request, LAST, "m2"))
    assert plain == {
        "model": "m2",
        "messages": [],
        "service_tier": "x",
        "stream": True,
        "stream_options": {"include_usage": True, "y": 1},
    }
    odd = Upstream(name="odd", base_url="https://o/v1", stream_options=False, omit=["service_tier"])
    assert json.loads(request_body(request, odd)) == {"model": "fast", "messages": [], "stream": True}
