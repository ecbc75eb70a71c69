"""Facts of a run that a peer announces."""

from __future__ import annotations

from config.settings import resolve


def facts_for(*overrides: str) -> dict:
    return {"command": ["train.py", "--host-peers", "10.0.0.1", "--set", "a=1", "--name=x", "--fresh", "--epochs", "3"], "preset": "cpu",
            "settings": resolve(None, list(overrides)).as_dict(), "dataset": {"fingerprint": "f"}, "seed": 0, "max_steps": None, "hold_out": None,
            "init_weights": None, "synthetic": False, "steps_per_epoch": 4, "total_steps": 8}
