"""Bounds that follow from the costs of the stages, and the report that shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.benchmark.stages import StageCost
from pipelines.engine.plan import ComputePlan

GPU_DECODE = "GPU decode"


@dataclass(frozen=True)
class Bound:
    """Upper bound on the rate of the whole pipeline.

    Attributes:
        by: Resource that limits the rate: `store`, `cores`, `replicas` or `GPU decoders`.
        images_per_s: Highest rate that the resource allows.
        stage: Stage that uses most of the resource.
    """

    by: str
    images_per_s: float
    stage: str


def find_bounds(costs: Mapping[str, StageCost], plan: ComputePlan, num_cpus: float, num_readers: int) -> list[Bound]:
    """Return the bounds of a run, lowest first.

    Args:
        costs: Cost of one process by stage: `fetch` (one of `num_readers`), `decode`, `forward`, `write` and, if
            replicas decode, `GPU decode`.
        plan: Resources that each stage declares to Ray.
        num_cpus: CPUs of the cluster.
        num_readers: Number of processes that read from the store concurrently while `fetch` was measured.
    """
    most_expensive = max(costs, key=lambda name: costs[name].cpu_s_per_image)
    bounds = [
        Bound("store", num_readers * costs["fetch"].images_per_s, "fetch"),
        Bound("cores", num_cpus / sum(cost.cpu_s_per_image for cost in costs.values()), most_expensive),
        Bound("replicas", plan.num_workers * costs["forward"].images_per_s, "forward"),
    ]
    if GPU_DECODE in costs:  # separate hardware engines decode while the GPU computes
        bounds.append(Bound("GPU decoders", plan.num_workers * costs[GPU_DECODE].images_per_s, GPU_DECODE))
    return sorted(bounds, key=lambda bound: bound.images_per_s)


def format_report(summary: Mapping[str, Any]) -> str:
    """Format the summary of the job as tables."""
    stages: dict[str, dict[str, float]] = summary["stages"]
    total_s = sum(stage["cpu_s_per_image"] for stage in stages.values())
    lines = [f"{'stage, alone':14}{'images/s':>12}{'MB/s':>10}{'core ms/image':>16}{'share':>8}"]
    for name, stage in stages.items():
        mb_per_s = stage["images_per_s"] * stage["bytes_per_image"] / 1e6
        lines.append(
            f"{name:14}{stage['images_per_s']:12.1f}{f'{mb_per_s:.1f}' if mb_per_s else '':>10}"
            f"{1000 * stage['cpu_s_per_image']:16.2f}{stage['cpu_s_per_image'] / total_s:8.0%}"
        )
    lines += ["", f"{'ceiling':14}{'images/s':>12}"]
    lines += [f"{bound['by']:14}{bound['images_per_s']:12.1f}" for bound in summary["ceilings"]]
    lines += [
        "",
        f"{'whole chain':14}{'images/s':>12}",
        _steady_line(summary),
        f"{'with start':14}{summary['images_per_s']:12.1f}",
        f"binds: {summary['binds']}",
        "",
        f"{'start':14}{'s':>12}",
        *(f"{name:14}{seconds:12.1f}" for name, seconds in summary["start_s"].items()),
    ]
    return "\n".join(lines)


def _steady_line(summary: Mapping[str, Any]) -> str:
    if summary["steady_images_per_s"] is None:
        return f"{'steady':14}{'':12}  too few files to measure: raise --sample.num_images"
    share = summary["share_of_ceiling"]
    return f"{'steady':14}{summary['steady_images_per_s']:12.1f}  {share:.0%} of the lowest ceiling"
