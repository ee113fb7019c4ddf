"""What a GPU was busy with: a table from the list that cuda_kernels.c writes.

    kernel_table.py TRACE MARK COUNT [ROWS]

A step begins with every COUNT-th kernel whose name contains MARK, such as `planish_cross_entropy 4` for a loss of four chunks. The
first four steps are left out. Prints the time of each kind of work in a step, and of the ROWS largest kernels.
"""

import collections
import re
import sys

WARM_UP = 4
# The first that fits names the work.
KINDS = [
    ("products of the base", r"nvjet_\w+_(256x128|320x128|128x256)"),
    ("low-rank products", r"nvjet|gemm|gemv|cutlass|splitK"),
    ("attention", r"flash|sdpa|cudnn|fmha"),
    ("SwiGLU", r"swiglu|Sigmoid"),
    ("norms", r"norm"),
    ("cross-entropy", r"cross_entropy|logsumexp"),
    ("the rest", r""),
]


def read(path):
    rows = []
    for line in open(path):
        start, end, rest = line.rstrip("\n").split(" ", 2)
        name, _, shape = rest.rpartition(" ")
        rows.append((int(start), int(end), name, shape))
    rows.sort()
    return rows


def busy(rows):
    total, last = 0, 0
    for start, end, *_ in rows:
        total += max(0, end - max(start, last))
        last = max(last, end)
    return total


def main():
    path, mark, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    most = int(sys.argv[4]) if len(sys.argv) > 4 else 40
    rows = read(path)
    begins = [i for i, row in enumerate(rows) if mark in row[2]][::count][WARM_UP:]
    if len(begins) < 2:
        sys.exit(f"{path}: {mark} does not mark {WARM_UP + 2} steps of {count}")
    steps, part = len(begins) - 1, rows[begins[0] : begins[-1]]
    wall = (rows[begins[-1]][0] - part[0][0]) / steps / 1e6
    print(f"a step: {wall:.1f} ms, {busy(part) / steps / 1e6:.1f} ms of it busy, {len(part) / steps:.0f} kernels, {steps} steps")
    kinds, single = collections.Counter(), collections.defaultdict(lambda: [0, 0])
    for start, end, name, shape in part:
        kinds[next(kind for kind, pattern in KINDS if re.search(pattern, name))] += end - start
        entry = single[(name, shape)]
        entry[0] += end - start
        entry[1] += 1
    for kind, total in kinds.most_common():
        print(f"{total / steps / 1e6:8.1f} ms  {kind}")
    for (name, shape), (total, calls) in sorted(single.items(), key=lambda item: -item[1][0])[:most]:
        print(f"{total / steps / 1e6:8.3f} ms {calls / steps:7.1f} x {total / calls / 1e3:8.1f} us  {shape:18} {name[:150]}")


if __name__ == "__main__":
    main()
