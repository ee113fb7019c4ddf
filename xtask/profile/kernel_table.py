"""What a GPU was busy with: a table from the list that cuda_kernels.c writes.

    kernel_table.py TRACE STEPS [ROWS]

Takes the last half of the trace, of which STEPS steps were made in all, and prints for each kernel its time and calls a step.
"""

import collections
import re
import sys

# The first word that fits names the work.
KINDS = [
    ("attention", r"flash|sdpa|attention|cudnn"),
    ("product", r"gemm|gemv|nvjet|cutlass|xmma|splitK|wgmma"),
    ("norm", r"norm"),
    ("rotation", r"rope"),
    ("sum", r"reduce|softmax|logsumexp"),
    ("gather", r"gather|scatter"),
    ("copy", r"copy|concat|fill"),
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


def kind(name):
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.I)), "element-wise")


def main():
    path, steps = sys.argv[1], int(sys.argv[2])
    most = int(sys.argv[3]) if len(sys.argv) > 3 else 60
    rows = read(path)
    half = rows[len(rows) // 2 :]
    steps = steps * len(half) / len(rows)
    wall = (half[-1][1] - half[0][0]) / steps / 1e6
    print(f"a step: {wall:.2f} ms, {busy(half) / steps / 1e6:.2f} ms of it busy, {len(half) / steps:.0f} kernels")
    kinds, single = collections.Counter(), collections.defaultdict(lambda: [0, 0])
    for start, end, name, shape in half:
        kinds[kind(name)] += end - start
        entry = single[(name, shape)]
        entry[0] += end - start
        entry[1] += 1
    for name, total in kinds.most_common():
        print(f"{total / steps / 1e6:8.2f} ms  {name}")
    for (name, shape), (total, calls) in sorted(single.items(), key=lambda item: -item[1][0])[:most]:
        print(f"{total / steps / 1e6:8.3f} ms {calls / steps:7.1f} x {total / calls / 1e3:8.1f} us  {shape:18} {name[:150]}")


if __name__ == "__main__":
    main()
