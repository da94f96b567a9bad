"""The relays that are measured: ours, those of others, floors. `benchmarks.relay` finds what is here."""
