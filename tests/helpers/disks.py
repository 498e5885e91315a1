"""Small disks: full ones, and ones that cannot be written, for tests that run as root on Linux."""

import contextlib
import os
import shutil
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder, size="256k"):
    """Mount a file system of so many bytes on `folder`; the test is skipped where that is refused.

    Gives a function that makes it read-only.
    """
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small file system cannot be mounted here")

    mount(f"size={size}")
    try:
        yield lambda: mount("remount", "ro")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def tree(folder):
    """The content of every file below, None for folders."""
    return {path: None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}
