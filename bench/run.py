#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures Interlock beside qemu-storage-daemon (aio=io_uring) and nbdkit's file plugin, in one run.

Everything lies in tmpfs and goes over unix sockets, so that what is measured is the programs. Servers take turns
(A B C A B C) within each row; a row's figure is the median of its rounds, with the least and the greatest beside it.
The load generator (nbd_load) checks the content of what it reads, and after its writes all of the image. `limit` is
nbd_limit: a server that does nothing but answer, from memory; `of files` the same that reads and writes a file in
tmpfs, with one call for each request.
"""
import argparse
import contextlib
import json
import mmap
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.join(ROOT, os.environ.get("INTERLOCK_BUILD", "build"))
LOAD = os.path.join(BUILD, "bench", "nbd_load")
LIMIT = os.path.join(BUILD, "bench", "nbd_limit")
FLOOR = os.path.join(BUILD, "bench", "floor")
MIB = 1024 * 1024
MADV_POPULATE_WRITE = 23  # of Linux 5.14
# The least order of free blocks that the host is told of; there are none of this one.
PAGE_REPORTING, NO_PAGE_REPORTING = "/sys/module/page_reporting/parameters/page_reporting_order", "11"

# What a load generator does: title and what it is told.
PATTERNS = (
    ("4 KiB random read, depth 1", ["--mode", "read", "--random", "--depth", "1"]),
    ("4 KiB random read, depth 32", ["--mode", "read", "--random", "--depth", "32"]),
    ("4 KiB random write, depth 1", ["--mode", "write", "--random", "--depth", "1"]),
    ("4 KiB random write, depth 32", ["--mode", "write", "--random", "--depth", "32"]),
    ("256 KiB sequential read, depth 8", ["--mode", "read", "--block", "262144", "--depth", "8"]),
    ("256 KiB sequential write, depth 8", ["--mode", "write", "--block", "262144", "--depth", "8"]),
)
# Rows of the table.
WORKLOADS = [
    (f"{title}, {connections} connection{'s' if connections > 1 else ''}", [*words, "--connections", str(connections)])
    for connections in (1, 4)
    for title, words in PATTERNS
]


def warm_memory(mebibytes):
    """Touches so much memory, in small pages and as much again in huge ones, and frees it. The host of a virtual machine
    may take back what lies free (free page reporting) and give it back page by page, which takes ten times as long as
    to fill it: without this, that is what is measured, and of whoever comes first."""
    if not mebibytes:
        return
    memories = [mmap.mmap(-1, mebibytes * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
    memories[1].madvise(mmap.MADV_HUGEPAGE)
    for memory in memories:
        memory.madvise(MADV_POPULATE_WRITE)
    for memory in memories:
        memory.close()


def touch_free_memory():
    """All but 2 GiB of it, and lets it go again."""
    with open("/proc/meminfo") as info:
        free = next(int(line.split()[1]) for line in info if line.startswith("MemFree:")) // 1024
    memories = []
    for _ in range(free // 1024 - 2):
        memories.append(mmap.mmap(-1, 1024 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        memories[-1].madvise(MADV_POPULATE_WRITE)
    for memory in memories:
        memory.close()


@contextlib.contextmanager
def memory_kept(cold=False):
    """Meanwhile the host is not told of free memory (a setting of this kernel, which is restored), and what is free has
    been touched. Else what sockets are sent through may be memory that the host has to give back first, 10 us for a page:
    for seconds, and whoever's turn it is, a call takes 40 us instead of 2. Nothing of it where there is no such setting or
    it may not be changed."""
    old = None
    with contextlib.suppress(OSError):
        with open(PAGE_REPORTING) as setting:
            value = setting.read().strip()
        if not cold:
            with open(PAGE_REPORTING, "w") as setting:
                setting.write(NO_PAGE_REPORTING)
            old = value
    try:
        if old is not None:
            print("bench: free memory is touched and kept (--cold: as it is)", file=sys.stderr)
            touch_free_memory()
        yield
    finally:
        if old is not None:
            with open(PAGE_REPORTING, "w") as setting:
                setting.write(old)


def copying_floor(directory, mebibytes, rounds):
    """How fast a file in memory can be copied by any way (floor.c): the fastest one, and its seconds."""
    text = subprocess.run([FLOOR, directory, str(mebibytes), str(rounds)], check=True, capture_output=True, text=True).stdout
    ways = [line.split("\t") for line in text.splitlines()]
    return min(((name, float(seconds)) for name, seconds in ways), key=lambda way: way[1])


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"bench: {' '.join(command)}: status {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


class Qmp:
    """As much of a QMP client as the jobs need."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        give_up = time.perf_counter() + 20
        while True:  # the NBD server may be there before the monitor is
            try:
                self.socket.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.perf_counter() > give_up:
                    raise
                time.sleep(0.001)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.execute("qmp_capabilities")

    def execute(self, command, **arguments):
        self.events = []
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            message = json.loads(self.file.readline())
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                sys.exit(f"bench: {command}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait(self, event):
        for message in self.events:
            if message["event"] == event:
                return message
        while True:
            message = json.loads(self.file.readline())
            if message.get("event") == event:
                return message


class Server:
    """A program under measurement, with an image of its own in a directory of its own."""

    name = None
    formats = ("raw", "qcow2")

    def __init__(self, directory, image_format):
        self.directory = os.path.join(directory, f"{self.name}-{image_format}")
        self.format = image_format
        os.makedirs(self.directory, exist_ok=True)
        self.image = os.path.join(self.directory, "image")
        self.path = os.path.join(self.directory, "nbd")
        self.monitor = os.path.join(self.directory, "qmp")
        self.process = None

    @classmethod
    def is_there(cls):
        raise NotImplementedError

    def command(self):
        raise NotImplementedError

    def create_image(self, size):
        run("qemu-img", "create", "-q", "-f", self.format, self.image, str(size))

    def start(self, command=None):
        """Returns how many seconds it took until the NBD server greeted a client."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        log = open(os.path.join(self.directory, "log"), "ab")
        begin = time.perf_counter()
        self.process = subprocess.Popen(command or self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(self.path)
                    if client.recv(8) == b"NBDMAGIC":
                        return time.perf_counter() - begin
            if self.process.poll() is not None or time.perf_counter() - begin > 20:
                with open(os.path.join(self.directory, "log")) as text:
                    sys.exit(f"bench: {self.name} does not start:\n{text.read()}")
            time.sleep(0.0005)

    def resident_bytes(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
        return 0

    def cpu_seconds(self):
        with open(f"/proc/{self.process.pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def load(self, *words):
        before = self.cpu_seconds()
        measured = json.loads(run(LOAD, "--unix", self.path, "--export", self.export(), *words))
        measured["cpu_us"] = (self.cpu_seconds() - before) * 1e6 / max(1, measured["requests"])
        return measured

    def export(self):
        return "disk"

    def stop(self):
        if self.process:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


class StorageDaemon(Server):
    """What Interlock and the peer have in common: the command line."""

    aio = ""

    def program(self):
        raise NotImplementedError

    def monitor_options(self):
        return ["--chardev", f"socket,id=m,path={self.monitor},server=on,wait=off", "--monitor", "chardev=m"]

    def file_options(self, name, path):
        return ["--blockdev", f"driver=file,node-name={name},filename={path}{self.aio}"]

    def server_options(self):
        return ["--nbd-server", f"addr.type=unix,addr.path={self.path}"]

    def command(self):
        return [*self.program(), *self.file_options("file", self.image),
                "--blockdev", f"driver={self.format},node-name=disk,file=file", *self.server_options(),
                "--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on", *self.monitor_options()]

    def chain_command(self, paths):
        """`paths` from the base to the top; nodes n0, n1, ..."""
        command = self.program()
        for number, path in enumerate(paths):
            backing = f",backing=n{number - 1}" if number else ""
            command += self.file_options(f"f{number}", path)
            command += ["--blockdev", f"driver=qcow2,node-name=n{number},file=f{number}{backing}"]
        return [*command, *self.server_options(), *self.monitor_options()]


class Interlock(StorageDaemon):
    name = "interlock"
    iothreads = 0  # of the export; 0: the main thread

    @classmethod
    def is_there(cls):
        return True

    def program(self):
        return [os.path.join(BUILD, "interlock"), "daemon"]

    def command(self):
        command = super().command()
        command[command.index("--export") + 1] += "".join(f",iothread.{i}=t{i}" for i in range(self.iothreads))
        threads = [word for i in range(self.iothreads) for word in ("--object", f"iothread,id=t{i}")]
        return [*command[:2], *threads, *command[2:]]


class MappedInterlock(Interlock):
    """The same with the file in the daemon's memory, as far as its file system allows that (doc/compat.md)."""

    name = "mapped"
    aio = ",mapped=on"


class Peer(StorageDaemon):
    name = "qemu-storage-daemon"
    aio = ",aio=io_uring"

    @classmethod
    def is_there(cls):
        return shutil.which(cls.name)

    def program(self):
        return [self.name]


class Nbdkit(Server):
    name = "nbdkit"
    formats = ("raw",)

    @classmethod
    def is_there(cls):
        return shutil.which("nbdkit")

    def command(self):
        return ["nbdkit", "--foreground", "--exit-with-parent", "--unix", self.path, "file", self.image]

    def export(self):
        return ""


class Limit(Server):
    name = "limit"
    formats = ("raw",)

    @classmethod
    def is_there(cls):
        return True

    def create_image(self, size):
        self.size = size

    def command(self):
        return [LIMIT, self.path, str(self.size)]


class FileLimit(Limit):
    """The same, but asking the kernel for the data of every request: the limit of servers of files."""

    name = "limit-file"

    def create_image(self, size):
        super().create_image(size)
        with open(self.image, "wb") as image:
            image.truncate(size)

    def command(self):
        return [LIMIT, self.path, str(self.size), self.image]


SERVERS = (Interlock, MappedInterlock, Peer, Nbdkit, FileLimit, Limit)


class Results:
    def __init__(self):
        self.rows = []

    def add(self, title, unit, values, more_is_better=True, cpu_us=None):
        """values: server -> list of measurements; cpu_us: the same, of the processor's time for a request."""
        row = {"title": title, "unit": unit, "more_is_better": more_is_better, "servers": {}}
        for name, measured in values.items():
            row["servers"][name] = {"median": statistics.median(measured), "min": min(measured), "max": max(measured),
                                    "rounds": measured}
            if cpu_us:
                row["servers"][name]["cpu_us"] = statistics.median(cpu_us[name])
        self.rows.append(row)
        print_row(row)


def print_head():
    print("Behind what others reach: how many times better Interlock is, and how many times with mapped=on.")
    print(f"{'':52s} {'Interlock':>24s} {'mapped=on':>9s} {'qemu-storage-daemon':>24s} {'':>11s} {'nbdkit':>8s} {'':>11s} "
          f"{'of files':>8s} {'':>11s} {'limit':>8s} {'':>11s}  CPU per request: ours, theirs, us")


def ratio(row, name, ours="interlock"):
    """How many times better Interlock is."""
    ours, theirs = row["servers"][ours]["median"], row["servers"][name]["median"]
    return (ours / theirs if row["more_is_better"] else theirs / ours) if ours and theirs else 0


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def print_row(row):
    cells = [f"{row['title'] + ' [' + row['unit'] + ']':52s}"]
    ours = [name for name in (Interlock.name, MappedInterlock.name) if name in row["servers"]]
    for name, width in ((Interlock.name, 24), (MappedInterlock.name, 9), (Peer.name, 24), (Nbdkit.name, 8),
                        (FileLimit.name, 8), (Limit.name, 8)):
        measured = row["servers"].get(name)
        text = number(measured["median"]) if measured else "-"
        if measured and width > 20:
            text += f" ({number(measured['min'])}..{number(measured['max'])})"
        cells.append(f"{text:>{width}s}")
        if name not in (Interlock.name, MappedInterlock.name):
            times = "x" + " x".join(f"{ratio(row, name, mine):.2f}" for mine in ours) if measured else ""
            cells.append(f"{times:>11s}")
    cpu = [row["servers"][name].get("cpu_us") for name in ("interlock", "qemu-storage-daemon") if name in row["servers"]]
    if cpu and cpu[0]:
        cells.append(" " + " ".join(f"{number(value):>6s}" for value in cpu))
    print(" ".join(cells), flush=True)


def measure_loads(options, directory, results):
    for image_format in options.format:
        servers = [kind(directory, image_format) for kind in SERVERS
                   if image_format in kind.formats and kind.is_there() and kind.name not in options.without]
        before = {}
        try:
            for server in servers:
                server.create_image(options.size * MIB)
                server.start()
                before[server.name] = [server.resident_bytes() / MIB]
                server.load("--mode", "fill", "--block", "262144", "--depth", "8")
            seed = 1
            for title, words in WORKLOADS:
                if options.only and not any(word in f"{image_format}: {title}" for word in options.only):
                    continue
                values = {server.name: [] for server in servers}
                cpu_us = {server.name: [] for server in servers}
                for round_number in range(options.rounds):
                    last = round_number == options.rounds - 1
                    seed += 1
                    for server in servers:
                        told = [*words, "--seconds", str(options.seconds), "--seed", str(seed)]
                        measured = server.load(*told, *(["--verify"] if last and "write" in words else []))
                        values[server.name].append(
                            measured["mib_per_second" if "--block" in words else "per_second"])
                        if not last:  # its verification would count
                            cpu_us[server.name].append(measured["cpu_us"])
                unit = "MiB/s" if "--block" in words else "1/s"
                results.add(f"{image_format}: {title}", unit, values, cpu_us=cpu_us if options.rounds > 1 else None)
            if not options.only:
                results.add(f"{image_format}: memory after the start", "MiB", before, False)
                results.add(f"{image_format}: memory after the load", "MiB",
                            {server.name: [server.resident_bytes() / MIB] for server in servers}, False)
        finally:
            for server in servers:
                server.stop()
                shutil.rmtree(server.directory, ignore_errors=True)


def measure_start(options, directory, results):
    servers = [kind(directory, "qcow2") for kind in (Interlock, Peer) if kind.is_there()]
    values = {server.name: [] for server in servers}
    for server in servers:
        server.create_image(64 * MIB)
    for _ in range(max(5, options.rounds)):
        for server in servers:
            values[server.name].append(server.start() * 1000)
            server.stop()
    results.add("start until the first client is greeted", "ms", values, False)


# Jobs: title; which image of a chain of three is full; the command.
JOBS = [
    ("commit", 1, "block-commit", {"job-id": "j", "device": "n2", "top-node": "n1", "base-node": "n0"}),
    ("stream", 0, "block-stream", {"job-id": "j", "device": "n1"}),
]


def make_chain(directory, full, size, source):
    """Three images, one of them full of the content of `source`; returns their paths."""
    paths = [os.path.join(directory, f"{number}.qcow2") for number in range(3)]
    for number, path in enumerate(paths):
        backing = ["-b", paths[number - 1], "-F", "qcow2"] if number else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, str(size))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", source, paths[full])
    return paths


