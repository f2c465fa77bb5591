"""Make .venv from the pinned versions: `python3 tools/bootstrap.py .venv`.

Runs on whatever Python `make` found, before anything is installed.  So it needs nothing but the
standard library, is readable by Python 3.6, and says in a sentence what is missing.
"""

import os
import subprocess
import sys

NEEDED = "3.11"
FOUND = "{}.{}".format(*sys.version_info[:2])
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

#: What pip says when it cannot reach an index.
NO_NETWORK = (
    "NewConnectionError",
    "ConnectTimeoutError",
    "NameResolutionError",
    "ProxyError",
    "Temporary failure in name resolution",
    "Max retries exceeded",
    "Network is unreachable",
    "Failed to establish a new connection",
)


def give_up(sentence):
    """Say what is wrong and what to do, without a traceback."""
    sys.exit("\n" + sentence + "\n")


def check_python():
    """This Python is new enough, and can make an environment."""
    if sys.version_info < tuple(map(int, NEEDED.split("."))):
        give_up(
            f"The book needs Python {NEEDED} or newer, and {sys.executable} is Python {FOUND}. "
            f"Install a newer one and name it, for example: make book PYTHON=python{NEEDED}"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        give_up(
            f"{sys.executable} cannot make a virtual environment: its modules venv and ensurepip "
            "are missing. On Debian and Ubuntu: apt-get install python3-venv"
        )


def python_of(folder):
    """The environment's interpreter."""
    return os.path.join(folder, "Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_usable(folder):
    """Whether the environment exists and was made with this version of Python."""
    probe = [python_of(folder), "-c", "import pip, sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return done.stdout.strip() == FOUND


def install(python):
    """Install the book, its builders and its tests, at the versions of constraints.txt."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--prefer-binary", "--constraint", "constraints.txt", "--editable", ".[test]"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode == 0:
        return
    print(done.stdout)
    if any(sign in done.stdout for sign in NO_NETWORK):
        give_up(
            "pip could not reach its package index: no network, or a proxy that is not set. "
            "Connect, or name an index that you can reach: PIP_INDEX_URL=https://... make book"
        )
    if "No matching distribution found" in done.stdout:
        give_up(
            f"A pinned package (see above) has no version for Python {FOUND} at the index that pip "
            f"asked, if it could reach one. The pins were made with Python {NEEDED}; try: "
            f"make book PYTHON=python{NEEDED}"
        )
    give_up("pip failed; what it said stands above.")


def main():
    check_python()
    folder = os.path.join(ROOT, sys.argv[1] if len(sys.argv) > 1 else ".venv")
    if not is_usable(folder):
        print(f"Making {folder} with Python {FOUND}", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=False)
        if made.returncode:
            give_up(f"{sys.executable} could not make the environment {folder}.")
    print("Installing the pinned packages (the first time takes minutes)", flush=True)
    install(python_of(folder))


if __name__ == "__main__":
    main()
