"""`deltawire`: the command line. Needs the extra `cli`."""

import sys


def main() -> None:
    try:
        import rich  # noqa: F401 - to say clearly what is missing
        import typer  # noqa: F401
    except ImportError:
        sys.exit("the command line needs a few packages more: pip install 'deltawire[cli]'")
    from .commands import app

    app()