def measure_job(server, job, size, source):
    title, full, command, arguments = job
    paths = make_chain(server.directory, full, size, source)
    server.start(server.chain_command(paths))
    qmp = Qmp(server.monitor)
    begin = time.perf_counter()
    qmp.execute(command, **arguments)
    event = qmp.wait("BLOCK_JOB_COMPLETED")
    seconds = time.perf_counter() - begin
    server.stop()
    if "error" in event["data"]:
        sys.exit(f"bench: {server.name}: {title}: {event['data']['error']}")
    for path in paths if title == "stream" else (paths[0], paths[2]):
        run("qemu-img", "check", "-q", "-f", "qcow2", path)
    run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", source, paths[0] if title == "commit" else paths[1])
    return size / MIB / seconds


def wanted(options, title):
    return not options.only or any(text in title for text in options.only)


def measure_jobs(options, directory, results):
    source = os.path.join(directory, "source")
    size = options.job_size * MIB
    with open(source, "wb") as out:
        block = os.urandom(MIB)
        for number in range(options.job_size):
            out.write(number.to_bytes(8, "big") + block[8:])
    servers = [kind(directory, "qcow2") for kind in (Interlock, Peer) if kind.is_there()]
    for job in [job for job in JOBS if wanted(options, job[0])]:
        values = {server.name: [] for server in servers}
        for _ in range(options.rounds):
            for server in servers:
                values[server.name].append(measure_job(server, job, size, source))
        results.add(f"{job[0]} of {options.job_size} MiB", "MiB/s", values)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="short rounds and small images: does it work at all")
    parser.add_argument("--rounds", type=int, help="measurements of each server in each row (default 3)")
    parser.add_argument("--seconds", type=float, help="length of one measurement (default 1)")
    parser.add_argument("--size", type=int, help="MiB of the image under load (default 256)")
    parser.add_argument("--job-size", type=int, help="MiB that a job moves (default 1024)")
    parser.add_argument("--format", nargs="+", choices=("raw", "qcow2"), default=("raw", "qcow2"))
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only rows with one of these in their title")
    parser.add_argument("--iothreads", type=int, default=2,
                        help="I/O threads of Interlock's export (default 2; 0: the main thread serves it)")
    parser.add_argument("--cold", action="store_true", help="take free memory as it is (memory_kept())")
    parser.add_argument("--without", nargs="+", default=(), metavar="SERVER")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    options = parser.parse_args()
    Interlock.iothreads = options.iothreads
    short = options.quick
    options.rounds = options.rounds or (2 if short else 3)
    options.seconds = options.seconds or (0.3 if short else 1)
    options.size = options.size or (64 if short else 256)
    options.job_size = options.job_size or (128 if short else 1024)
    return options


def main():
    options = parse_options()
    if not os.path.exists(LOAD):
        sys.exit(f"bench: {LOAD} is not built")
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = tempfile.mkdtemp(prefix="il-bench-", dir=base)
    results = Results()
    print_head()
    try:
        with memory_kept(options.cold or options.quick):
            measure_loads(options, directory, results)
            if wanted(options, "start"):
                measure_start(options, directory, results)
            if any(wanted(options, job[0]) for job in JOBS):
                measure_jobs(options, directory, results)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        with open(options.json, "w") as out:
            json.dump({"rounds": options.rounds, "seconds": options.seconds, "rows": results.rows}, out, indent=1)
    behind = [row["title"] for row in results.rows
              if "qemu-storage-daemon" in row["servers"] and ratio(row, "qemu-storage-daemon") < 1]
    print(f"\nrows behind qemu-storage-daemon: {len(behind)}")
    for title in behind:
        print(f"  {title}")


if __name__ == "__main__":
    main()
