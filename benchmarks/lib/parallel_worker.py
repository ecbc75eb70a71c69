"""One process of `parallel_runs.py`: it warms up, waits until all are ready, trains, and writes its images/s.

FOLDER/settings.json has the settings; FOLDER/ready-N and FOLDER/rate-N are written, FOLDER/go starts the measurement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

NUM_CLASSES = 100
WARM_UP_STEPS = 5
PLANNED_STEPS = 1_000_000  # of the schedule: it does not end
POLL_SECONDS = 0.001


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--side", type=int, required=True)
    args = parser.parse_args()
    import torch

    from benchmarks.lib.timing import synchronize
    from config.settings import Settings
    from model import build_model
    from optim.lr_schedule import Schedule
    from parallel.strategies import engine_class

    settings = Settings.from_dict(json.loads((args.folder / "settings.json").read_text()))
    schedule = Schedule(settings.schedule, PLANNED_STEPS)
    engine = engine_class("ddp")(
        lambda: build_model(settings.model, NUM_CLASSES, args.side), settings, schedule, seed=args.number
    )
    batch = engine.batch_sizes.micro
    images = torch.randn(batch, 3, args.side, args.side, device=engine.device)
    labels = torch.randint(NUM_CLASSES, (batch,), device=engine.device)
    stream = itertools.repeat((images, labels))
    for _ in range(WARM_UP_STEPS + engine.first_steps):
        engine.train_batch(stream)
    synchronize(engine.device)
    (args.folder / f"ready-{args.number}").touch()
    while not (args.folder / "go").exists():
        time.sleep(POLL_SECONDS)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < args.seconds:
        loss = engine.train_batch(stream)
        steps += 1
        loss.item()  # otherwise steps are queued without end
    seconds = time.perf_counter() - began
    written = args.folder / f"rate-{args.number}.part"
    written.write_text(json.dumps(steps * engine.batch_sizes.total / seconds))
    written.rename(args.folder / f"rate-{args.number}")
    engine.close()


if __name__ == "__main__":
    main()
