"""What one candidate gave under one set of sizes, gathered turn by turn."""

from __future__ import annotations

import itertools
from typing import Any

from ganexport import stats


class Cell:
    """Samples by series, where the rounds end, and what the machine said after each turn."""

    def __init__(self) -> None:
        self.series: dict[str, list[int]] = {}
        self.round_sizes: dict[str, list[int]] = {}
        self.turns: list[dict[str, Any]] = []
        self.warm: dict[str, Any] = {}
        self.items = 1

    def add(self, turn: dict[str, Any]) -> None:
        """Take the answer to one ``turn`` command."""
        for name, samples in turn["series"].items():
            self.series.setdefault(name, []).extend(samples)
            self.round_sizes.setdefault(name, []).append(len(samples))
        self.turns.append({key: value for key, value in turn.items() if key != "series"})

    def rounds(self, name: str) -> list[list[int]]:
        """Samples of a series, round by round."""
        ends = list(itertools.accumulate(self.round_sizes.get(name, ()), initial=0))
        return [self.series[name][a:b] for a, b in itertools.pairwise(ends)]

    def facts(self) -> dict[str, Any]:
        """Single figures over all turns: memory, threads, energy, GPU state, a leak."""
        last = self.turns[-1]
        found: dict[str, Any] = {
            "round_sizes": self.round_sizes,
            "peak_host_bytes": last["memory"].get("peak_bytes"),
            "process_threads": last["memory"].get("threads"),
            "cores_used": round(sum(t["cores"] for t in self.turns) / len(self.turns), 2),
        }
        if last["device_peak_bytes"] is not None:
            found["peak_device_bytes"] = last["device_peak_bytes"]
        counted = [t for t in self.turns if t["joules"] is not None]
        if counted:
            made = sum(t["energy_items"] for t in counted)
            found["joules_per_1000"] = sum(t["joules"] for t in counted) / made * 1000
        states = [t["gpu"] for t in self.turns if t["gpu"]]
        if states:
            found["gpu"] = {
                "throttled_turns": sum(s["throttled"] for s in states),
                "sm_mhz": [s["sm_mhz"] for s in states],
                "temperature": [s["temperature"] for s in states],
            }
        found["cpu"] = self._processor()
        resident = [t["memory"].get("resident_bytes", 0) for t in self.turns]
        leak = stats.growth([t["runs"] for t in self.turns], resident)
        if leak.leaking:
            found["leaked_bytes_per_run"] = leak.bytes_per_run
        return found

    def _processor(self) -> dict[str, float]:
        """What else happened to the processor meanwhile, as cores or shares of the time."""
        wall = sum(t["wall"] for t in self.turns) or 1.0
        total = {name: sum(t["cpu"].get(name, 0.0) for t in self.turns) for t in self.turns for name in t["cpu"]}
        found: dict[str, float] = {}
        if "busy" in total:
            found["others_cores"] = round(max(total["busy"] - total["own"], 0.0) / wall, 2)
        if "steal" in total:
            found["stolen_cores"] = round(total["steal"] / wall, 2)
        if "quota" in total:
            found["quota_stopped"] = round(total["quota"] / wall, 3)
        if "thermal" in total:
            found["thermal_events"] = total["thermal"]
        return found
