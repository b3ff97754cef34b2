"""Lists the raise statements that the coverage data in .coverage does not contain; exits with 1 when there are any.

Run by scripts/raises.
"""

import ast
import sys
from pathlib import Path

from coverage import Coverage

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Returns the exit code."""
    coverage = Coverage()
    coverage.load()
    total, missed = 0, []
    for path in sorted([*(ROOT / "ptq").rglob("*.py"), *(ROOT / "kernels/ptq_kernels").rglob("*.py")]):
        executed = set(coverage.get_data().lines(str(path)) or [])
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise):
                total += 1
                if node.lineno not in executed:
                    text = source.splitlines()[node.lineno - 1].strip()
                    missed.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    print("\n".join([*missed, f"{len(missed)} of {total} raise statements were not executed"]))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
