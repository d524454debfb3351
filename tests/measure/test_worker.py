"""What a worker answers, in this process, beside counters whose every step is known."""

from __future__ import annotations

import pytest

from ganexport import environment
from ganexport.bench.digest import digest
from ganexport.bench.table import to_markdown
from ganexport.measure.candidate import Candidate
from ganexport.measure.cell import Cell
from ganexport.measure.conductor import Conductor
from ganexport.measure.worker import Worker
from ganexport.measurement import Report
from tests.measure.known import KnownRunner

LIMIT = 262_143_328_850


class Package:
    """A processor package of a powercap tree, 0.3 J before its counter begins again."""

    def __init__(self, folder) -> None:
        self.used, self.zone = LIMIT - 300_000, folder / "intel-rapl:0"
        self.zone.mkdir()
        (self.zone / "name").write_text("package-0\n")
        (self.zone / "max_energy_range_uj").write_text(f"{LIMIT}\n")
        self.spend(0)

    def spend(self, microjoules: int) -> None:
        self.used = (self.used + microjoules) % LIMIT
        (self.zone / "energy_uj").write_text(f"{self.used}\n")


class Card:
    """As much of NVML as the energy of one GPU takes."""

    def __init__(self) -> None:
        self.used = 10**9

    def spend(self, microjoules: int) -> None:
        self.used += microjoules // 1000

    def nvmlDeviceGetHandleByIndex_v2(self, index, _handle):
        return 0 if index == 0 else 2

    def nvmlDeviceGetTotalEnergyConsumption(self, _handle, value):
        value._obj.value = self.used
        return 0

    def __getattr__(self, name):
        return lambda *_: 3  # NVML_ERROR_NOT_SUPPORTED


class Spending(KnownRunner):
    """Every run costs 50 mJ, whether or not it is sampled."""

    def __init__(self, counter, device="cpu") -> None:
        super().__init__(lambda _i, _b: 0.0, device=device)
        self.counter = counter

    def launch(self):
        super().launch()
        self.counter.spend(50_000)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_energy_is_that_of_the_runs_it_was_counted_over(tmp_path, monkeypatch, device):
    """Neither warm-up, nor discarded runs, nor bursts change it: 50 mJ for 4 samples are 12.5 J a thousand."""
    monkeypatch.setattr(environment, "POWERCAP", tmp_path)
    counter = Package(tmp_path) if device == "cpu" else Card()
    monkeypatch.setattr(environment, "_nvml", lambda: counter if device != "cpu" else None)
    worker, cell = Worker(), Cell()
    worker.runner = Spending(counter, device)
    cell.items = worker.prepare({"batch": 4})["items"]
    cell.warm = worker.warm(0.0, 0.05)
    for _ in range(3):
        cell.add(worker.turn(0.0, 3, 1000))
    assert cell.facts()["joules_per_1000"] == pytest.approx(12.5)
    with Conductor([]) as conductor:
        row = conductor._row(Candidate("spending", ""), "offline", {"batch": 4}, cell)
    assert digest([row])[0].joules_per_1000 == pytest.approx(12.5)
    text = to_markdown(Report(1, "t", {}, (row,)))
    assert "| 12.5 |" in text
    assert "idle" in text


def test_turns_without_a_reading_do_not_count_as_free(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "POWERCAP", tmp_path)
    counter = Package(tmp_path)
    worker, cell = Worker(), Cell()
    worker.runner = Spending(counter)
    worker.prepare({"batch": 1})
    cell.add(worker.turn(0.0, 3, 1000))
    (counter.zone / "name").write_text("core\n")
    cell.add(worker.turn(0.0, 3, 1000))
    assert cell.facts()["joules_per_1000"] == pytest.approx(50)
