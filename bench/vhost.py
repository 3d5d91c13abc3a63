#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures vhost-user-blk exports of Interlock beside qemu-storage-daemon's (aio=io_uring), as run.py does NBD.

The front end is vhost_load: rings in shared memory with event index and indirect descriptors, content checked.
"""
import argparse
import json
import os
import shutil
import tempfile
import time

import run as bench
from run import BUILD, MIB, PATTERNS, Results

LOAD = os.path.join(BUILD, "bench", "vhost_load")
WORKLOADS = [
    (f"{title}, {queues} queue{'s' if queues > 1 else ''}{', packed' if packed else ''}",
     [*words, "--queues", str(queues), *(["--packed"] if packed else [])])
    for queues, packed in ((1, False), (1, True), (2, False))
    for title, words in PATTERNS
]


class Vhost:
    """Mixed into a storage daemon of run.py: the same node by another export."""

    threads = 0
    packed = True

    def server_options(self):
        options = []
        for number in range(self.threads):
            options += ["--object", f"iothread,id=t{number}"]
        return options

    def iothreads(self):
        return ",iothread=t0" if self.threads else ""

    def command(self):
        return [*self.program(), *self.server_options(), *self.file_options("file", self.image),
                "--blockdev", f"driver={self.format},node-name=disk,file=file",
                "--export", "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=4,addr.type=unix,"
                f"addr.path={self.path}{self.iothreads()}", *self.monitor_options()]

    def start(self, command=None):
        bench.subprocess.run(["rm", "-f", self.path], check=True)
        with open(os.path.join(self.directory, "log"), "ab") as log:
            self.process = bench.subprocess.Popen(self.command(), stdin=bench.subprocess.DEVNULL, stdout=log, stderr=log)
        while not os.path.exists(self.path):
            if self.process.poll() is not None:
                raise SystemExit(f"bench: {self.name} does not start: see {self.directory}/log")
            time.sleep(0.001)

    def load(self, *words):
        before = self.cpu_seconds()
        measured = json.loads(bench.run(LOAD, "--unix", self.path, *words))
        measured["cpu_us"] = (self.cpu_seconds() - before) * 1e6 / max(1, measured["requests"])
        return measured


class Interlock(Vhost, bench.Interlock):
    pass


class MappedInterlock(Vhost, bench.MappedInterlock):
    pass


class Peer(Vhost, bench.Peer):
    packed = False  # it does not offer them


def measure(options, directory, results):
    for image_format in options.format:
        servers = [kind(directory, image_format) for kind in (Interlock, MappedInterlock, Peer) if kind.is_there()]
        try:
            for server in servers:
                server.threads = options.threads
                server.create_image(options.size * MIB)
                server.start()
                server.load("--mode", "fill", "--block", "262144", "--depth", "8")
            seed = 1
            for title, words in WORKLOADS:
                if options.only and not any(word in f"{image_format}: {title}" for word in options.only):
                    continue
                able = [server for server in servers if server.packed or "--packed" not in words]
                values = {server.name: [] for server in able}
                cpu_us = {server.name: [] for server in able}
                for round_number in range(options.rounds):
                    seed += 1
                    last = round_number == options.rounds - 1
                    for server in able:
                        measured = server.load(*words, "--seconds", str(options.seconds), "--seed", str(seed),
                                               *(["--verify"] if last and "write" in words else []))
                        values[server.name].append(measured["mib_per_second" if "--block" in words else "per_second"])
                        if not last:
                            cpu_us[server.name].append(measured["cpu_us"])
                unit = "MiB/s" if "--block" in words else "1/s"
                results.add(f"{image_format}: {title}", unit, values, cpu_us=cpu_us if options.rounds > 1 else None)
        finally:
            for server in servers:
                server.stop()
                shutil.rmtree(server.directory, ignore_errors=True)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="short rounds and small images: does it work at all")
    parser.add_argument("--rounds", type=int, help="measurements of each server in each row (default 3)")
    parser.add_argument("--seconds", type=float, help="length of one measurement (default 1)")
    parser.add_argument("--size", type=int, help="MiB of the image under load (default 256)")
    parser.add_argument("--threads", type=int, default=0, help="1: an iothread serves the export")
    parser.add_argument("--format", nargs="+", choices=("raw", "qcow2"), default=("raw", "qcow2"))
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only rows with one of these in their title")
    parser.add_argument("--cold", action="store_true", help="take free memory as it is (run.py, memory_kept())")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 3)
    options.seconds = options.seconds or (0.3 if options.quick else 1)
    options.size = options.size or (64 if options.quick else 256)
    return options


def main():
    options = parse_options()
    if not os.path.exists(LOAD):
        raise SystemExit(f"bench: {LOAD} is not built")
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = tempfile.mkdtemp(prefix="il-bench-", dir=base)
    results = Results()
    bench.print_head()
    try:
        with bench.memory_kept(options.cold or options.quick):
            measure(options, directory, results)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as out:
            json.dump({"rounds": options.rounds, "seconds": options.seconds, "rows": results.rows}, out, indent=1)
    behind = [row["title"] for row in results.rows
              if bench.Peer.name in row["servers"] and bench.ratio(row, bench.Peer.name) < 1]
    print(f"\nrows behind {bench.Peer.name}: {len(behind)}")
    for title in behind:
        print(f"  {title}")


if __name__ == "__main__":
    main()
