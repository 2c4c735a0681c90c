"""Which code, libraries and processor made a result.

Knows package versions, git and /proc; not models, runs or where the answer is written.
"""

import platform
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
"""The folder that holds search/: a checkout's root, or site-packages."""
LIBRARIES = ("torch", "transformers", "nevergrad", "cma", "numpy")
GIT_TIMEOUT_S = 2.0


def library_versions() -> dict[str, str | None]:
    """Return the versions of Python, of this package ("concord") and of the libraries that shape a result.

    None stands for a package that is not installed as one.
    """
    own = _checkout_version(CHECKOUT) or _installed_version("concord-merge")
    return {
        "concord": own,
        "python": platform.python_version(),
        **{name: _installed_version(name) for name in LIBRARIES},
    }


def checkout_commit(folder: Path = CHECKOUT) -> str | None:
    """Return the commit of a checkout, with "-dirty" where tracked files differ; None where git cannot tell.

    Only the folder's own repository counts, not one around it.
    """
    if not (folder / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name that the CPU gives itself, "CPU" where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _checkout_version(folder: Path) -> str | None:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return None
    return project.get("version") if project.get("name") == "concord-merge" else None
