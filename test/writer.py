# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that notes when it wrote what, and the judge of copies that were made meanwhile.

As a program (URI SEED FIRST COUNT LOG): writes runs of blocks at random places of its part of an export, one after the
other, as fast as it can. Each block says which write it is of. Ends with its stdin, and leaves the list of its writes.

A copy of a point in time shows of each block the last write before that point. So when it shows a write, it shows every
write that was over before that one began: check_cut() looks for one that is missing.
"""
import os
import random
import select
import struct
import subprocess
import sys
import time

from harness import KIB, SLOWNESS, die_with_parent, nbd_handle

BLOCK = KIB
RUN = 40  # blocks of one write at most
RECORD = struct.Struct("<QQQdd")  # number, first block, blocks, begun, over


def content(number, block):
    return struct.pack("<QQ", number, block) * (BLOCK // 16)


def main():
    uri, seed, first, count, log = sys.argv[1:]
    first, count = int(first), int(count)
    choose = random.Random(seed)
    number = (int(seed) + 1) << 32
    with nbd_handle(uri) as handle, open(log, "wb") as out:
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            number += 1
            blocks = choose.randrange(1, RUN)
            block = first + choose.randrange(count - blocks)
            data = b"".join(content(number, block + i) for i in range(blocks))
            begun = time.monotonic()
            handle.pwrite(data, block * BLOCK)
            out.write(RECORD.pack(number, block, blocks, begun, time.monotonic()))


class Writer:
    """Such a process, seen from a test."""

    def __init__(self, directory, uri, seed, first, count):
        self.log = os.path.join(directory, f"writer-{seed}-{time.monotonic_ns()}.log")
        line = [sys.executable, os.path.abspath(__file__), uri, str(seed), str(first), str(count), self.log]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, stdin=pipe, stdout=pipe, preexec_fn=die_with_parent)
        self.process.stdout.readline()

    def end(self):
        """Its writes: (number, first block, blocks, begun, over)."""
        self.process.stdin.close()
        status = self.process.wait(20 * SLOWNESS)
        self.process.stdout.close()
        if status != 0:
            raise AssertionError(f"a writer ended with {status}")
        with open(self.log, "rb") as log:
            return list(RECORD.iter_unpack(log.read()))


def writes_of_blocks(writes):
    """Block -> its writes in order."""
    blocks = {}
    for number, block, count, begun, over in sorted(writes, key=lambda write: write[3]):
        for i in range(block, block + count):
            blocks.setdefault(i, []).append((number, begun, over))
    return blocks


def shown_place(data, block, history, original):
    """Which of the block's writes the copy shows: its place in their list, or -1 for none."""
    at = slice(block * BLOCK, (block + 1) * BLOCK)
    if data[at] == original[at]:
        return -1
    number = struct.unpack_from("<Q", data, block * BLOCK)[0]
    place = next((i for i, write in enumerate(history) if write[0] == number), None)
    if place is None or data[at] != content(number, block):
        raise AssertionError(f"block {block} shows what was never there: {data[at][:32].hex()}")
    return place


def shown_and_missing(data, original, writes):
    """When the newest write that the copy shows began, and when the oldest that it lacks was over; how many blocks are
    of writes."""
    if len(data) != len(original):
        raise AssertionError(f"the copy has {len(data)} bytes instead of {len(original)}")
    blocks = writes_of_blocks(writes)
    newest, missing, count = 0.0, float("inf"), 0
    for block in range(len(data) // BLOCK):
        at = slice(block * BLOCK, (block + 1) * BLOCK)
        history = blocks.get(block)
        if history is None:
            if data[at] != original[at]:
                raise AssertionError(f"block {block} was never written, and is not as it was")
            continue
        place = shown_place(data, block, history, original)
        count += place >= 0
        if place >= 0:
            newest = max(newest, history[place][1])
        if place + 1 < len(history):
            missing = min(missing, history[place + 1][2])
    return newest, missing, count


def check_cut(copies, asked, answered):
    """Are the copies, (data, original content, writes to it) each, what all those disks held at one moment between
    `asked` and `answered`? Returns how many blocks are of writes."""
    found = [shown_and_missing(*copy) for copy in copies]
    newest, missing = max(one[0] for one in found), min(one[1] for one in found)
    if newest > answered:
        raise AssertionError(f"a write is there that began {newest - answered:.6f} s after the command was answered")
    if missing < asked:
        raise AssertionError(f"a write lacks that was over {asked - missing:.6f} s before the command came")
    if missing < newest:
        raise AssertionError(f"a write lacks that was over {newest - missing:.6f} s before one began that is there")
    return sum(one[2] for one in found)


if __name__ == "__main__":
    main()
