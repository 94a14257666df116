from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from tq_core import cli, lloyd_max

pytest.importorskip("typer")
from typer.testing import CliRunner

CODEBOOK = EntryPoint("codebook", "tq_core.codebook_command:codebook", cli.GROUP)
BROKEN = EntryPoint("broken", "no_such_package_of_ours:command", cli.GROUP)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.build_app([CODEBOOK, BROKEN]), list(arguments))
    return result.exit_code, result.output


def test_codebook_as_json_is_the_codebook() -> None:
    code, output = run("codebook", "--dim", "64", "--bits", "3", "--json")
    assert code == 0
    shown = json.loads(output)
    book = lloyd_max(64, 3)
    assert shown["centroids"] == book.centroids.tolist()
    assert shown["mse"] == book.mse


@pytest.mark.parametrize("grid", ["none", "int7"])
def test_codebook_table_has_a_row_a_code(grid: str) -> None:
    code, output = run("codebook", "--dim", "128", "--bits", "2", "--grid", grid)
    assert code == 0
    book = lloyd_max(128, 2, grid=None if grid == "none" else "int7")
    for centroid in book.centroids:
        assert f"{centroid:.6f}" in output
    assert ("level" in output) == (grid != "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "9"), "bits=9"),
        (("--grid", "fp4"), "grid='fp4'"),
        (("--dim", "0", "--grid", "int7"), "dim=0"),
    ],
)
def test_bad_options_are_named(arguments: tuple[str, ...], message: str) -> None:
    code, output = run("codebook", *arguments)
    assert code == 2
    assert message in output


def test_a_command_that_cannot_load_is_listed_and_says_why() -> None:
    code, output = run("--help")
    assert code == 0
    assert "broken" in output
    code, output = run("broken")
    assert code != 0
    assert "no_such_package_of_ours" in output


def test_missing_extra_is_named() -> None:
    program = "import sys; sys.modules['typer'] = None; from tq_core.cli import main; main()"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.returncode == 2
    assert "pip install 'tq-core[cli]'" in out.stderr
    assert "Traceback" not in out.stderr
