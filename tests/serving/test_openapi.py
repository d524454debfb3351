"""schemathesis against the server's own OpenAPI: every documented operation, valid and invalid requests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

#: JSON Schema cannot say that "labels" is as long as "seeds"; such requests are valid to it, and 422 to us.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 304, 422, 429, 503]
"""


@pytest.mark.slow
def test_schemathesis_finds_nothing(local, tmp_path: Path) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    url = f"http://127.0.0.1:{local.port}"
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{url}/openapi.json",
        "--url", url, "--max-examples", "60", "--seed", "1", "--no-color", "--suppress-health-check", "all",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=580)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "No issues found" in done.stdout, done.stdout[-2000:]
    assert local.admission.pending == 0
