"""Each script of ``examples`` writes its figure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAPER = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "how_it_works")


def run(script: str, folder: Path, *arguments: str) -> set[str]:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("script", PAPER)
def test_figures_of_the_paper(script: str, tmp_path: Path) -> None:
    name = script.replace("_", "-")
    assert run(script, tmp_path, "--quick") == {f"{name}.png", f"{name}.csv"}


def test_every_experiment_has_a_script() -> None:
    from tq_core.reproduce import EXPERIMENTS

    assert {name.replace("_", "-") for name in PAPER} == set(EXPERIMENTS)


def test_pictures_of_how_it_works(tmp_path: Path) -> None:
    assert run("how_it_works", tmp_path) == {"rotation.png", "codebook.png"}
