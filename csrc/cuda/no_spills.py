"""A launcher of nvcc that fails where the assembler says of a kernel that it spills or keeps a stack.

python no_spills.py nvcc -Xptxas -v ...
"""

from __future__ import annotations

import re
import subprocess
import sys

KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
ASSEMBLER = re.compile(r"^ptxas info|bytes stack frame")
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
    found = complaints(done.stderr)
    said = (line for line in done.stderr.splitlines() if not ASSEMBLER.search(line))
    print(*said, sep="\n", end="", file=sys.stderr)
    for line in found:
        print(f"local memory: {line}", file=sys.stderr)
    return done.returncode or bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
