"""What Triton lacks is said, and nothing that needs it is chosen then."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.kernels import triton_support


def test_no_compiler_is_an_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert triton_support.triton_missing() == "Triton needs a C compiler, and none of gcc, clang, cc is on PATH"
    (tmp_path / "cc").write_text("#!/bin/sh\n")
    (tmp_path / "cc").chmod(0o755)
    assert triton_support.triton_missing() is None


def test_no_triton_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(triton_support.triton_missing())
