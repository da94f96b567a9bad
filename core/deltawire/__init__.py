"""deltawire: a message-queue worker that fans out streamed tokens.

The bare install is the client SDK; `deltawire[worker]` and `deltawire[relay]` add the services.
"""

__version__ = "0.1.0"
