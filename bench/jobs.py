#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures Interlock's jobs beside qemu-storage-daemon (aio=io_uring), in one run.

Images lie in tmpfs, and on disk with O_DIRECT. The two daemons take turns (A B A B) within each row; a row shows the
median of the rounds, with the least and the greatest. For each job: how many MiB of the source's data it moves a
second; the processor's seconds that it takes; how far the daemon's memory rises meanwhile; and, in runs of their own,
how long a client waits that reads and writes 4 KiB at random places of the source through NBD, one request at a time,
for as long as the job runs: that one percent of its requests take longer is what `p99` says. The last round of each
row is compared with what it was to be. In tmpfs `floor` is the fastest way that we know to fill a new file there
(floor.c). Before each daemon starts, free memory is touched (unless `--cold`).

Sources: `full` holds random bytes everywhere; `sparse` is eight times as long and holds as many 64 KiB pieces of them as
make an eighth of its data; `zeroes` is as long as `full`, all of it written, seven eighths with zeroes; `large` is of
1 TiB, with little in it.
"""
import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from run import LOAD, MIB, Interlock, Peer, Qmp, copying_floor, run, warm_memory

TIB = MIB * MIB
PIECE = 65536


class Source:
    """An image with content, beside others that are empty. Jobs leave what it shows as it is; clients do not."""

    def __init__(self, kind, directory, mib):
        self.kind = kind
        self.bytes, self.data = {
            "full": (mib * MIB, mib * MIB),
            "sparse": (8 * mib * MIB, mib * MIB // 8),
            "zeroes": (mib * MIB, mib * MIB // 8),
            "large": (TIB, mib * MIB // 8),
        }[kind]
        self.path = os.path.join(directory, f"{kind}.qcow2")
        raw = os.path.join(directory, "raw")
        chance = random.Random(1)
        with open(raw, "wb") as file:
            file.truncate(self.bytes)
            if self.data == self.bytes:
                for _ in range(self.data // MIB):
                    file.write(os.urandom(MIB))
            else:
                for place in sorted(chance.sample(range(self.bytes // PIECE), self.data // PIECE)):
                    file.seek(place * PIECE)
                    file.write(os.urandom(PIECE))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *(["-S", "0"] if kind == "zeroes" else []), raw,
            self.path)
        os.unlink(raw)


class Job:
    """What a job is told, and which images it works on: `source` is one of the chain or stands alone."""

    def __init__(self, name, bar, chain, command, arguments, compare, ready=False):
        self.name, self.bar, self.chain, self.command = name, bar, chain, command
        self.arguments, self.compare, self.ready = arguments, compare, ready


# chain: from the base to the top, "s" the source, "e" an empty image. The client uses the last; t is a target.
JOBS = [
    Job("commit", 1.3, "ese", "block-commit", {"device": "n2", "top-node": "n1", "base-node": "n0"}, 0),
    Job("active commit", 1.3, "es", "block-commit", {"device": "n1", "base-node": "n0"}, 0, True),
    Job("stream", 2.5, "se", "block-stream", {"device": "n1"}, 1),
    Job("mirror", 2.5, "s", "blockdev-mirror", {"device": "n0", "target": "t", "sync": "full"}, "t", True),
    Job("backup", 2.5, "s", "blockdev-backup", {"device": "n0", "target": "t", "sync": "full"}, "t"),
]


class Place:
    def __init__(self, name, base, options):
        self.name, self.options = name, options
        self.directory = tempfile.mkdtemp(prefix="il-bench-", dir=base)


class Daemon:
    """One run of a daemon with the images of a job."""

    def __init__(self, kind, place, job, source, warm):
        self.server = kind(place.directory, "qcow2")
        self.job, self.source = job, source
        self.paths = []
        warm_memory(warm)
        for number, letter in enumerate(job.chain):
            path = source.path if letter == "s" else os.path.join(self.server.directory, f"{number}.qcow2")
            backing = ["-b", self.paths[-1], "-F", "qcow2"] if number else []
            if letter == "e":
                run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, str(source.bytes))
            self.paths.append(path)
        self.target = os.path.join(self.server.directory, "t.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", self.target, str(source.bytes))
        self.server.start(self.command(place))
        self.qmp = Qmp(self.server.monitor)

    def command(self, place):
        server = self.server
        words = list(server.program())
        for number, path in [*enumerate(self.paths), ("t", self.target)]:
            name = f"n{number}" if number != "t" else "t"
            backing = f",backing=n{number - 1}" if number != "t" and number else ""
            words += server.file_options(f"f{number}", path + place.options)
            words += ["--blockdev", f"driver=qcow2,node-name={name},file=f{number}{backing}"]
        top = len(self.paths) - 1
        return [*words, *server.server_options(), "--export",
                f"type=nbd,id=export,node-name=n{top},name=disk,writable=on", *server.monitor_options()]

    def status(self, name):
        with open(f"/proc/{self.server.process.pid}/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def run_job(self):
        """Seconds, seconds of processors, bytes of memory."""
        job = self.job
        with open(f"/proc/{self.server.process.pid}/clear_refs", "w") as file:
            file.write("5")  # the peak is what is there now
        memory, cpu = self.status("VmRSS:"), self.server.cpu_seconds()
        begin = time.perf_counter()
        self.qmp.execute(job.command, **{"job-id": "j", **job.arguments})
        if job.ready:
            self.qmp.wait("BLOCK_JOB_READY")
            self.qmp.execute("block-job-complete", device="j")
        event = self.qmp.wait("BLOCK_JOB_COMPLETED")
        seconds = time.perf_counter() - begin
        if "error" in event["data"]:
            sys.exit(f"bench: {self.server.name}: {job.name}: {event['data']['error']}")
        return seconds, self.server.cpu_seconds() - cpu, self.status("VmHWM:") - memory

    def stop(self, compare):
        self.server.stop()
        result = self.target if self.job.compare == "t" else self.paths[self.job.compare]
        if compare:
            run("qemu-img", "check", "-q", "-f", "qcow2", result)
            run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", self.source.path, result)
        shutil.rmtree(self.server.directory, ignore_errors=True)


def measure_client(daemon):
    """p99 in microseconds of a client's requests while the job runs."""
    load = subprocess.Popen([LOAD, "--unix", daemon.server.path, "--export", "disk", "--mode", "mixed", "--random",
                             "--simple", "--until-input-ends"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if load.stdout.readline() != "connected\n":
        sys.exit("bench: nbd_load does not start")
    daemon.run_job()
    out, _ = load.communicate("")
    if load.returncode:
        sys.exit(f"bench: nbd_load: status {load.returncode}")
    return json.loads(out)["p99_us"]


def median_of(values):
    return statistics.median(values) if values else float("nan")


def span(values):
    return f"{median_of(values):7.0f} ({min(values):.0f}..{max(values):.0f})" if values else "-"


class Row:
    """Measurements of one job on one source in one place: server -> list of rounds."""

    def __init__(self, job, source, place):
        self.job, self.source, self.place = job, source, place
        self.speed, self.cpu, self.memory, self.p99 = ({} for _ in range(4))

    def add(self, which, server, value):
        which.setdefault(server, []).append(value)

    def title(self):
        return f"{self.place.name}: {self.job.name}, {self.source.kind}"

    def ratio(self):
        return median_of(self.speed["interlock"]) / median_of(self.speed.get("qemu-storage-daemon", []))

    def print(self):
        ours, theirs = "interlock", "qemu-storage-daemon"
        cells = [f"{self.title():30s}"]
        cells += [f"{span(self.speed.get(name, [])):>24s}" for name in (ours, theirs)]
        cells.append(f"x{self.ratio():<5.2f}")
        cells += [f"{median_of(self.cpu.get(name, [])):5.2f}" for name in (ours, theirs)]
        cells += [f"{max(self.memory.get(name, [0])) / MIB:6.1f}" for name in (ours, theirs)]
        if self.p99:
            cells += [f"{span(self.p99.get(name, [])):>22s}" for name in (ours, theirs)]
            cells.append(f"x{median_of(self.p99[ours]) / median_of(self.p99.get(theirs, [])):.2f}")
        print(" ".join(cells), flush=True)

    def as_json(self):
        return {"title": self.title(), "job": self.job.name, "source": self.source.kind, "place": self.place.name,
                "mib_per_second": self.speed, "cpu_seconds": self.cpu, "memory": self.memory, "p99_us": self.p99}


def measure(options, kinds, place, job, source):
    row = Row(job, source, place)
    for round_number in range(options.rounds):
        for kind in kinds:
            daemon = Daemon(kind, place, job, source, options.warm)
            seconds, cpu, memory = daemon.run_job()
            daemon.stop(round_number == options.rounds - 1)
            row.add(row.speed, kind.name, source.data / MIB / seconds)
            row.add(row.cpu, kind.name, cpu)
            row.add(row.memory, kind.name, memory)
    if source.kind == "full" and not options.no_client:
        for _ in range(options.rounds):
            for kind in kinds:
                daemon = Daemon(kind, place, job, source, options.warm)
                row.add(row.p99, kind.name, measure_client(daemon))
                daemon.stop(False)
    return row


def behind(row):
    bar = row.job.bar if row.place.name == "tmpfs" else 1
    words = []
    if row.ratio() < bar:
        words.append(f"x{row.ratio():.2f} of x{bar}")
    ours, theirs = (median_of(row.p99.get(name, [])) for name in ("interlock", "qemu-storage-daemon"))
    if ours > theirs / 2:
        words.append(f"p99 {ours:.0f} us, more than half of {theirs:.0f}")
    return words


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="data of the full source")
    parser.add_argument("--place", nargs="+", choices=("tmpfs", "disk"), default=("tmpfs", "disk"))
    parser.add_argument("--disk", metavar="DIRECTORY", help="where the images on disk lie (default: the system's own)")
    parser.add_argument("--jobs", nargs="+", choices=[job.name for job in JOBS])
    parser.add_argument("--sources", nargs="+", choices=("full", "sparse", "zeroes", "large"),
                        default=("full", "sparse", "zeroes", "large"), help="on disk: the first of them")
    parser.add_argument("--no-client", action="store_true", help="without the rounds that have a client")
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--cold", action="store_true", help="take free memory as it is (run.py, warm_memory)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    return parser.parse_args()


def measure_place(options, kinds, place, rows):
    for kind in options.sources if place.name == "tmpfs" else options.sources[:1]:
        source = Source(kind, place.directory, options.size)
        for job in JOBS:
            if not options.jobs or job.name in options.jobs:
                rows.append(measure(options, kinds, place, job, source))
                rows[-1].print()
        os.unlink(source.path)


def main():
    options = parse_options()
    options.warm = 0 if options.cold else options.size * 3 // 2
    if not os.path.exists(LOAD):
        sys.exit(f"bench: {LOAD} is not built")
    kinds = [kind for kind in (Interlock, Peer) if kind is Interlock or kind.is_there() and not options.without_peer]
    rows = []
    print(f"{'':30s} {'Interlock, MiB/s':>24s} {'qemu-storage-daemon':>24s} {'':6s} {'CPU s':>11s} {'memory, MiB':>13s} "
          f"{'p99, us':>45s}")
    for name in options.place:
        base = "/dev/shm" if name == "tmpfs" else options.disk
        place = Place(name, base, "" if name == "tmpfs" else ",cache.direct=on")
        try:
            if name == "tmpfs":
                warm_memory(options.warm)
                way, seconds = copying_floor(place.directory, options.size, options.rounds)
                print(f"{'tmpfs: floor':30s} {options.size / seconds:7.0f} ({way})")
            measure_place(options, kinds, place, rows)
        finally:
            shutil.rmtree(place.directory, ignore_errors=True)
    if options.json:
        with open(options.json, "w") as out:
            json.dump([row.as_json() for row in rows], out, indent=1)
    short = [(row, behind(row)) for row in rows if not options.without_peer]
    short = [(row, words) for row, words in short if words]
    print(f"\nrows that miss their bar: {len(short)}")
    for row, words in short:
        print(f"  {row.title()}: {'; '.join(words)}")


if __name__ == "__main__":
    main()
