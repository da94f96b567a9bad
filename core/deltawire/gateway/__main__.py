"""`python -m deltawire.gateway`: the scripted gateway in a process of its own."""

import argparse
from typing import Final

from deltawire.environment import Environment
from deltawire.extras import needs
from deltawire.variables import Variable

with needs("all", "the scripted gateway"):
    from deltawire.gateway.server import DEFAULT_HOST, DEFAULT_PORT, DEFAULT_RATE, run

API_KEY: Final = Variable(
    "DELTAWIRE_GATEWAY_API_KEY",
    "The API key that it wants from its clients; by default none.",
    is_secret=True,
    default="",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="deltawire.gateway", description="A scripted OpenAI-compatible gateway."
    )
    parser.add_argument("--host", default=DEFAULT_HOST)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--rate", type=float, default=DEFAULT_RATE, help="deltas per second; 0: no limit")
    parser.add_argument(
        "--api-key", help="wanted from clients; better given as DELTAWIRE_GATEWAY_API_KEY, which `ps` hides"
    )
    options = parser.parse_args()
    api_key = options.api_key or Environment().secret(API_KEY.name) or None
    try:
        run(host=options.host, port=options.port, rate=options.rate, api_key=api_key)
    except OSError as error:
        parser.exit(1, f"deltawire gateway cannot listen on {options.host}:{options.port}: {error}\n")


if __name__ == "__main__":
    main()
