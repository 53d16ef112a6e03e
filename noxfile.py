"""Sessions of frfx. `nox -l` lists them; every one makes its own environment with uv."""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "tests"]
nox.options.reuse_existing_virtualenvs = True

PROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *extras: str, groups: tuple[str, ...] = ()) -> None:
    """Install frfx with extras, and groups of development dependencies, in one resolution."""
    package = f".[{','.join(extras)}]" if extras else "."
    wanted = [d for group in groups for d in nox.project.dependency_groups(PROJECT, group)]
    session.install("-e", package, *wanted)


@nox.session
def demo(session: nox.Session) -> None:
    """Train, invert and post-train a small network; arguments go to `frfx demo`."""
    install(session, "cli")
    session.run("frfx", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests that CI runs; arguments go to pytest."""
    install(session, "cli", "fabric", groups=("test",))
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def tests_thorough(session: nox.Session) -> None:
    """Run the tests with many more drawn examples."""
    install(session, "cli", "fabric", groups=("test",))
    environment = {"FRFX_HYPOTHESIS_PROFILE": "thorough"}
    session.run("pytest", "-n", "2", *session.posargs, env=environment)


@nox.session
def tests_oldest(session: nox.Session) -> None:
    """Run the tests on the oldest versions that pyproject.toml promises."""
    wanted = nox.project.dependency_groups(PROJECT, "test")
    session.install("-e", ".[cli,fabric]", *wanted, "--resolution", "lowest-direct")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    install(session, "cli", groups=("lint",))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def coverage(session: nox.Session) -> None:
    """Measure which lines and branches the tests reach."""
    install(session, "cli", "fabric", groups=("test",))
    session.run(
        "pytest", "-n", "2", "--cov", "--cov-report=term-missing:skip-covered", *session.posargs
    )


@nox.session(name="bench-joint")
def bench_joint(session: nox.Session) -> None:
    """Compare joint inversion with the layerwise policies and with minimal-norm attacks."""
    install(session, "cli")
    # visdom, which adv-lib draws in, needs an old setuptools to be built; adv-lib itself does not.
    constraints = Path(session.create_tmp()) / "build.txt"
    constraints.write_text("setuptools<80\n")
    session.install("foolbox", "adv-lib", "--build-constraint", str(constraints))
    session.run("python", "benchmarks/joint.py", *session.posargs)


@nox.session(name="bench-solvers")
def bench_solvers(session: nox.Session) -> None:
    """Measure the solvers beside their floors, and whole networks beside a training step."""
    install(session, "cli")
    session.run("python", "-m", "solvers", *session.posargs, env={"PYTHONPATH": "benchmarks"})


@nox.session
def zoo(session: nox.Session) -> None:
    """Invert every network of torchvision to four depths; arguments go to benchmarks/zoo.py."""
    install(session, "cli")
    session.run("python", "benchmarks/zoo.py", *session.posargs)


@nox.session
def paper(session: nox.Session) -> None:
    """Reproduce the paper's tables and figures; arguments go to benchmarks/paper."""
    install(session, "cli", groups=("paper",))
    session.run("python", "-m", "paper", *session.posargs, env={"PYTHONPATH": "benchmarks"})
