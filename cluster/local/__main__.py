"""An S3 object store and a Ray head on this machine, to try things out and to develop.

    python -m cluster.local     # starts both, prints how to reach them, stops them on Ctrl-C

Both listen on loopback and ask for credentials.
"""

import contextlib
import signal

from cluster.local.object_store import object_store
from cluster.local.ray_head import ray_head


def main() -> None:
    """Run both until interrupted."""
    with object_store(buckets=("images", "results")) as store, ray_head(environment=store.environment()) as head:
        print("Running: an object store with the buckets `images` and `results`, and a Ray head. To use them:\n")
        for name, value in (store.environment() | head.environment()).items():
            print(f"export {name}={value}")
        print("\nCtrl-C stops both and removes their data.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
