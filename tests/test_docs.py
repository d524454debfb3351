"""Docs cannot drift: the README's commands are run, in order, and the reference shows the real ``--help``.

``python tests/test_docs.py`` rewrites docs/cli.md from the command line itself.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ganexport.cli.main import cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "cli.md"
#: Not run here: setting up is the demo's and CI's own step, and a test that ran `make test` would run itself.
NOT_RUN = ("make", "git", "cd", "pip", "python")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks that a test can use."""
    return re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.M | re.S)


def help_of(*words: str) -> str:
    result = CliRunner().invoke(cli, [*words, "--help"], prog_name="ganexport", terminal_width=100)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def sub_commands(name: str) -> list[str]:
    command = cli.get_command(None, name)  # type: ignore[arg-type]
    return sorted(getattr(command, "commands", {}))


def reference() -> str:
    parts = [
        "# Command line\n\nEvery command's `--help`, as it prints it. Exit codes: 0 done; 1 the check failed; "
        "2 bad usage, bad input or a refusal; 130 Ctrl-C; 143 SIGTERM.\n",
        f"```text\n{help_of()}\n```\n",
    ]
    for name in cli.list_commands(None):  # type: ignore[arg-type]
        parts.append(f"## ganexport {name}\n\n```text\n{help_of(name)}\n```\n")
        parts.extend(
            f"### ganexport {name} {sub}\n\n```text\n{help_of(name, sub)}\n```\n" for sub in sub_commands(name)
        )
    return "\n".join(parts)


def test_reference_is_what_the_commands_print():
    assert REFERENCE.read_text() == reference(), "run: python tests/test_docs.py"


@pytest.mark.parametrize("name", cli.list_commands(None))  # type: ignore[arg-type]
def test_every_command_shows_an_example(name):
    assert "ganexport " + name in help_of(name).split("\n", 1)[1], f"{name}: no example in its help"


def test_readme_commands_work_in_order(tmp_path):
    found = blocks(README.read_text())
    assert any(language == "bash" for language, _ in found)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for language, content in found:
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", content)
            path = tmp_path / (name.group(1) if name else "snippet.py")
            path.write_text(content)
            commands = [] if name else [[sys.executable, str(path)]]
        else:
            joined = content.replace("\\\n", " ")
            lines = [line.split(" #")[0].strip() for line in joined.splitlines()]
            commands = [shlex.split(line) for line in lines if line and not line.startswith(("#", *NOT_RUN))]
        for command in commands:
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
            )
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]), ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_somewhere(path):
    for target in LINK.findall(path.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


if __name__ == "__main__":
    REFERENCE.write_text(reference())
