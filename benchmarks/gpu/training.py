"""Training on a GPU: steps on a batch in memory, and `jobs.train` on photographs."""

from typing import Any

from benchmarks.gpu.context import IMAGE_SIZE, Context, print_row


def measure_training_steps(context: Context) -> None:
    """Measure training steps on one batch in memory."""
    from benchmarks.ingest import train_from_memory

    batch_size = context.batch_size
    for name in context.models[:2]:
        for compile in (False, True):
            rate = train_from_memory(_training_request(context, name, compile and not context.on_cpu), IMAGE_SIZE)
            print_row(model=name, compiled=compile, batch_size=batch_size, images_per_s=round(rate))


def measure_training(context: Context) -> None:
    """Measure `jobs.train` on photographs, to compare it with steps on a batch in memory."""
    from benchmarks.ingest import train

    request = _training_request(context, context.models[0], compile=False)
    request["output"] = {"uri": str(context.work / "rows" / "trained")}
    (context.work / "rows").mkdir(exist_ok=True)
    print_row(model=context.models[0], batch_size=context.batch_size, images_per_s=round(train(request)))


def _training_request(context: Context, name: str, compile: bool) -> dict[str, Any]:
    return {
        "data": {"train": {"uri": str(context.work / "classes")}},
        "output": {"uri": str(context.work / "unused")},
        "model": {"name": name, "weights": "random", "dtype": "bfloat16", "compile": compile},
        "preprocess": {"image_size": IMAGE_SIZE},
        "optim": {"epochs": 2, "global_batch_size": context.batch_size, "lr": 0.05},
        "scaling": {"use_gpu": not context.on_cpu},
    }
