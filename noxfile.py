"""Every check and every measurement by name: `nox -l` lists them, `nox` runs the whole round.

They run in the environment that nox itself is installed in, which the commands of the README make: torch is large, and
a second copy of it per session would cost minutes and gigabytes without testing anything else.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "floors", "doctests", "tests"]

EXTRAS = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]

# Ranks are processes: one thread each, or they take the cores from one another.
ENV = {"OMP_NUM_THREADS": "1"}


def python(session: nox.Session, *arguments: str) -> None:
    """Run this environment's Python."""
    session.run(sys.executable, *arguments, env=ENV)


def beside(session: nox.Session, *packages: str) -> None:
    """Install into an environment of the session's own, over this one: what they bring along changes nothing here."""
    (site,) = Path(session.virtualenv.location).glob("lib/python*/site-packages")
    (site / "this-environment.pth").write_text(sysconfig.get_path("purelib"))
    session.install("-c", "constraints.txt", *packages)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: what it finds, and whether everything is formatted."""
    python(session, "-m", "ruff", "check", ".")
    python(session, "-m", "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """pyright, strict, on the package."""
    python(session, "-m", "pyright", "--pythonpath", sys.executable)


@nox.session
def floors(session: nox.Session) -> None:
    """Who may import whom, and that every public name is documented."""
    python(session, "-m", "pytest", "tests/test_floors.py", "tests/test_public.py")


@nox.session
def doctests(session: nox.Session) -> None:
    """The examples in the docstrings."""
    python(session, "-m", "pytest", "--doctest-modules", "fabricfn")


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite, a file at a time on each of up to four cores; arguments after -- go to pytest."""
    python(session, "-m", "pytest", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", *session.posargs)


@nox.session
def compiling(session: nox.Session) -> None:
    """Compiled steps by inductor: 40 layers, two ranks, a second run; two minutes. Not part of the round."""
    python(session, "-m", "pytest", "tests/inductor.py", *session.posargs)


@nox.session
def lowbits(session: nox.Session) -> None:
    """Training and state in 8 bits and fewer by torchao and bitsandbytes, which it installs. Not in the round."""
    python(session, "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", ".[fp8,bitsandbytes]")
    python(session, "-m", "pytest", "tests/test_low_precision.py", "tests/test_low_bit_state.py", *session.posargs)


@nox.session(venv_backend="venv", reuse_venv=True)
def xla(session: nox.Session) -> None:
    """The laws over the real torch_xla, in an environment of its own, for it needs torch 2.9. Not part of the round.

    Two runs, since a process has either a device or all of them. FABRICFN_XLA_PYTHON names an interpreter that has
    everything already: pip may bring CUDA packages along (7 GB in all), of which nothing is used.
    """
    ready = os.environ.get("FABRICFN_XLA_PYTHON")
    if ready is None:
        session.install("-e", ".[xla,testing,closures]", "pytest", "pytest-timeout")
    for name, devices in (("xla", "2"), ("xla_fsdp", "4")):
        command = (ready or "python", "-m", "pytest", f"tests/test_{name}.py", *session.posargs)
        session.run(*command, env={**ENV, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": devices}, external=bool(ready))


@nox.session(venv_backend="venv")
def ray(session: nox.Session) -> None:
    """Ray Train starts the ranks. Not part of the round."""
    beside(session, "ray[train]")
    session.run("python", "-m", "pytest", "tests/test_ray.py", *session.posargs, env=ENV)


@nox.session(venv_backend="venv")
def trackers(session: nox.Session) -> None:
    """Weights & Biases, MLflow and Trackio, offline; a minute. Not part of the round."""
    beside(session, *EXTRAS["wandb"], *EXTRAS["mlflow"], *EXTRAS["trackio"])
    session.run("python", "-m", "pytest", "tests/test_trackers.py", *session.posargs, env=ENV)


@nox.session
def reliability(session: nox.Session) -> None:
    """Kills, power failures, damage, hostile files in full: docs/reliability.md; an hour. Not part of the round."""
    python(session, "-m", "tests.reliability", "--full", "--write", *session.posargs)


@nox.session
def plots(session: nox.Session) -> None:
    """Draw docs/resume.svg (the digits, six times: a minute on two cores), docs/ratios.svg. Not part of the round."""
    python(session, "docs/plots/resume.py")
    python(session, "docs/plots/ratios.py")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure, and write docs/benchmarks.md; about half an hour on two idle cores. Not part of the round."""
    python(session, "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", ".[bench]")
    python(session, "-m", "tests.benchmarks", *session.posargs)


@nox.session(venv_backend="venv")
def docs(session: nox.Session) -> None:
    """The site, in docs/_build/html; a warning is an error. And the tutorial, as it stands. Not part of the round."""
    beside(session, "-e", ".[docs]")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "docs", "docs/_build/html", env=ENV)
    session.run("python", "tests/programs/tutorial.py", env=ENV)


@nox.session(venv_backend="venv")
def changelog(session: nox.Session) -> None:
    """The section that changes/ makes of the next version; `-- build` writes it. Not part of the round."""
    beside(session, "-e", ".", "towncrier>=24.8")
    session.run("python", "-m", "towncrier", *(session.posargs or ("build", "--draft")))


@nox.session(venv_backend="venv")
def build(session: nox.Session) -> None:
    """Wheel and sdist into dist/, each installed from nothing and tried. Not part of the round.

    From nothing: torch too, which pip takes as `constraints.txt` says.
    """
    session.install("build>=1.2")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist")
    session.run("python", "-m", "pip", "uninstall", "-q", "-y", "build", "pyproject_hooks", "packaging")
    trial = Path("tests/programs/installed.py").resolve()
    for kind, options in (("*.whl", ()), ("*.tar.gz", ("--force-reinstall", "--no-deps"))):
        (package,) = Path("dist").glob(kind)
        session.install("-c", "constraints.txt", *options, str(package))
        with session.chdir(session.create_tmp()):
            session.run("python", "-I", "-W", "error", str(trial), env=ENV)
            session.run("fabricfn", "--help", silent=True)
