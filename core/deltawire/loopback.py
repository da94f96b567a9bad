"""What means this machine only. Pure."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether an address or name does."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
