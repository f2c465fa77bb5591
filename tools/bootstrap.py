"""Make .venv from the pinned versions.  Runs on whatever Python `make` found, before anything is
installed: so it needs nothing but the standard library, and it says in a sentence what is missing.

    python3 tools/bootstrap.py .venv
"""

import os
import subprocess
import sys

NEEDED = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def give_up(sentence):
    """Say what is wrong and what to do, without a traceback."""
    sys.exit("\nmake: " + sentence + "\n")


def check_python():
    """This Python is new enough, and can make an environment."""
    if sys.version_info < NEEDED:
        give_up(
            "this needs Python %d.%d or newer, and %s is Python %d.%d. Install a newer one and name "
            "it, for example: make book PYTHON=python3.11"
            % (NEEDED + (sys.executable,) + tuple(sys.version_info[:2]))
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        give_up(
            "%s cannot make a virtual environment: its modules venv and ensurepip are missing. On "
            "Debian and Ubuntu: apt-get install python3-venv" % sys.executable
        )


def python_of(folder):
    """The environment's interpreter."""
    return os.path.join(folder, "Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_usable(folder):
    """Whether the environment exists and was made with this version of Python."""
    probe = [python_of(folder), "-c", "import pip, sys; print(sys.version_info[:2])"]
    try:
        found = subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return False
    return found == str(tuple(sys.version_info[:2]))


def install(python):
    """Install the book, its builders and its tests, at the versions of constraints.txt."""
    command = [
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--prefer-binary", "--constraint", "constraints.txt", "--editable", ".[test]",
    ]  # fmt: skip
    process = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if process.returncode == 0:
        return
    output = process.stdout
    print(output)
    signs = ("NewConnectionError", "ConnectTimeoutError", "NameResolutionError", "ProxyError",
             "Temporary failure in name resolution", "Max retries exceeded", "Network is unreachable",
             "Failed to establish a new connection")  # fmt: skip
    if any(sign in output for sign in signs):
        give_up(
            "pip could not reach its package index, so there is no network or a proxy is not set. "
            "Connect, or name an index that you can reach: PIP_INDEX_URL=https://... make book"
        )
    if "No matching distribution found" in output:
        give_up(
            "a pinned package (above) has no version for Python %d.%d on this machine. The pins are "
            "for CPython 3.11 to 3.13; name one of these: make book PYTHON=python3.11"
            % tuple(sys.version_info[:2])
        )
    give_up("pip failed; what it said stands above.")


def main():
    check_python()
    folder = os.path.join(ROOT, sys.argv[1] if len(sys.argv) > 1 else ".venv")
    if not is_usable(folder):
        print("Making %s with Python %d.%d" % ((folder,) + tuple(sys.version_info[:2])), flush=True)
        command = [sys.executable, "-m", "venv", "--clear", folder]
        if subprocess.run(command, check=False).returncode:
            give_up("%s could not make the environment %s." % (sys.executable, folder))
    print("Installing the pinned packages (the first time: minutes, about 2 GB)", flush=True)
    install(python_of(folder))


if __name__ == "__main__":
    main()
