"""Detection of host names in private networks, for URIs from untrusted lists."""

import ipaddress
import socket
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, wait

# Suffixes that the public DNS does not resolve (RFC 6761, RFC 6762, RFC 8375, and ICANN's `.internal`).
PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".lan", ".intranet", ".corp", ".home")
NUM_LOOKUPS = 32
LOOKUP_TIMEOUT_S = 60.0


def private_hosts(hosts: Collection[str]) -> set[str]:
    """Return the hosts that are, or resolve to, addresses that are not public.

    Loopback, link-local (a cloud's metadata service), private and multicast addresses are not public. A host that does
    not resolve within `LOOKUP_TIMEOUT_S` counts as private. A host that does not exist does not, because nothing can be
    fetched from it.
    """
    pool = ThreadPoolExecutor(NUM_LOOKUPS)
    lookups = {host: pool.submit(_is_private, host) for host in hosts}
    wait(lookups.values(), timeout=LOOKUP_TIMEOUT_S)
    pool.shutdown(wait=False, cancel_futures=True)
    return {host for host, lookup in lookups.items() if not lookup.done() or lookup.cancelled() or lookup.result()}


def _is_private(host: str) -> bool:
    name = host.rstrip(".").lower()
    is_address = ":" in name
    if not is_address and ("." not in name or name.endswith(PRIVATE_SUFFIXES)):
        return True
    try:
        # This also parses alternative spellings of IPv4 addresses, such as 127.1 and 0x7f.0.0.1.
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(_is_private_address(str(address[0])) for *_, address in found)


def _is_private_address(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None) or address
    return not mapped.is_global or mapped.is_multicast
