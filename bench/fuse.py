#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures FUSE exports beside qemu-storage-daemon's, in one run, on images in tmpfs, with fio as the client.

The two take turns (A B A B) within each row; a row shows the median of the rounds, with the least and the greatest, and
the processor's time that the server needs for a request. fio does direct I/O; `depth` is its I/O depth with libaio.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from run import MIB, Interlock, MappedInterlock, Peer, memory_kept, run

WORKLOADS = [
    ("4 KiB random read, depth 1", ["--rw=randread", "--bs=4k", "--iodepth=1"]),
    ("4 KiB random read, depth 32", ["--rw=randread", "--bs=4k", "--iodepth=32"]),
    ("4 KiB random write, depth 1", ["--rw=randwrite", "--bs=4k", "--iodepth=1"]),
    ("4 KiB random write, depth 32", ["--rw=randwrite", "--bs=4k", "--iodepth=32"]),
    ("256 KiB sequential read, depth 8", ["--rw=read", "--bs=256k", "--iodepth=8"]),
    ("256 KiB sequential write, depth 8", ["--rw=write", "--bs=256k", "--iodepth=8"]),
]


class Mounted:
    """A server with a FUSE export over a file beside its image."""

    def serve(self, size):
        self.create_image(size)
        self.mountpoint = os.path.join(self.directory, "mounted")
        open(self.mountpoint, "w").close()
        command = self.command()
        at = command.index("--export")
        command[at + 1] = f"type=fuse,id=export,node-name=disk,mountpoint={self.mountpoint},writable=on"
        self.start(command)
        give_up = time.perf_counter() + 20
        while os.stat(self.mountpoint).st_size != size:
            if time.perf_counter() > give_up:
                sys.exit(f"bench: {self.name} does not mount")
            time.sleep(0.001)

    def fio(self, size, seconds, *words):
        before = self.cpu_seconds()
        length = ["--time_based", f"--runtime={seconds}"] if seconds else []
        output = run("fio", "--name=load", f"--filename={self.mountpoint}", f"--size={size}", "--direct=1",
                     "--ioengine=libaio", "--output-format=json", *length, *words)
        job = json.loads(output[output.index("{"):])["jobs"][0]
        side = job["read"] if job["read"]["total_ios"] else job["write"]
        return side["iops"], (self.cpu_seconds() - before) * 1e6 / side["total_ios"]


class MountedInterlock(Mounted, Interlock):
    pass


class MountedPeer(Mounted, Peer):
    pass


def show(title, measured):
    words = []
    for name in ("interlock", "qemu-storage-daemon"):
        rates = [rate for rate, _ in measured[name]]
        words.append(f"{statistics.median(rates):8.0f} ({min(rates):.0f}–{max(rates):.0f})")
    rate = {name: statistics.median(rate for rate, _ in values) for name, values in measured.items()}
    cpu = {name: statistics.median(cpu for _, cpu in values) for name, values in measured.items()}
    print(f"{title:<42} {words[0]:>24} {words[1]:>24} {rate['interlock'] / rate['qemu-storage-daemon']:6.2f}  "
          f"{cpu['interlock']:7.2f} {cpu['qemu-storage-daemon']:7.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=1)
    parser.add_argument("--size", type=int, default=256, help="MiB of the image")
    parser.add_argument("--mapped", action="store_true", help="Interlock writes files through mappings (mapped=on)")
    parser.add_argument("--cold", action="store_true", help="take free memory as it is (run.py, memory_kept())")
    parser.add_argument("--format", nargs="+", choices=["raw", "qcow2"], default=["raw", "qcow2"])
    options = parser.parse_args()
    Interlock.aio = MappedInterlock.aio if options.mapped else Interlock.aio
    if not shutil.which("qemu-storage-daemon"):
        sys.exit("bench: qemu-storage-daemon is not installed")
    directory, size = tempfile.mkdtemp(prefix="il-bench-", dir="/dev/shm"), options.size * MIB
    print(f"{'requests a second':<42} {'Interlock':>24} {'qemu-storage-daemon':>24} {'ratio':>6}  CPU of a request, us")
    try:
        with memory_kept(options.cold):
            for image_format in options.format:
                servers = [MountedInterlock(directory, image_format), MountedPeer(directory, image_format)]
                try:
                    for server in servers:
                        server.serve(size)
                        server.fio(size, 0, "--rw=write", "--bs=1m")
                    for title, words in WORKLOADS:
                        measured = {server.name: [] for server in servers}
                        for _ in range(options.rounds):
                            for server in servers:
                                measured[server.name].append(server.fio(size, options.seconds, *words))
                        show(f"{image_format}: {title}", measured)
                finally:
                    for server in servers:
                        server.stop()
    finally:
        for name in os.listdir(directory):
            subprocess.run(["umount", "-q", os.path.join(directory, name, "mounted")], check=False)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
