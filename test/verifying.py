# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verifying client (test/verify/) as tests use it: a process that writes and checks a region of an export."""
import os
import signal
import struct
import subprocess
import time

from harness import ROOT, SLOWNESS, die_with_parent, run

PROGRAM = os.path.join(ROOT, "build", "test", "verify-client")
COUNTERS = ("reads", "writes", "zeroes", "trims", "flushes")


class Region:
    """A region of a disk with the ledger of what it must contain. Outlives clients and daemons."""

    def __init__(self, directory, name, seed, offset, length, block=4096, original=None):
        self.ledger = os.path.join(directory, f"{name}.ledger")
        self.seed = seed
        self.geometry = ["--offset", str(offset), "--length", str(length), "--block", str(block)]
        self.original = ["--original", original] if original else []
        self.log = os.path.join(directory, f"{name}.log")
        self.runs = 0

    def options(self):
        self.runs += 1
        fresh = [] if os.path.exists(self.ledger) else ["--new", *self.geometry]
        return ["--ledger", self.ledger, "--seed", str(self.seed), *self.original, *fresh]

    def start(self, socket, export, *options):
        return Client(self, ["--socket", socket, "--export", export, *options])

    def counters(self):
        """Completed requests by kind, read from the ledger while a client runs."""
        with open(self.ledger, "rb") as ledger:
            return dict(zip(COUNTERS, struct.unpack("<5Q", ledger.read(80)[40:80])))

    def verify(self, socket, export, *options):
        """Reads the whole region through the export and compares."""
        run(PROGRAM, *self.options(), "--socket", socket, "--export", export, "--verify", *options)

    def settle(self, socket, export, *options):
        """The same, and rewrites what a crash or a disconnection left uncertain."""
        run(PROGRAM, *self.options(), "--socket", socket, "--export", export, "--settle", *options)

    def verify_file(self, raw, *options):
        """Compares a raw image of the whole disk."""
        run(PROGRAM, *self.options(), "--file", raw, *options)


def before_exec():
    """A SIGTERM that comes before the client's handler stands waits for it."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


class Client:
    """A running client. It ends when told, or at once when it reads something wrong."""

    def __init__(self, region, options):
        self.region = region
        with open(region.log, "ab") as log:
            self.process = subprocess.Popen(
                [PROGRAM, *region.options(), *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=before_exec,
            )

    def text(self):
        with open(self.region.log, "r", encoding="utf-8", errors="replace") as log:
            return log.read()[-4000:]

    def check_running(self):
        if self.process.poll() is not None:
            raise AssertionError(f"the client ended with {self.process.returncode}:\n{self.text()}")

    def wait_progress(self, requests=50, timeout=20 * SLOWNESS):
        """Until so many more writes are done: the client is not stuck."""
        deadline = time.monotonic() + timeout
        while not os.path.exists(self.region.ledger) or os.path.getsize(self.region.ledger) < 80:
            self.check_running()
            time.sleep(0.01)
        goal = self.region.counters()["writes"] + requests
        while self.region.counters()["writes"] < goal:
            self.check_running()
            if time.monotonic() > deadline:
                raise AssertionError(f"the client makes no progress:\n{self.text()}")
            time.sleep(0.005)

    def wait(self, status=0, timeout=90):
        returned = self.process.wait(timeout)
        if returned != status:
            raise AssertionError(f"the client ended with {returned} instead of {status}:\n{self.text()}")

    def stop(self, status=0):
        """Lets it finish what is under way; fails if it saw anything wrong."""
        self.process.send_signal(signal.SIGTERM)
        self.wait(status)

    def kill(self):
        self.process.kill()
        self.process.wait()
