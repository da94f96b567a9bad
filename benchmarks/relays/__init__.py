"""The relays that are measured: ours, those of others, and floors. One module each, listed in `RELAYS`."""
