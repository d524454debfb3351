"""Whole measurements of candidates with known answers, in real worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ganexport import stats
from ganexport.measure.cell import Cell
from ganexport.measure.conductor import Conductor
from ganexport.measure.plan import Plan, ServerPlan
from ganexport.measure.process import CandidateFailedError, WorkerProcess
from tests.measure.known import LeakingRunner, candidate

QUICK = Plan(
    rounds=3,
    turn_seconds=0.05,
    min_iterations=3,
    min_warm_seconds=0.02,
    max_warm_seconds=2,
    timeout=30,
)
BATCH = [("single-stream", {"batch": 1})]


def measure(*candidates, plan=QUICK, cells=BATCH):
    with Conductor(candidates, plan) as conductor:
        conductor.open()
        conductor.measure(cells)
    return conductor


def samples(row, name="compute"):
    return next(np.array(s.samples) for s in row.series if s.name == name)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_candidates_that_open_side_by_side_are_measured_as_others_are():
    slower = msgspec.structs.replace(candidate("constant", milliseconds=2.0), name="slower")
    candidates = [candidate("constant"), candidate("missing"), slower]
    with Conductor(candidates, msgspec.structs.replace(QUICK, opening=3)) as conductor:
        conductor.open()
        conductor.measure([("offline", {"batch": 1})])
    rows = {row.candidate["name"]: row for row in conductor.rows}
    assert rows["constant"].series
    assert rows["slower"].series
    assert rows["missing"].unavailable


def test_known_times_are_measured_and_carry_their_conditions():
    two, four = measure(candidate("constant"), candidate("four", "constant", milliseconds=4.0)).rows
    assert stats.percentile(samples(two), 50) == pytest.approx(2e6, rel=0.15)
    assert stats.percentile(samples(four), 50) == pytest.approx(4e6, rel=0.15)
    assert samples(two).min() >= 2e6  # never shorter than the work: the wait is inside
    assert two.conditions["scenario"] == "single-stream"
    assert two.conditions["sizes"] == {"batch": 1}
    assert two.conditions["warm_up"]["steady"]
    assert sum(two.facts["round_sizes"]["compute"]) == len(samples(two))
    assert len(two.facts["round_sizes"]["compute"]) == 3
    assert two.facts["peak_host_bytes"] > 10e6
    assert two.facts["process_threads"] >= 1
    assert two.candidate["runtime"] == "known 1.0"


def test_the_first_is_the_reference_and_a_fast_wrong_answer_shows():
    good, same, wrong = measure(
        candidate("constant"), candidate("same", "constant"), candidate("wrong", "constant", scale=0.5)
    ).rows
    assert good.parity == {"verdict": "reference"}
    assert same.parity["verdict"] == "pass"
    assert same.parity["psnr"] is None
    assert wrong.parity["verdict"] == "fail"
    assert wrong.parity["psnr"] < 30
    assert "image" in wrong.parity["failures"][0]


def test_exponential_times_have_their_percentiles_within_their_intervals():
    (row,) = measure(
        candidate("exponential"),
        plan=Plan(rounds=4, turn_seconds=0.4, min_iterations=50, min_warm_seconds=0.02, max_warm_seconds=0.1),
    ).rows
    times = samples(row)
    for q in (50, 90):
        truth = 1e6 + 2e6 * -np.log(1 - q / 100)
        interval = stats.percentile_interval(times, q, 0.999)
        assert interval.low - 2e5 <= truth <= interval.high + 2e5


def test_one_in_fifty_slow_runs_is_in_p99_and_not_in_p90():
    (row,) = measure(candidate("tail"), plan=Plan(rounds=3, turn_seconds=0.6, max_warm_seconds=0.3)).rows
    figures = stats.summary(samples(row))
    assert figures["p50"] == pytest.approx(1e6, rel=0.3)
    assert figures["p99"] >= 20e6
    assert figures["p90"] < 10e6


def test_rounds_are_added_until_the_ratio_is_known():
    """Two candidates whose times jump by up to 40 % need more than three rounds."""
    plan = Plan(rounds=3, turn_seconds=0.03, min_warm_seconds=0.02, max_warm_seconds=0.1, within=0.05, timeout=30)
    pair = candidate("a", "restless", seed=1), candidate("b", "restless", seed=2)
    rough = measure(*pair, plan=plan).rows
    assert len({row.conditions["rounds"] for row in rough}) == 1
    assert rough[0].conditions["rounds"] > 3
    none = measure(*pair, plan=msgspec.structs.replace(plan, within=0.0)).rows
    assert [row.conditions["rounds"] for row in none] == [3, 3]


def cell(level, movement):
    found, draw = Cell(), np.random.Generator(np.random.Philox(int(level * 1000)))
    for _ in range(8):
        moved = level * (1 + draw.normal(0, movement))
        found.add({"series": {"end_to_end": [int(1e6 * moved * (1 + d)) for d in draw.normal(0, 0.001, 30)]}})
    return found


@pytest.mark.parametrize(
    ("old", "new", "within", "decided"),
    [
        (cell(2.0, 0.001), cell(2.01, 0.001), 0.05, True),  # equal
        (cell(2.0, 0.001), cell(2.2, 0.001), 0.05, True),  # slower
        (cell(2.0, 0.2), cell(2.01, 0.2), 0.05, False),  # hidden by noise
        (cell(2.0, 0.2), cell(2.01, 0.2), 0.0, True),  # not asked for
        (cell(2.0, 0.001), cell(2.1, 0.001), 0.05, False),  # at the threshold itself
    ],
)
def test_when_a_ratio_counts_as_known(old, new, within, decided):
    with Conductor([], Plan(rounds=8, within=within)) as conductor:
        assert conductor._decided({"old": old, "new": new}, 8) == decided
        assert conductor._decided({"old": old}, 8)


def test_ratios_to_the_baseline_are_what_has_to_be_known():
    gathered = {"first": cell(2.0, 0.001), "at the threshold of it": cell(2.1, 0.001), "slow": cell(4.0, 0.001)}
    for baseline, decided in ((None, False), ("first", False), ("slow", True), ("crashed", False)):
        with Conductor([], Plan(rounds=8, within=0.05, baseline=baseline)) as conductor:
            assert conductor._decided(gathered, 8) == decided


def test_added_rounds_end_with_their_time():
    plan = Plan(
        rounds=2, turn_seconds=0.02, min_warm_seconds=0.02, max_warm_seconds=0.1, within=1e-6, at_most_seconds=4
    )
    start = time.monotonic()
    rows = measure(candidate("a", "restless", seed=1), candidate("b", "restless", seed=2), plan=plan).rows
    assert time.monotonic() - start < 60
    assert rows[0].conditions["rounds"] > 2


def test_a_pinned_candidate_stays_on_its_cores():
    from ganexport.measure.candidate import Candidate

    core = max(os.sched_getaffinity(0))
    with WorkerProcess(Candidate("pinned", "tests.measure.known:constant", cores=(core,))) as worker:
        worker.ask("open", factory=worker.candidate.factory, arguments={})
        answer = worker.ask("call", function="tests.measure.test_conductor:affinity", arguments={})
    assert answer["value"] == [core]


def affinity() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def test_what_others_did_to_the_processor_is_counted():
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        (row,) = measure(candidate("constant"), plan=Plan(rounds=3, turn_seconds=0.3, max_warm_seconds=0.1)).rows
    finally:
        hog.kill()
        hog.wait()
    assert row.facts["cpu"]["others_cores"] >= 0.2


def test_a_device_gives_its_copies_as_series_of_their_own():
    (row,) = measure(candidate("constant", device="cuda:0")).rows
    assert {s.name for s in row.series} == {
        "end_to_end",
        "compute",
        "host_to_device",
        "device_to_host",
        "pipelined",
    }
    assert samples(row).min() >= 2e6
    assert samples(row, "host_to_device").min() < 1e6  # the copies do not hold the wait


def test_a_warm_up_ramp_is_left_outside():
    (row,) = measure(candidate("ramp")).rows
    assert row.conditions["warm_up"]["iterations"] >= 60
    assert np.median(samples(row)) == pytest.approx(2e6, rel=0.15)


def test_a_leak_is_noticed_with_its_size():
    leaky, clean = measure(
        candidate("leaking"), candidate("constant"), plan=Plan(rounds=6, turn_seconds=0.05, max_warm_seconds=0.2)
    ).rows
    assert leaky.facts["leaked_bytes_per_run"] == pytest.approx(LeakingRunner.KEPT, rel=0.1)
    assert "leaked_bytes_per_run" not in clean.facts


def test_everything_that_can_go_wrong_is_a_row_with_its_reason():
    conductor = measure(
        candidate("constant"),
        candidate("missing"),
        candidate("hungry"),
        candidate("crashing", after=40),
        candidate("hanging"),
        candidate("nowhere"),
        plan=Plan(rounds=2, turn_seconds=0.05, max_warm_seconds=0.1, timeout=4),
        cells=[*BATCH, ("offline", {"batch": 16})],
    )
    rows = {(r.candidate["name"], r.conditions["sizes"]["batch"]): r for r in conductor.rows}
    assert len(rows) == len(conductor.rows) == 12
    assert not rows["constant", 16].unavailable
    assert "pip install unobtainium" in rows["missing", 1].unavailable
    assert not rows["hungry", 1].unavailable
    assert rows["hungry", 16].unavailable.startswith("out of memory: ")
    crashed = [rows["crashing", b].unavailable for b in (1, 16)]
    assert "SIGSEGV" in crashed[-1]
    assert "kernel_17" in crashed[-1]
    assert "no answer" in rows["hanging", 1].unavailable
    assert "nowhere" in rows["nowhere", 1].unavailable


def test_a_candidate_known_to_be_missing_starts_no_process():
    from ganexport.measure.candidate import Candidate

    gone = Candidate("tensorrt", "tests.measure.known:constant", unavailable="no NVIDIA GPU")
    conductor = measure(gone, candidate("constant"))
    assert [r.unavailable for r in conductor.rows] == ["no NVIDIA GPU", ""]
    assert "runtime" not in conductor.rows[0].candidate


def test_ctrl_c_keeps_what_was_measured_and_leaves_no_process():
    with Conductor([candidate("constant"), candidate("interrupting", after=80)], QUICK) as conductor:
        conductor.open()
        pids = [w.pid for w in conductor._workers.values()]
        conductor.measure([("offline", {"batch": b}) for b in (1, 2, 4, 8, 16, 32)])
    assert conductor.interrupted
    measured = [r for r in conductor.rows if r.series]
    assert measured
    assert len(measured) < 12
    assert "interrupted" in conductor.notes[0]
    assert not any(alive(pid) for pid in pids)


def test_only_the_candidate_on_turn_uses_the_processor():
    """A candidate that spins for ever is asleep while the other one is measured."""
    with Conductor([candidate("spinning"), candidate("constant")], QUICK) as conductor:
        conductor.open()
        spinner = conductor._workers["spinning"]

        def ticks() -> int:
            fields = Path(f"/proc/{spinner.pid}/stat").read_text().rsplit(") ", 1)[1].split()
            return int(fields[11]) + int(fields[12])

        before = ticks()
        time.sleep(0.5)
        assert ticks() - before <= 1
        conductor.measure(BATCH)
        assert not [r for r in conductor.rows if r.unavailable]


def test_a_dead_measuring_process_takes_its_sleeping_workers_along():
    code = (
        "import os\n"
        "from ganexport.measure.process import WorkerProcess\n"
        "from tests.measure.known import candidate\n"
        "w = WorkerProcess(candidate('spinning'))\n"
        "w.ask('open', factory=w.candidate.factory, arguments={}); w.pause()\n"
        "print(w.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and alive(pid):
        time.sleep(0.05)
    if alive(pid):  # an unreaped zombie is dead too
        assert Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].startswith("Z")


def test_a_torch_free_worker_imports_no_torch():
    with WorkerProcess(candidate("constant")) as worker:
        worker.ask("open", factory=worker.candidate.factory, arguments={})
        worker.ask("prepare", sizes={"batch": 1})
        answer = worker.ask("call", function="tests.measure.test_conductor:loaded", arguments={})
    assert answer["value"] == []


def loaded() -> list[str]:
    return [name for name in ("torch", "onnx", "openvino") if name in sys.modules]


def test_cold_start_counts_from_the_process_on():
    with Conductor([candidate("constant"), candidate("missing")], QUICK) as conductor:
        conductor.cold_start(2)
    row, missing = conductor.rows
    assert len(samples(row, "cold_start")) == 2
    assert samples(row, "cold_start").min() > samples(row, "first_run").max() >= 2e6
    assert missing.unavailable


def test_server_finds_the_capacity_of_a_known_engine():
    """4 ms a batch of any size up to 4: about 1000 requests a second at most, 250 when each is served alone."""
    plan = ServerPlan(slo_ms=60, max_batch=4, max_delay_ms=1, trial_seconds=0.3, min_requests=120, steps=4)
    with Conductor([candidate("constant", milliseconds=4.0), candidate("missing")], QUICK) as conductor:
        conductor.open()
        conductor.serve(plan)
    row, missing = conductor.rows
    assert 250 < row.facts["rate"] <= 1050
    assert stats.percentile(samples(row, "latency"), 99) <= 60e6
    assert len(row.facts["trials"]) == 5
    assert missing.unavailable


def test_a_limit_below_the_service_time_is_a_row_that_says_so():
    plan = ServerPlan(slo_ms=1, max_batch=2, trial_seconds=0.1, min_requests=100, steps=2)
    with Conductor([candidate("constant")], QUICK) as conductor:
        conductor.open()
        conductor.serve(plan)
    assert conductor.rows[0].unavailable.startswith("no rate keeps p99 under 1 ms: one alone takes 2")
    assert conductor.rows[0].facts["trials"] == []


def test_a_limit_that_only_waiting_exceeds_is_a_row_that_says_so():
    plan = ServerPlan(slo_ms=3, max_batch=1, trial_seconds=0.1, min_requests=100, steps=0)
    with Conductor([candidate("constant")], QUICK) as conductor:
        conductor.open()
        conductor.serve(plan)
    assert "no rate kept p99 under 3 ms (lowest tried: " in conductor.rows[0].unavailable


def test_a_slow_generator_has_the_time_that_its_trial_takes():
    """100 requests at 30 a second last 3 s; a command that may take 1.5 s is no reason to call them hung."""
    plan = ServerPlan(slo_ms=1000, max_batch=1, trial_seconds=0.1, min_requests=100, steps=0)
    said = []
    with Conductor([candidate("constant", milliseconds=10.0)], QUICK, lambda text, *_: said.append(text)) as conductor:
        conductor.open()
        conductor.plan = msgspec.structs.replace(QUICK, timeout=1.5, max_warm_seconds=0.2)
        conductor.serve(plan)
    assert conductor.rows[0].facts["rate"] == pytest.approx(30, rel=0.2)
    assert any("requests a second for 3 s" in text for text in said)


def test_sizes_reach_every_scenario():
    plan = ServerPlan(slo_ms=50, max_batch=8, trial_seconds=0.1, min_requests=100, steps=0)
    with Conductor([candidate("wide")], msgspec.structs.replace(QUICK, reference="")) as conductor:
        conductor.open()
        conductor.cold_start(1, {"batch": 4, "width": 16})
        conductor.measure([("offline", {"batch": 4, "width": 16})])
        conductor.serve(plan, {"width": 16})
    assert [row.unavailable for row in conductor.rows] == ["", "", ""]
    assert [row.conditions["sizes"].get("width") for row in conductor.rows] == [16, 16, 16]


def test_a_refused_command_leaves_the_worker_usable():
    with WorkerProcess(candidate("constant")) as worker:
        worker.ask("open", factory=worker.candidate.factory, arguments={})
        with pytest.raises(CandidateFailedError, match="dimension 'batch' is 1000"):
            worker.ask("prepare", sizes={"batch": 1000})
        assert worker.ask("prepare", sizes={"batch": 3})["items"] == 3
