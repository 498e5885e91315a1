"""The entry point `dfkd`: the commands of the package as sub-commands."""

import runpy
import sys

COMMANDS = {
    "main": "distil a student from a teacher, or go on with a run",
    "compare": "several methods and seeds from one teacher, with a report",
    "report": "tables and figures of finished runs",
    "convert": "make a teacher of a PyTorch checkpoint",
    "export": "write the student of a run as safetensors, StableHLO or ONNX",
    "evaluate": "measure a student, a teacher or an exported file on test images",
    "prepare": "prepare a data set once",
    "benchmark": "time the steps of a configuration",
}


def usage() -> str:
    """What the entry point prints for --help."""
    lines = [f"  {name:10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: dfkd COMMAND [FLAGS]; dfkd COMMAND --help lists the flags of one.", *lines]
    )


def main() -> int:
    """Run the command that the first argument names; the exit code where none does."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name not in COMMANDS:
        allowed = ", ".join(COMMANDS)
        print(f"dfkd_jax: {name!r} is no command; allowed are {allowed}.", file=sys.stderr)
        return 2
    sys.argv = [f"dfkd {name}", *sys.argv[2:]]
    # As `python -m` has it: networks and methods of one's own are found from here.
    sys.path.insert(0, "")
    runpy.run_module(f"dfkd_jax.{name}", run_name="__main__", alter_sys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
