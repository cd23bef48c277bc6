"""S3 object store and Ray head on this machine, for experiments and development.

    python -m cluster.local     # starts both, prints the variables to reach them, stops them on Ctrl-C

Both listen on loopback only and require credentials.
"""

import contextlib
import signal

from cluster.local.object_store import object_store
from cluster.local.ray_head import ray_head


def main() -> None:
    """Run both until interrupted."""
    with object_store(buckets=("images", "results")) as store, ray_head(environment=store.environment()) as head:
        print("An object store with the buckets `images` and `results` and a Ray head are running. To use them:\n")
        for name, value in (store.environment() | head.environment()).items():
            print(f"export {name}={value}")
        print("\nPress Ctrl-C to stop both and remove their data.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
