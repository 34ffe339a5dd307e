"""A launcher of nvcc: prints what the assembler says of each kernel's registers, and fails on spills or stack.

    python no_spills.py nvcc -Xptxas -v ...
"""

from __future__ import annotations

import re
import subprocess
import sys

KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def complaints(log: str) -> list[str]:
    """The kernels that keep numbers in local memory."""
    found, kernel = [], "an unnamed kernel"
    for line in log.splitlines():
        if named := KERNEL.search(line):
            kernel = f"{named[1]} for {named[2]}"
        elif (memory := MEMORY.search(line)) and any(int(n) for n in memory.groups()):
            found.append(f"{kernel}: {memory[0]}")
    return found


def main(command: list[str]) -> int:
    """Run the command; its exit status, or 1 if a kernel spills."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    found = complaints(done.stderr)
    for line in found:
        print(f"local memory: {line}", file=sys.stderr)
    return done.returncode or bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
