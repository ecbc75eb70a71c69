"""One process of one measurement of `strategies.py`: warm-up, timed steps, accuracy, exchanged bytes.

In: the request that `measure` reads. Out: the answer of this process as JSON (`process_groups.py` says where).
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

began = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.lib.process_groups import answer, keep_to  # noqa: E402

PROFILED_STEPS = 4  # at least; a strategy that communicates every few steps needs a full period


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Run the measurement that the request describes and return the answer of this process."""
    keep_to(request["threads"], request["pin"])
    import torch

    from benchmarks.lib.communication_trace import CountExchanges, time_exchanges, uncompiled
    from benchmarks.lib.workload import Subject, Workload, facts_of, memory_bytes, resident_bytes
    from config.settings import Settings

    idle = resident_bytes()
    settings = Settings.from_dict(request["settings"])
    warm_up, timed = request["warm_up"], request["steps"]
    work = Workload(Subject(settings, Path(request["data_dir"])), request["source"], total_steps=warm_up + timed)
    engine = work.engine
    work.steps(warm_up)
    start_seconds = time.perf_counter() - began
    engine.any(False)  # a barrier: all processes start together
    spent, losses = work.timed(timed)
    report: dict[str, Any] = {
        "start_seconds": start_seconds,
        "running_seconds": spent.running,
        "data_seconds": spent.data,
        "losses": losses,
        "memory_bytes": memory_bytes(engine.device, idle),
        "num_parameters": engine.num_parameters,
        "describe": engine.describe(),
        "steps_per_epoch": work.subject.steps_per_epoch,
        "batch": asdict(engine.batch_sizes),
        "source": work.feed.batches.source,
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU",
    }
    if request["look"]:
        report["counts"] = facts_of(work.count())
        period = request["period"]
        steps = period * -(-PROFILED_STEPS // period)
        report["timing"] = time_exchanges(lambda: work.steps(steps), engine.device).shares()
        with uncompiled(), CountExchanges() as counter:
            work.steps(period)
        report["exchanges"] = [asdict(exchange) for exchange in counter.exchanges(period)]
    work.close()
    return report


if __name__ == "__main__":
    sys.exit(answer(measure))
