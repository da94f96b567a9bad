"""What only an extra of the distribution installs: one line where it is not there, instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around the imports of `what`: ends the process, with 1, if packages of `deltawire[extra]` are missing.

    A module of our own that is missing is a bug, and raised as one.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("deltawire"):
            raise
        sys.exit(f"{what} needs packages that are not here ({error.name}): pip install 'deltawire[{extra}]'")
