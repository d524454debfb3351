"""Tables in the documentation, rendered from the committed results they show.

    python -m benchmarks.tables            # rewrite them
    python -m benchmarks.tables --check    # exit code 1 when one is not what its result gives

A table stands between two comments, the first of which names the result and how it is shown:

    <!-- table: benchmarks/results/<machine>/loadgen.json loadgen -->
    <!-- end of table -->

``report`` shows any result; ``loadgen``, ``verdicts``, ``gradient_penalty``, ``training``, ``training_step`` and
``backends`` those of the script of that name; ``speedups`` and ``speedups-in-detail`` the results of
``benchmarks.inference`` in a folder of machines.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import _speedups
from benchmarks._rows import say
from ganexport.bench.table import conditions, to_markdown
from ganexport.measurement import report_from_json

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
#: Ways to show one result; beside the whole report, the ``table`` of the script that measured it.
RENDERERS = ("report", "loadgen", "verdicts", "gradient_penalty", "training", "training_step", "backends")
#: Ways to show a folder of machines' results.
FOLDER_RENDERERS = ("speedups", "speedups-in-detail")


def documents() -> Iterator[Path]:
    """Files that may hold tables."""
    yield from (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def render(path: Path, how: str) -> str:
    """A result as Markdown, with its conditions and how to repeat it, or a folder of them."""
    known = FOLDER_RENDERERS if path.is_dir() else RENDERERS
    if how not in known:
        raise SystemExit(f"benchmarks.tables: unknown way {how!r} to show {path.name}; known: {', '.join(known)}")
    if path.is_dir():
        return _speedups.render(path, detailed=how == "speedups-in-detail") + "\n"
    report = report_from_json(path.read_bytes(), path.name)
    if how == "report":
        return to_markdown(report)
    table: str = importlib.import_module(f"benchmarks.{how}").table(report)
    return f"{table}\n{conditions(report)}. Repeat with `{report.command}`.\n"


def updated(text: str, where: str) -> str:
    """The document with every table as its result gives it."""

    def block(match: re.Match[str]) -> str:
        path = ROOT / match[2]
        if not path.exists():
            raise SystemExit(f"{where}: a table shows {match[2]}, which is not there")
        return f"{match[1]}\n{render(path, match[3])}\n{match[4]}"

    return _BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when a table is out of date")
    options = parser.parse_args(arguments)
    stale = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        new = updated(text, str(path.relative_to(ROOT)))
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(new, encoding="utf-8")
    for name in stale:
        say(f"{name}: {'out of date, run python -m benchmarks.tables' if options.check else 'rewritten'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
