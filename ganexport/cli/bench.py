"""``ganexport bench``: measure, compare and merge."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ganexport.cli import _console
from ganexport.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    BackendUnavailableError,
    InterruptedBySignalError,
    OutputError,
    RegressionError,
    UsageError,
)

if TYPE_CHECKING:
    from ganexport.bench.compare import Difference
    from ganexport.measurement import Report


class _DefaultGroup(click.Group):
    """A group that measures when its first argument is none of its sub-commands."""

    DEFAULT = "measure"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command's name in front."""
        if not args or args[0] not in self.commands:
            args = [self.DEFAULT, *args]
        return super().parse_args(ctx, args)


class _DefaultCommand(click.Command):
    """The default command, which calls itself by the group's name."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Stand in the group's place."""
        if parent is not None:
            info_name, parent = parent.info_name, parent.parent
        return super().make_context(info_name, args, parent, **extra)


def _numbers(kind: type) -> Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...]]:
    def parse(_ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Any, ...]:
        if not value:
            return ()
        try:
            return tuple(kind(part.strip()) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r}: write numbers like 1,8,64", param=parameter) from None

    return parse


def _names(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if value else ()


def _percent(_ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        share = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 10:
        raise click.BadParameter(f"{value!r}: write a share like 5%", param=parameter)
    return share


@click.group(cls=_DefaultGroup, name="bench", no_args_is_help=False)
def command() -> None:
    """Measure latency and throughput of every backend, side by side."""


@command.command(cls=_DefaultCommand, name="measure", hidden=True)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--backends", callback=_names, metavar="A,B", help="Only these backends; by default all that fit.")
@click.option(
    "--device",
    "devices",
    callback=_names,
    metavar="D,…",
    help="Only on these: cpu, cuda, cuda:1; by default the CPU, and a GPU where there is one.",
)
@click.option("--batch", "batches", callback=_numbers(int), metavar="N,…", help="Batch sizes of the offline scenario.")
@click.option("--size", "sizes", multiple=True, metavar="NAME=N", help="Size of another free dimension.")
@click.option(
    "--scenario",
    "scenarios",
    callback=_names,
    default="single-stream,offline",
    show_default=True,
    metavar="S,…",
    help="single-stream, multi-stream, offline, server, cold-start.",
)
@click.option("--threads", callback=_numbers(int), metavar="N,…", help="CPU thread counts to sweep.")
@click.option(
    "--precision",
    "precisions",
    callback=_names,
    metavar="P,…",
    help="Of torch candidates: fp32, tf32, bf16, fp16; one alone also of a lone file that does not say it.",
)
@click.option(
    "--cores",
    multiple=True,
    metavar="SET",
    help="Pin the candidates to these CPU cores, e.g. 0-3,8; given several times, each set is measured.",
)
@click.option("--seconds", default=2.0, show_default=True, help="Sampling time a candidate and batch.")
@click.option("--rounds", default=8, show_default=True, help="Turns that the seconds are spread over.")
@click.option(
    "--within",
    callback=_percent,
    metavar="SHARE",
    help="Add turns until every speedup is known within this share, e.g. 5%: for noisy machines.",
)
@click.option("--at-most", default=60.0, show_default=True, help="But no longer than these seconds a batch.")
@click.option("--warm-up", default=10.0, show_default=True, help="Longest warm-up in seconds.")
@click.option("--slo-ms", default=100.0, show_default=True, help="Server scenario: limit of the p99 latency.")
@click.option("--max-batch", default=16, show_default=True, help="Server scenario: largest dynamic batch.")
@click.option("--max-delay-ms", default=2.0, show_default=True, help="Server scenario: longest wait for company.")
@click.option(
    "--trial-seconds",
    default=3.0,
    show_default=True,
    help="Server scenario: length of each of 7 trials; each has 300 requests, which take a slow generator minutes.",
)
@click.option("--cold-starts", default=5, show_default=True, help="Fresh processes a candidate in cold-start.")
@click.option("--input", "inputs", multiple=True, metavar="SPEC", help="Input of a lone file that does not say it.")
@click.option("--dim", "dims", multiple=True, metavar="SPEC", help="Range of such a file's free dimension.")
@click.option(
    "--baseline",
    metavar="NAME",
    help="Candidate that speedups refer to, by its name in the table; by default the first.",
)
@click.option("--price-per-hour", type=float, metavar="DOLLARS", help="Adds images a dollar to the rows.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Raw samples and conditions, JSON."
)
@click.option("--html", "html_path", type=click.Path(dir_okay=False, path_type=Path), help="Report with charts.")
@click.option("--markdown", "markdown_path", type=click.Path(dir_okay=False, path_type=Path), help="Tables, Markdown.")
@_console.json_option
def measure(
    sources: tuple[str, ...],
    *,
    sizes: tuple[str, ...],
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    slo_ms: float,
    max_batch: int,
    max_delay_ms: float,
    trial_seconds: float,
    cores: tuple[str, ...],
    within: float | None,
    baseline: str | None,
    price_per_hour: float | None,
    output: Path | None,
    html_path: Path | None,
    markdown_path: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Measure latency and throughput of every backend, side by side.

    SOURCE is an artifact, a run, a model, package.module:factory or a lone file (.onnx, .ts, .pt2,
    .xml of OpenVINO, .engine of TensorRT); several of them must be the same generator. Lone files
    other than .onnx and .xml are code: measure those you trust. Ctrl-C and SIGTERM keep what was measured.

    \b
    ganexport bench digits/ --batch 1,16,64 -o bench.json --html report.html
    ganexport bench digits/ --scenario server --slo-ms 50
    ganexport bench theirs.ts theirs.pt2 --input "z=normal[batch,128]" --dim batch=1:8:32
    ganexport bench compare old.json new.json --fail-if-slower 5%
    ganexport bench merge cpu.json h100.json -o all.json --html all.html
    """
    from ganexport.bench.api import benchmark
    from ganexport.bench.candidates import parse_cores
    from ganexport.bench.cost import require_price, with_price
    from ganexport.measure.plan import ServerPlan
    from ganexport.spec import parse_dim, parse_input

    outputs = _Outputs(output, html_path, markdown_path)
    outputs.require_writable(sources)
    if price_per_hour is not None:
        require_price(price_per_hour)
    with _console.progress("measuring") as (bar, task):

        def progress(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        report = benchmark(
            *sources,
            sizes=dict(_console.size(text) for text in sizes),
            inputs=[parse_input(text) for text in inputs],
            dims=[parse_dim(text) for text in dims],
            server=ServerPlan(
                slo_ms=slo_ms, max_batch=max_batch, max_delay_ms=max_delay_ms, trial_seconds=trial_seconds
            ),
            within=within or 0.0,
            baseline=baseline,
            cores=[parse_cores(text) for text in cores],
            command=shlex.join(["ganexport", *sys.argv[1:]]) if sys.argv[1:2] == ["bench"] else "",
            progress=progress,
            warm_up=options.pop("warm_up"),
            **options,
        )
    by, rows = report.interrupted_by, len(report.measurements)
    stopped = InterruptedBySignalError(
        f"stopped by {by}; {rows or 'no'} rows were {'kept' if rows else 'measured yet'}",
        exit_code=EXIT_TERMINATED if by == "SIGTERM" else EXIT_INTERRUPTED,
    )
    if by and not rows:  # an earlier report under that name is worth more than an empty one
        raise stopped
    if price_per_hour is not None:
        report = with_price(report, price_per_hour)
    with outputs.written(report, baseline):
        if as_json:
            _console.print_json(report)
        else:
            from ganexport.bench.table import print_report

            print_report(report, _console.results(), baseline=baseline)
    if by:
        raise stopped
    if not any(row.series for row in report.measurements):
        reasons = [f"{row.candidate['name']}: {row.unavailable}" for row in report.measurements if row.unavailable]
        raise BackendUnavailableError(f"nothing could be measured: {reasons[0] if reasons else 'no candidate'}")
    return 0


class _Outputs(NamedTuple):
    """The files that a report is written to."""

    json: Path | None
    html: Path | None
    markdown: Path | None

    def require_writable(self, sources: Sequence[str] = ()) -> None:
        """Refuse before minutes of measuring what could not be written after them.

        Raises:
            OutputError: It cannot be written.
            UsageError: Two outputs are one file, or one is a source.
        """
        from ganexport.cli._output import require_writable

        named = [path for path in self if path is not None]
        for path in named:
            require_writable(path)
            if any(path.resolve() == Path(source).resolve() for source in sources):
                raise UsageError(f"{path}: is what is measured; choose another output")
        if len({path.resolve() for path in named}) < len(named):
            raise UsageError("-o, --html and --markdown must name different files")

    @contextlib.contextmanager
    def written(self, report: Report, baseline: str | None = None) -> Iterator[None]:
        """Write the report, then let the block print it, so that neither failure costs the other.

        Raises:
            OutputError: Something could not be written; the message says where the samples were kept.
        """
        from ganexport.artifact import write_atomic
        from ganexport.bench.html import to_html
        from ganexport.bench.table import to_markdown
        from ganexport.measurement import report_to_json

        contents: tuple[Callable[[], bytes], ...] = (
            lambda: report_to_json(report),
            lambda: to_html(report, baseline=baseline).encode(),
            lambda: to_markdown(report, baseline=baseline).encode(),
        )
        failures, kept = [], False
        for path, content in zip(self, contents, strict=True):
            if path is not None:
                try:
                    write_atomic(path, content())
                    kept |= path is self.json
                except OutputError as error:
                    failures.append(str(error))
        if failures and not kept:
            failures.append(_rescue(report_to_json(report)))
        try:
            yield
        finally:
            if failures:
                raise OutputError("; ".join(failures))


def _rescue(content: bytes) -> str:
    """Keep a report that has nowhere to go; says where."""
    import tempfile

    from ganexport.artifact import write_atomic

    try:
        path = Path(tempfile.gettempdir(), f"ganexport-bench-{os.getpid()}.json")
        write_atomic(path, content)
    except (OSError, OutputError):
        return "what was measured is printed and nowhere else"
    return f"what was measured is kept in {path}"


@command.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--fail-if-slower",
    "threshold",
    callback=_percent,
    metavar="SHARE",
    help="Exit 1 when a row is slower by more than this, and when one that ran is gone, fails or is wrong now.",
)
@_console.json_option
def compare(old: Path, new: Path, threshold: float | None, as_json: bool) -> int:
    """Compare two reports; a difference counts when it exceeds both the share and the noise.

    \b
    ganexport bench compare old.json new.json --fail-if-slower 5%
    """
    import dataclasses

    from ganexport.bench.compare import compare_reports, environment_changes
    from ganexport.bench.reading import read_report
    from ganexport.bench.table import print_differences

    before, after = read_report(old), read_report(new)
    share = 0.05 if threshold is None else threshold
    differences = compare_reports(before, after, share)
    changes = environment_changes(before, after)
    if as_json:
        rows = [{**dataclasses.asdict(d), "verdict": d.verdict} for d in differences]
        _console.print_json({"threshold": share, "differences": rows, "changes": changes})
    else:
        print_differences(differences, changes, _console.results())
    slower = [
        f"{_where(d)} {d.comparison.ratio.value:.2f}x" for d in differences if d.comparison and d.verdict == "slower"
    ]
    lost = [f"{_where(d)}: {d.lost}" for d in differences if d.lost]
    if threshold is not None and (slower or lost):
        parts = [f"slower by more than {share:.0%}: {', '.join(slower)}"] if slower else []
        raise RegressionError("; ".join(parts + lost))
    return 0


def _where(found: Difference) -> str:
    from ganexport.bench.digest import sizes_words

    return f"{found.name} ({', '.join([found.scenario, *([sizes_words(found.sizes)] if found.sizes else [])])})"


@command.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The merged report, JSON.")
@click.option("--html", "html_path", type=click.Path(dir_okay=False, path_type=Path), help="Report with charts.")
@click.option("--markdown", "markdown_path", type=click.Path(dir_okay=False, path_type=Path), help="Tables, Markdown.")
@click.option("--title", default="", help="Title of the merged report.")
def merge(
    reports: tuple[Path, ...], output: Path | None, html_path: Path | None, markdown_path: Path | None, title: str
) -> int:
    """Put several machines' reports into one.

    \b
    ganexport bench merge cpu.json h100.json -o all.json --html all.html
    """
    from ganexport.bench.compare import merge_reports
    from ganexport.bench.reading import read_report
    from ganexport.bench.table import print_report

    outputs = _Outputs(output, html_path, markdown_path)
    outputs.require_writable()
    merged = merge_reports([read_report(path) for path in reports], title)
    with outputs.written(merged):
        print_report(merged, _console.results())
    return 0
