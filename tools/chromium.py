"""Find the Chromium that the tests drive, or install one where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

#: Quiet, alone, without the GPU; root needs --no-sandbox.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class NoChromium(RuntimeError):
    """There is no Chromium, and none could be installed."""


def find() -> str:
    """Path of a Chromium: `CHROMIUM`, else one on the PATH, else a fresh one from apt as root.

    Raises:
        NoChromium: none of these.
    """
    if named := os.environ.get("CHROMIUM"):
        if shutil.which(named):
            return named
        raise NoChromium(f"CHROMIUM={named} is not a program that can be run")
    if found := _on_path():
        return found
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        print("No Chromium: installing one with apt-get", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, check=False)
        if found := _on_path():
            return found
    raise NoChromium(
        "the tests in a browser need Chromium and found none: install it (Debian and Ubuntu: "
        "apt-get install chromium) or say where it is: CHROMIUM=/path/to/chromium make test"
    )


def _on_path() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)
