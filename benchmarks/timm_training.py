"""Baseline: the loop of timm's `train.py`, with its dataset, loader, optimizer, scheduler, loss and checkpoint calls.

    python -m benchmarks.timm_training FOLDER MODEL IMAGE_SIZE BATCH_SIZE EPOCHS THREADS LOADERS LAYOUT

It prints the rate of each epoch as a line of JSON. The first step and the writing of checkpoints are excluded.
"""

import json
import sys
import tempfile
import time

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver


def main() -> None:
    """Train on images in one folder per class."""
    folder, name = sys.argv[1:3]
    image_size, batch_size, num_epochs, num_threads, num_loaders = map(int, sys.argv[3:8])
    layout = torch.channels_last if sys.argv[8] == "channels_last" else torch.contiguous_format
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    dataset = create_dataset("", root=folder, split="train", is_training=True, batch_size=batch_size)
    model = timm.create_model(name, num_classes=len(dataset.reader.class_to_idx)).to(memory_format=layout).train()
    loader = create_loader(
        dataset,
        input_size=(3, image_size, image_size),
        batch_size=batch_size,
        is_training=True,
        use_prefetcher=False,
        num_workers=num_loaders,
        persistent_workers=True,
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=num_epochs, updates_per_epoch=len(loader))
    loss_fn = torch.nn.CrossEntropyLoss()
    checkpoints = tempfile.TemporaryDirectory()
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=checkpoints.name, recovery_dir=checkpoints.name)
    rates = []
    started, num_steps = None, 0
    for epoch in range(num_epochs):
        for images, target in loader:
            loss = loss_fn(model(images.contiguous(memory_format=layout)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            float(loss)
            if started is None:
                started = time.monotonic()
            else:
                num_steps += 1
        assert started is not None
        scheduler.step(epoch + 1)
        rates.append(num_steps * batch_size / (time.monotonic() - started))
        saver.save_checkpoint(epoch)
        started, num_steps = time.monotonic(), 0
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
