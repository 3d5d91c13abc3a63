# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that does one request after the other, and what it noticed of the rest of the world.

As a program (URI SEED): reads and writes 4 KiB at random places of an export. For each line on stdin it says how many
requests per second it did since the last, and how many seconds the longest took. It ends with its stdin.
"""
import os
import random
import select
import subprocess
import sys
import time

from harness import KIB, SLOWNESS, die_with_parent, nbd_handle


def main():
    uri, seed = sys.argv[1:]
    choose = random.Random(seed)
    with nbd_handle(uri) as handle:
        blocks = handle.get_size() // (4 * KIB)
        data = os.urandom(4 * KIB)
        count, longest, began = 0, 0.0, time.monotonic()
        while True:
            if select.select([sys.stdin], [], [], 0)[0]:
                if not sys.stdin.readline():
                    return
                print(count / (time.monotonic() - began), longest, flush=True)
                count, longest, began = 0, 0.0, time.monotonic()
            offset = choose.randrange(blocks) * 4 * KIB
            start = time.monotonic()
            if choose.random() < 0.5:
                handle.pwrite(data, offset)
            else:
                handle.pread(4 * KIB, offset)
            longest = max(longest, time.monotonic() - start)
            count += 1


class Guest:
    """Such a process, seen from a test."""

    def __init__(self, uri, seed):
        line = [sys.executable, os.path.abspath(__file__), uri, str(seed)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, preexec_fn=die_with_parent)

    def so_far(self):
        """Requests per second, and the longest one in seconds, since the last call."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], 20 * SLOWNESS)[0]:
            raise AssertionError("a guest's request is not answered")
        answer = self.process.stdout.readline().split()
        if len(answer) != 2:
            raise AssertionError(f"the guest ended with {self.process.wait()}")
        return tuple(map(float, answer))

    def window(self, seconds):
        """The same for the seconds to come."""
        self.so_far()
        time.sleep(seconds)
        return self.so_far()

    def end(self):
        self.process.stdin.close()
        try:
            self.process.wait(5 * SLOWNESS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


if __name__ == "__main__":
    main()
