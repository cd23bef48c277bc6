"""Lost and duplicate rows under faults: a killed driver, replica or node, and an outage of the store.

    python -m benchmarks.chaos [--num-images 2000] [--kills 20] [--model ecaresnet26t]

The same photographs are labelled once without faults, then under each fault, by as many runs of the same command as
necessary. The benchmark prints a row for each: number of faults and of runs, lost and duplicate rows, whether the
content equals that of the run without faults, and how many images were fetched again.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from cluster.local.faulty_proxy import Faults, Proxy, faulty_proxy
from cluster.local.object_store import ObjectStore, object_store
from cluster.local.photographs import crops, encode
from cluster.local.processes import descendants, kill_tree
from cluster.local.ray_head import ray_head, ray_node
from pipelines.outputs import open_output
from pipelines.outputs.file_names import list_files
from pipelines.storage.bulk import store_object

INPUT_URI = "s3://images/chaos"
COMMIT_ROWS = 64
RUN_TIMEOUT_S = 600
# A driver is killed at a random time, which may be during its start or well into its work.
KILL_BETWEEN_S = (3.0, 35.0)
OUTAGE_S = 10.0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", default="ecaresnet26t")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with object_store(buckets=("images", "results")) as store:
        os.environ.update(store.environment())
        for name, image in crops(args.num_images, size=(320, 240)):
            store_object(f"{INPUT_URI}/{name}.jpg", encode(image))
        with faulty_proxy(store.endpoint, Faults()) as proxy:
            bench = Chaos(args, store, proxy)
            print(f"{args.num_images} photographs, {args.model}, output.commit_rows {COMMIT_ROWS}")
            print(f"{'fault':32}{'times':>6}{'runs':>6}{'lost':>6}{'doubled':>9}{'equal':>7}{'fetched twice':>15}")
            bench.measure("none", 0, lambda uri: bench.until_done(uri, []))
            kills = [rng.uniform(*KILL_BETWEEN_S) for _ in range(args.kills)]
            bench.measure("driver killed", args.kills, lambda uri: bench.until_done(uri, kills))
            bench.measure("replica killed", 1, lambda uri: bench.with_fault(uri, bench.kill_replica))
            bench.measure(
                f"store gone for {OUTAGE_S:.0f} s", 1, lambda uri: bench.with_fault(uri, bench.interrupt_store)
            )
            bench.measure("raylet of the second node killed", 1, bench.on_two_nodes)


class Chaos:
    """Runs of the job under faults, and checks of their outputs."""

    def __init__(self, args: argparse.Namespace, store: ObjectStore, proxy: Proxy) -> None:
        self.args = args
        self.store = store
        self.proxy = proxy
        self.num_runs = 0
        self.reference: pa.Table | None = None

    def measure(self, fault: str, times: int, run: Callable[[str], None]) -> None:
        """Run the job under a fault and print a row of the table."""
        output_uri = f"s3://results/{fault.replace(' ', '-')}"
        self.num_runs = 0
        self.proxy.fetched.clear()
        run(output_uri)
        table = open_output(output_uri).table()
        self.reference = self.reference or table
        counts = np.bincount(table["id"].to_numpy(), minlength=self.args.num_images)
        images = {path: count for path, count in self.proxy.fetched.items() if path.startswith("/images/")}
        print(
            f"{fault:32}{times:>6}{self.num_runs:>6}{np.sum(counts == 0):>6}{np.sum(counts > 1):>9}"
            f"{'yes' if table.equals(self.reference) else 'NO':>7}{sum(images.values()) - len(images):>15}",
            flush=True,
        )

    def until_done(self, output_uri: str, kills: list[float]) -> None:
        """Run the job and kill it after each time in `kills`, in seconds, then run it to the end."""
        for seconds in kills:
            with self.job(output_uri) as process, contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        with self.job(output_uri) as process:
            _succeed(process)

    def with_fault(self, output_uri: str, fault: Callable[["subprocess.Popen[bytes]"], None]) -> None:
        """Run the job, with a fault as soon as the first file exists."""
        with self.job(output_uri) as process:
            self.wait_for_files(output_uri, process)
            fault(process)
            _succeed(process)

    def on_two_nodes(self, output_uri: str) -> None:
        """Run the job on a cluster of two nodes, and kill the raylet of the second."""
        environment = self.variables() | {"PYTHONPATH": os.getcwd()}
        with ray_head(1, environment) as head, ray_node(head, 1, environment) as node:
            variables = {"RAY_ADDRESS": head.address, "HOME": str(head.home)}
            time.sleep(5)  # let the node join the cluster
            with self.job(output_uri, "--compute.num_workers", "2", **variables) as process:
                self.wait_for_files(output_uri, process)
                _kill_one(node, "raylet/raylet")
                _succeed(process)

    def kill_replica(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill a replica of the model."""
        _kill_one(process.pid, "PredictorActor")

    def interrupt_store(self, process: "subprocess.Popen[bytes]") -> None:
        """Reset every connection to the store for `OUTAGE_S` seconds."""
        self.proxy.is_gone = True
        threading.Timer(OUTAGE_S, lambda: setattr(self.proxy, "is_gone", False)).start()

    def wait_for_files(self, output_uri: str, process: "subprocess.Popen[bytes]") -> None:
        """Wait until the first results exist."""
        while not list_files(output_uri):
            assert process.poll() is None, "the job ended before the fault"
            time.sleep(0.2)

    def variables(self) -> dict[str, str]:
        """Return the environment variables with which clients reach the store through the proxy."""
        return self.store.environment() | {"AWS_ENDPOINT_URL": self.proxy.endpoint}

    @contextlib.contextmanager
    def job(self, output_uri: str, *keys: str, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Start the job, and kill it and its descendants if it is still running at the end of the block."""
        self.num_runs += 1
        command = [sys.executable, "-m", "jobs.infer", "--input.uri", INPUT_URI, "--output.uri", output_uri]
        command += ["--model.name", self.args.model, "--model.weights", "random"]
        command += ["--output.commit_rows", str(COMMIT_ROWS), *keys]
        process = subprocess.Popen(
            command, env=os.environ | self.variables() | variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
            process.wait()


def _succeed(process: "subprocess.Popen[bytes]") -> None:
    status = process.wait(RUN_TIMEOUT_S)
    assert status == 0, f"the job exited with status {status}"


def _kill_one(pid: int, name: str) -> None:
    for found, command in descendants(pid).items():
        if name in command:
            os.kill(found, signal.SIGKILL)
            return
    raise RuntimeError(f"no process {name} is running")


if __name__ == "__main__":
    main()
