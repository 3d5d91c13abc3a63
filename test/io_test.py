# SPDX-License-Identifier: LGPL-2.1-or-later
"""interlock io beside qemu-io: the same commands on equal images print the same and leave the same. And its filters:
errors injected at every event, a race made to happen, logs replayed, images held against each other."""
import os
import re
import shutil
import struct
import subprocess

from harness import KIB, MIB, PROGRAM, SANITIZER_OPTIONS, SLOWNESS, TestCase, image_check, nbd_handle, qemu_img, run, scale

PEER_IO = "qemu-io"
TIMING = re.compile(r"(ops; ).*$", re.MULTILINE)
TIMING_FOR_PROGRAMS = re.compile(r"^(\d+,1),.*$", re.MULTILINE)
DEBUG = "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=a.raw"

# name -> (options and image, commands); {} stands for nothing
SAME = {
    "transfers": (["-f", "raw", "a.raw"], [
        "write 0 64k", "write -P 0x10 0 64k", "read -P 0x11 0 64k", "read -P 0x10 0 64k", "read -v 0 48", "read -q 0 64k",
        "read -C 0 64k", "write -C 0 64k", "write -s bytes 4k 256", "read -v 4096 256", "read -v 4097 33", "read -qv 0 16"]),
    "parts": (["-f", "raw", "a.raw"], [
        "read -P 0x11 -s 512 -l 512 0 4k", "read -P 0x11 -s 512 0 4k", "read -P 0x11 -l 512 0 4k", "read -s 1 0 4k",
        "read -l 1 0 4k", "read -P 1 -s 4k -l 1 0 4k", "read -P 1 -s 8k -l 1 0 4k", "read -P 1 -s 0 -l 8k 0 4k",
        "read -P 1 -s 1000 0 512", "read -P 1 -s 0 -l 0 0 512", "read -P 1 -s 512 0 512"]),
    "errors": (["-f", "raw", "a.raw"], [
        "read", "read 0", "read 0 1 2", "read x 1", "read 0 x", "read -Z 0 1", "read 1 1", "read 0 -1", "read -1 512",
        "read 0 3G", "read 1M 512", "read 0 2M", "read 0 0", "write 0 0", "foo", "foo 1 2", "", " ", "rv 0 512",
        "help nope", "a", "map 1", "quit", "length"]),
    "short names": (["-f", "raw", "a.raw"], [
        "r 0 512", "w 0 512", "d 0 512", "f", "l", "i", "t 1M", "a", "c", "l", "?"]),
    "numbers": (["-f", "raw", "a.raw"], [
        "read 0 1.5k", "read 0 1.5", "read 0x200 0x10", "read 0 1kk", "read 0 1KB", "read 0 1b", "read 0 1s",
        'read 0 " 512"', "read '0' 512", "read\t0\t512", "read +0 512", "read 0 1e3", "read 010 512", "read 0 1m",
        "read 0 1T", "read 0 1000P", "read 0 9E", "read 0 0x1k", "read 0 .5k", "read 0 1.k", 'read 0 ""',
        "write -P 010 0 1", "read -v 0 1", "write -P 0x 0 1", "write -P +5 0 1", "read 0 18446744073709551615",
        "read 0 18446744073709551616", "alloc 9E", "read 9E 512", "alloc 0 9E", "truncate 8E", "read 0 0.1k",
        "alloc -1", "alloc -- 0", "read 0 512 -P 5", "read 0 512 -v -q", "read 0 .", "read 0 .k", "read 0 0x",
        "read 0 0x10g", "read 0 1.5e", "read 0 1..5k", "write -P 08 0 1", "write -P 0xFF 0 1", "read 0 1E",
        "read 0 0.0001k"]),
    "vectors": (["-f", "raw", "a.raw"], [
        "readv 0 512 1k", "writev 0 512 1k", "readv -P 0xcd 0 512 1k", "readv -P 1 0 512 1k", "readv -v 0 16 16",
        "readv 0", "readv 0 x", "readv x 1", "readv 0 0", "writev 0 3G", "readv 0 2G 2G", "readv 0 1G 1G 1G",
        "readv 2M 512", "writev -f -P 3 0 512", "writev 2M 512", "readv -C 0 1k", "readv -1 2"]),
    "asynchronous": (["-f", "raw", "a.raw"], [
        "aio_write 0 512 1k", "aio_flush", "aio_read -P 3 0 512 1k", "aio_flush", "aio_read -v 0 16", "aio_flush",
        "aio_write -z 0 4k", "aio_flush", "aio_write -z -u 4k 4k", "aio_flush", "aio_write -u 0 1",
        "aio_write -z -P 1 0 1", "aio_flush", "aio_write -i 0 512", "aio_read -i 0 512", "aio_read -q 0 512",
        "aio_flush", "aio_read -C 0 512", "aio_flush", "aio_read x 1", "aio_read 0 x", "aio_read 0",
        "aio_read 4M 512", "aio_flush", "aio_write 4M 512", "aio_flush", "aio_write -z 0 512 512",
        "aio_write -f 0 512", "aio_flush", "aio_write 0 3G", "aio_write -z 0 3G", "aio_flush"]),
    "options of write": (["-f", "raw", "a.raw"], [
        "write -z 0 4k", "write -z -u 0 4k", "write -u 0 4k", "write -z -n 0 4k", "write -n 0 4k", "write -z -P 1 0 4k",
        "write -s some 0 8k", "write -s nope 0 8k", "write -s empty 0 8k", "write -s some -P 1 0 4k", "write -c 0 64k",
        "write -b 0 512", "write -b 0 1", "read -b 1 512", "write -b -c 0 512", "write -b -z 0 512", "write -f 0 512",
        "write -f -z 0 512", "write -P 0x1ff 0 512", "write -P x 0 512", "write -P 256 0 512", "write -P -1 0 512",
        "write -p 0 512", "read -P x 0 1", "write 2M 1", "write -z 2M 1", "write -P", "write -C -z 0 512",
        "write -r 0 512", "read -r 0 512", "write -b -f 0 1", "write -c -f 0 64k", "write -z -s some 0 1",
        "write -nz 0 512", "write 0 512 512", "write x 1", "write 1 x", "write -- -1 1", "read -b 0 512",
        "read -a 0 512", "read -p 0 512", "write -z 0 3G", "write -c 0 1", "write -c 1 512"]),
    "the image": (["-f", "raw", "a.raw"], [
        "info", "length", "map", "alloc 0", "alloc 0 1M", "alloc 1 2", "alloc", "alloc x", "alloc 2M", "alloc 0 2M",
        "alloc 1000k 1M", "discard 0 64k", "read -P 0 0 64k", "discard 0", "discard 0 x", "discard 0 3G",
        "discard 2M 1", "discard 1 100", "flush", "flush 1", "truncate 0", "map", "length", "truncate 1M",
        "truncate x", "truncate", "truncate -m full 2M", "length", "truncate -m", "truncate 1M"]),
    "a qcow2 image": (["-f", "qcow2", "a.qcow2"], [
        "info", "length", "map", "alloc 0", "write 64k 64k", "alloc 0 1M", "map", "alloc 64k 128k", "alloc 1M 0",
        "write -P 9 200k 1k", "map", "write -z 512k 64k", "map", "read -P 0 512k 64k", "truncate 2M", "map", "info",
        "length", "write -P 7 -c 1M 64k", "read -P 7 1M 64k", "write -c 1152k 1k", "map", "flush"]),
    "read-only": (["-r", "-f", "raw", "a.raw"], [
        "write 0 1", "discard 0 512", "truncate 0", "write -z 0 1", "flush", "aio_write 0 1", "aio_flush", "writev 0 1",
        "write", "read 0 1", "zone_open 0 1", "zone_append 0 1 1", "reopen -w", "write 0 1"]),
    "what raw has not": (["-f", "raw", "a.raw"], [
        "break x y", "resume y", "remove_break y", "break a", "zone_report 0 1", "zo 0 1", "zone_open 0 1",
        "zone_append 0 512", "zone_reset x 1", "zone_report x 1", "zone_report 0", "zone_append x 1",
        "zone_append -p 0 512", "zone_append -p 0 512 512", "zc 0 1", "zrs 0 1", "zrp 0 1", "zf 0 1", "zap 0 1 1"]),
    "the process": (["-f", "raw", "a.raw"], [
        "sleep 1", "sleep x", "sleep", "sleep -1", "sleep 1k", "sleep 0x1", "sleep -x", "sigraise x", "sigraise",
        "sigraise 100", "sigraise 0", "abort", "length"]),
    "without an image": ([], ["length", "read", "foo", "help length", "help map", "help sleep"]),
    "no such file": (["-f", "raw", "nope.raw"], ["length"]),
    "another format": (["-f", "qcow2", "a.raw"], ["length"]),
    "an unknown format": (["-f", "nope", "a.raw"], ["length"]),
    "an unknown cache mode": (["-t", "foo", "-f", "raw", "a.raw"], ["length"]),
    "options and a format": (["--image-opts", "driver=qcow2,file.driver=file,file.filename=a.qcow2", "-f", "qcow2"], []),
    "options": (["--image-opts", "driver=qcow2,file.driver=file,file.filename=a.qcow2"], ["length"]),
    "opening": (["-f", "raw", "a.raw"], [
        "close", "length", "close", "open -o driver=raw a.raw", "length", "open a.raw", "close",
        "open -o driver=qcow2 a.qcow2", "length", "close", "open -o driver=qcow2,file.driver=file,file.filename=a.qcow2",
        "length", "close", "open -r a.qcow2", "info", "close", "open -r nope", "open", "open -Z", "open a b"]),
    "opening again": (["-f", "qcow2", "over.qcow2"], [
        "reopen -r", "write 0 1", "reopen -w", "write -P 5 0 1", "reopen -c none", "reopen -c bad", "reopen",
        "reopen -r -w", "reopen x", "reopen -Z", "reopen -o lazy-refcounts=on", "info", "reopen -o driver=raw",
        "reopen -r -o read-only=off", "reopen -o cache-size=1M", "reopen -c none -o cache.direct=off", "map",
        "reopen -o read-only=on", "write 0 1", "read -P 5 0 1"]),
    "without the cache": (["-n", "-m", "-f", "raw", "a.raw"], ["read 0 512", "write 1 3", "read -v 0 16"]),
    "an overlay": (["-s", "-f", "raw", "a.raw"], ["write -P 77 0 512", "read -P 77 0 512", "read -P 77 512 512"]),
    "an overlay for reading": (["-s", "-r", "-f", "raw", "a.raw"], ["write -P 77 0 512", "read -P 77 0 512"]),
    "copy on read": (["-C", "-f", "qcow2", "over.qcow2"], [
        "map", "read 0 64k", "map", "read 500k 100k", "map", "info", "alloc 0 1M", "read 900k 1k", "map"]),
    "copy on read, reading": (["-C", "-r", "-f", "qcow2", "over.qcow2"], ["map"]),
    "copy on read, nothing below": (["-C", "-f", "raw", "a.raw"], ["read 0 64k", "map"]),
    "a node for copy on read": (
        ["--image-opts", "driver=copy-on-read,file.driver=qcow2,file.file.driver=file,file.file.filename=over.qcow2"],
        ["read 300k 1k", "map"]),
    "another writer": (["-U", "-f", "raw", "a.raw"], ["length"]),
    "another writer, reading": (["-U", "-r", "-f", "raw", "a.raw"], ["length"]),
    "images that agree": (
        ["--image-opts", "driver=blkverify,raw.driver=file,raw.filename=a.raw,test.driver=qcow2,test.file.driver=file,"
         "test.file.filename=a.qcow2"],
        ["read 0 512", "write 0 512", "write -P 3 0 1M", "read -P 3 0 512"]),
    "an error stays": (["--image-opts", DEBUG + ",file.inject-error.0.event=read_aio"], [
        "write 0 512", "read 0 512", "write 0 512", "write 4k 512", "discard 0 512", "alloc 0 512", "write -z 0 512",
        "read 0 512"]),
    "an error once": (["--image-opts", DEBUG + ",file.inject-error.0.event=read_aio,file.inject-error.0.once=on"], [
        "write 0 512", "read 0 512", "write 0 512", "read 0 512"]),
    "an error of a flush": (
        ["--image-opts", DEBUG + ",file.inject-error.0.event=none,file.inject-error.0.iotype=flush"],
        ["write 0 512", "read 0 512", "flush"]),
    "an error of a sector": (
        ["--image-opts", DEBUG + ",file.inject-error.0.event=none,file.inject-error.0.sector=2,file.inject-error.0.errno=28"],
        ["write 0 1k", "read 1k 1", "read 1000 100", "flush", "write 0 1M"]),
    "an error of zeroes": (
        ["--image-opts", DEBUG + ",file.inject-error.0.event=none,file.inject-error.0.iotype=write-zeroes"],
        ["write -z 0 1k", "write 0 1k"]),
    "an error of block status": (
        ["--image-opts", DEBUG + ",file.inject-error.0.event=none,file.inject-error.0.iotype=block-status"],
        ["alloc 0 1k", "map", "read 0 1"]),
    "an error in a state": (
        ["--image-opts", DEBUG + ",file.inject-error.0.event=read_aio,file.inject-error.0.state=2,"
         "file.set-state.0.event=read_aio,file.set-state.0.new_state=2"],
        ["read 0 512", "read 0 512", "write 0 512"]),
    "impossible limits": (["--image-opts", DEBUG + ",file.align=4096,file.max-transfer=5000"], ["length"]),
    "rules in a file": (["-f", "raw", "blkdebug:rules:a.raw"], ["read 0 512", "read 0 512", "write 0 512"]),
    "breakpoints": (["--image-opts", DEBUG], [
        "break read_aio a", "break read_aio a", "aio_read 0 512", "wait_break a", "resume a", "sleep 10", "resume a",
        "sleep 10", "aio_flush", "break read_aio a", "break write_aio a", "aio_read 0 512", "sleep 5",
        "aio_write 512 512", "sleep 5", "resume a", "sleep 10", "resume a", "aio_flush", "break x y", "resume q"]),
    "a breakpoint taken away": (["-f", "qcow2", "blkdebug::a.qcow2"], [
        "break write_aio y", "aio_write -P 5 320k 64k", "wait_break y", "resume y", "aio_flush", "break read_aio z",
        "aio_read 320k 1k", "wait_break z", "remove_break z", "aio_flush", "remove_break z"]),
}

RULES = """# one error, and a state
[inject-error]
event = "read_aio"
errno = "28"
once = "on"
immediately = "off"

[set-state]
event = "write_aio"
  new_state = "2"
state = "1"
"""

INPUT = {
    "a session": "length\nread 0 512\nfoo\n\n  \nread x\nq\nlength\n",
    "a line without an end": "length",
    "a failure": "read -P 4 0 1\n",
    "nothing": "",
}

# Told by our qcow2, each at some point of the workload of the fault test.
EVENTS = """l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update l2_alloc_cow_read
l2_alloc_write read_aio read_backing_aio write_aio cow_read cow_write reftable_grow refblock_load refblock_update_part
refblock_alloc refblock_alloc_hookup refblock_alloc_write_blocks refblock_alloc_write_table refblock_alloc_switch_table
cluster_alloc cluster_free flush_to_os flush_to_disk pwritev pwritev_zero pwritev_done
cluster_alloc_bytes write_compressed l2_update_compressed read_compressed""".split()

CHUNK = 512


def blank(text):
    return TIMING_FOR_PROGRAMS.sub(r"\1,T", TIMING.sub(r"\1T", text))


def with_commands(arguments, commands):
    return [*arguments, *(word for command in commands for word in ("-c", command))]


def replay(log, image, limit=None):
    """Carries out the entries of a log (all, or so many) on `image`, a bytearray; returns where the flushes were.

    A discard leaves zeroes, as the punched hole in the file that was logged does.
    """
    magic, version, count, sector = struct.unpack("<QQQI", log[:28])
    assert (magic, version) == (0x6A736677736872, 1)
    at, flushes = sector, []
    for index in range(count if limit is None else limit):
        first, sectors, flags, _ = struct.unpack("<QQQQ", log[at : at + 32])
        at += sector
        if flags & 1:
            flushes.append(index + 1)
        data = bytes(sectors * sector) if flags & 4 else log[at : at + sectors * sector]
        at += 0 if flags & 4 else sectors * sector
        end = (first + sectors) * sector
        if len(image) < end:
            image.extend(bytes(end - len(image)))
        image[first * sector : end] = data
    return flushes


class IoTestCase(TestCase):
    """With images, and both programs by the same name."""

    time_limit = 90

    def setUp(self):
        super().setUp()
        self.program = self.path("qemu-io")  # the personality
        os.symlink(PROGRAM, self.program)
        self.images = self.path("images")
        os.mkdir(self.images)
        self.write_file("images/bytes", bytes(range(256)))
        self.write_file("images/some", bytes(range(256)) * 11)
        self.write_file("images/empty", b"")
        self.write_file("images/rules", RULES.encode())
        self.write_file("images/a.raw", bytes(MIB))
        qemu_img("create", "-q", "-f", "qcow2", os.path.join(self.images, "a.qcow2"), "1M")
        qemu_img("create", "-q", "-f", "qcow2", os.path.join(self.images, "base.qcow2"), "1M")
        run(PEER_IO, "-f", "qcow2", "-c", "write -q -P 9 0 512k", os.path.join(self.images, "base.qcow2"))
        qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", os.path.join(self.images, "over.qcow2"))

    def write_file(self, name, data):
        with open(self.path(name), "wb") as file:
            file.write(data)

    def read_file(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()

    def run_io(self, program, arguments, folder, text=""):
        return subprocess.run(
            [program, *arguments], cwd=folder, input=text, capture_output=True, text=True, timeout=30 * SLOWNESS,
            env={**SANITIZER_OPTIONS, **os.environ}, check=False,
        )

    def io(self, *arguments, status=0, text=""):
        """interlock io in the test's folder."""
        result = self.run_io(self.program, arguments, self.directory, text)
        if status is not None:
            self.assertEqual(result.returncode, status, f"{arguments}: {result.stdout}{result.stderr}")
        return result.stdout

    def assert_same(self, name, arguments, text=""):
        """The peer and we print, return and leave the same."""
        results = []
        for program, folder in ((PEER_IO, self.path("peer")), (self.program, self.path("ours"))):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.images, folder)
            results.append(self.run_io(program, arguments, folder, text))
        peer, ours = results
        self.assertEqual(blank(peer.stdout), blank(ours.stdout), name)
        self.assertEqual(peer.returncode, ours.returncode, f"{name}: {ours.stderr}")
        # What the program itself says is said in our own words.
        own = re.compile(r"^(?!qemu-io: |WARNING|There |Give |It |Open |Please | ).*$", re.MULTILINE)
        self.assertEqual(own.findall(peer.stderr), own.findall(ours.stderr), name)
        self.assertEqual("qemu-io: " in peer.stderr, "qemu-io: " in ours.stderr, f"{name}: {peer.stderr}{ours.stderr}")
        self.assertEqual(self.read_file("peer/a.raw"), self.read_file("ours/a.raw"), name)
        for image in ("a.qcow2", "over.qcow2"):
            first, second = self.path(f"peer/{image}"), self.path(f"ours/{image}")
            if image in " ".join(arguments):
                image_check(second)
                qemu_img("compare", "-f", "qcow2", "-F", "qcow2", first, second)


class Io(IoTestCase):
    def test_the_same_as_the_peer(self):
        for name, (arguments, commands) in SAME.items():
            self.assert_same(name, with_commands(arguments, commands))

    def test_a_session_is_the_same_as_the_peer(self):
        for name, text in INPUT.items():
            self.assert_same(name, ["-f", "raw", "a.raw"], text)

    def test_formats_are_not_guessed_for_writing(self):
        shutil.copy(os.path.join(self.images, "a.raw"), self.path("a.raw"))
        for arguments in (["a.raw"], ["-c", "open a.raw"]):
            result = self.run_io(self.program, [*arguments, "-c", "write 0 512"], self.directory)
            self.assertEqual(result.returncode, 1)
            self.assertIn("not guessed for writing", result.stderr)
        self.assertEqual(self.read_file("a.raw"), bytes(MIB))
        self.assertIn("1 MiB", self.io("-r", "a.raw", "-c", "length"))

    def test_waiting_for_a_breakpoint_that_nobody_reaches(self):
        shutil.copy(os.path.join(self.images, "a.raw"), self.path("a.raw"))
        output = self.io("-f", "raw", "blkdebug::a.raw", "-c", "break read_aio a", "-c", "wait_break a", status=1)
        self.assertIn("Could not wait for breakpoint a", output)
        # What is stopped at the end goes on.
        output = self.io("-f", "raw", "blkdebug::a.raw", "-c", "break read_aio a", "-c", "aio_read 0 512")
        self.assertIn("read 512/512", output)


class Faults(IoTestCase):
    """Errors where our qcow2 says that it is about to do something."""

    SIZE = 4 * MIB

    def setUp(self):
        super().setUp()
        base = self.path("base.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", base, str(self.SIZE))
        run(PEER_IO, "-f", "qcow2", "-c", f"write -q -P 200 0 {self.SIZE}", base)
        # Tiny clusters and wide refcounts, so that every table grows; a snapshot, so that tables are shared. Clusters of
        # two sectors, parts of which are copied. Large ones, whose tables are longer than what is cached of them at a
        # time, and none of which is there yet.
        for name, clusters in (("tiny", 512), ("small", 1024), ("large", 65536)):
            path = self.path(f"{name}.qcow2")
            options = f"cluster_size={clusters},refcount_bits=64"
            qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "qcow2", path)
            if name != "large":
                run(PEER_IO, "-f", "qcow2", "-c", "write -q -P 201 0 256k", path)
                qemu_img("snapshot", "-c", "before", path)
        self.commands = [
            "write -P 1 0 100k", "write -P 2 300k 512", "read 0 512", "read 3M 512", "flush", "write -P 3 1M 2M", "flush",
            "write -z 10k 30k", "write -P 4 20k 512", "discard 1536k 512k", "flush", "flush", "write -P 5 1600k 100k",
            "write -P 9 -c 3584k 64k", "read 3584k 4k",
            f"truncate {64 * MIB}", "write -P 6 60M 64k", "flush", "write -P 7 0 300k",
        ]

    def may_hold(self, output, start):
        """Chunk -> the bytes that may stand there, by what was acknowledged and what was tried."""
        written = 0 if start == "large" else 256 * KIB
        may = [{201} if at < written else {200} for at in range(0, self.SIZE, CHUNK)]
        results = [line for line in output.splitlines() if re.match(r"wrote|discard \d|write failed|discard failed", line)]
        changes = [command.split() for command in self.commands if command.split()[0] in ("write", "discard")]
        self.assertEqual(len(results), len(changes), output)
        for words, line in zip(changes, results):
            offset, length = (int(word[:-1]) * {"k": KIB, "M": MIB}[word[-1]] if word[-1] in "kM" else int(word) for word in words[-2:])
            value = int(words[2]) if words[1] == "-P" else 0
            for chunk in range(offset // CHUNK, min((offset + length) // CHUNK, len(may))):
                if words[0] == "discard":
                    may[chunk] = set(range(256))
                elif "failed" in line:
                    may[chunk] = may[chunk] | {value}
                else:
                    may[chunk] = {value}
        return may

    def check_content(self, event, may):
        raw = self.path("content.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", self.path("image.qcow2"), raw)
        content = self.read_file("content.raw")
        for chunk, values in enumerate(may):
            data = content[chunk * CHUNK : (chunk + 1) * CHUNK]
            if len(values) < 256 and not (set(data) <= values and len(set(data)) == 1):
                self.fail(f"error at {event}: chunk {chunk} holds {set(data)} in place of {values}")

    def test_errors_at_every_event(self):
        missed = []
        for event in EVENTS:
            modes = [("on", 5), ("off", 28)]
            for once, code in modes if self.random.randrange(scale(3, 1)) == 0 else modes[:1]:
                start = {"pwritev_zero": "large", "cow_read": "small", "cow_write": "small"}.get(event, "tiny")
                shutil.copy(self.path(f"{start}.qcow2"), self.path("image.qcow2"))
                rules = f'[inject-error]\nevent = "{event}"\nonce = "{once}"\nerrno = "{code}"\n'
                self.write_file("rules", rules.encode())
                arguments = ["-f", "qcow2", "blkdebug:rules:image.qcow2"]
                result = self.run_io(self.program, with_commands(arguments, self.commands), self.directory)
                self.assertIn(result.returncode, (0, 1), f"{event}: {result.stderr}")
                if once == "on":
                    self.check_content(event, self.may_hold(result.stdout, start))
                    if result.returncode == 0:
                        missed.append(event)
                image_check(self.path("image.qcow2"), leaks_allowed=True)
                self.io("-f", "qcow2", "image.qcow2", "-c", "write -P 8 2M 64k", "-c", "read -P 8 2M 64k")
        # Each has happened.
        self.assertEqual(missed, [])

    def test_a_race_that_is_made_to_happen(self):
        for event in ("cow_read", "cow_write", "write_aio"):
            shutil.copy(self.path("small.qcow2"), self.path("image.qcow2"))
            first = "2M 1k" if event == "write_aio" else "2M 512"
            output = self.io(*with_commands(["-f", "qcow2", "blkdebug::image.qcow2"], [
                f"break {event} a", f"aio_write -P 1 {first}", "wait_break a", "aio_write -P 2 2097664 512",
                "aio_write -P 3 2099712 512", "sleep 20", "read -P 200 2M 512", "read -P 3 2099712 512", "resume a",
                "aio_flush", "read -P 1 2M 512", "read -P 2 2097664 512", "read -P 200 2099200 512"]))
            # The one beside it is done while it is stopped; the one in its cluster waits, and is not lost.
            order = [line for line in output.splitlines() if line.startswith(("wrote", "blkdebug"))]
            self.assertEqual(
                [re.sub(r".*offset ", "", line) for line in order],
                ["blkdebug: Suspended request 'a'", "2099712", "blkdebug: Resuming request 'a'", "2097152", "2097664"])
            self.assertNotIn("Pattern verification failed", output)
            image_check(self.path("image.qcow2"))


class Filters(IoTestCase):
    def workload(self, size, count, discards=True):
        commands = []
        for serial in range(count):
            length = self.random.choice([512, 4096, 10 * 512, 64 * KIB, 200 * KIB])
            offset = self.random.randrange(0, (size - length) // 512) * 512
            kinds = ["write -P {}", "write -P {}", "write -P {}", "write -f -P {}", "write -z", "write -z -u"]
            kind = self.random.choice(kinds + (["discard"] if discards else []))
            commands.append(f"{kind.format(serial % 255 + 1)} {offset} {length}")
            if self.random.random() < 0.2:
                commands.append("flush")
            if self.random.random() < 0.2:
                commands.append(f"read {offset} {length}")
        return commands

    def test_logs_are_replayed_to_the_same_content(self):
        for sector in (512, 4096):
            self.write_file("a.raw", bytes(MIB))
            self.write_file("log", b"")
            options = (f"driver=blklogwrites,file.driver=file,file.filename=a.raw,log.driver=file,log.filename=log,"
                       f"log-sector-size={sector},log-super-update-interval=7")
            self.io(*with_commands(["-d", "ignore", "--image-opts", options], self.workload(MIB, 40)))
            more = options.replace(f"log-sector-size={sector}", "log-append=on")
            self.io(*with_commands(["-d", "ignore", "--image-opts", more], self.workload(MIB, 10)))
            image = bytearray(MIB)
            replay(self.read_file("log"), image)
            self.assertEqual(bytes(image), self.read_file("a.raw"))
            # The peer goes on with our log.
            run(PEER_IO, "-d", "ignore", "--image-opts", more, "-c", "write -q -P 99 0 64k", cwd=self.directory)
            replay(self.read_file("log"), image)
            self.assertEqual(bytes(image), self.read_file("a.raw"))

    def test_every_prefix_of_a_log_is_a_whole_image(self):
        path = self.create_image("a.qcow2", 4 * MIB, "cluster_size=4k")
        start = self.read_file("a.qcow2")
        self.write_file("log", b"")
        options = ("driver=qcow2,file.driver=blklogwrites,file.file.driver=file,file.file.filename=a.qcow2,"
                   "file.log.driver=file,file.log.filename=log")
        self.io(*with_commands(["--image-opts", options], self.workload(4 * MIB, 40)))
        log = self.read_file("log")
        image = bytearray(start)
        flushes = replay(log, image)
        entries = struct.unpack("<QQQI", log[:28])[2]
        self.assertGreater(len(flushes), 5)
        self.assertEqual(bytes(image), self.read_file("a.qcow2").ljust(len(image), b"\0"))
        for limit in sorted(self.random.sample(range(entries), 25)):
            image = bytearray(start)
            replay(log, image, limit)
            self.write_file("prefix.qcow2", image)
            image_check(self.path("prefix.qcow2"), leaks_allowed=True)
        image_check(path)

    def test_images_are_held_against_each_other(self):
        self.write_file("a.raw", bytes(2 * MIB))
        self.create_image("a.qcow2", 2 * MIB, "cluster_size=4k")
        options = ("driver=blkverify,raw.driver=file,raw.filename=a.raw,test.driver=qcow2,test.file.driver=file,"
                   "test.file.filename=a.qcow2")
        output = self.io(*with_commands(["--image-opts", options], [*self.workload(2 * MIB, 60), "read 0 2M"]))
        self.assertNotIn("failed", output)
        qemu_img("compare", "-f", "raw", "-F", "qcow2", self.path("a.raw"), self.path("a.qcow2"))
        data = bytearray(self.read_file("a.raw"))
        data[777777] ^= 1
        self.write_file("a.raw", data)
        result = self.run_io(self.program, ["--image-opts", options, "-c", "read 700k 100k"], self.directory)
        self.assertEqual(result.returncode, 1)
        self.assertIn("read failed: Input/output error", result.stdout)
        self.assertIn("contents mismatch at offset 777777", result.stderr)

    def test_limits_of_a_node(self):
        self.create_image("a.qcow2", 2 * MIB, "cluster_size=4k")
        self.write_file("a.raw", bytes(2 * MIB))
        limits = ("align=4096,image.driver=file,image.filename=a.qcow2,max-transfer=8192,opt-write-zero=16384,"
                  "max-write-zero=32768,opt-discard=8192,max-discard=16384")
        options = "driver=qcow2,file.driver=blkdebug," + ",".join(f"file.{word}" for word in limits.split(","))
        commands = self.workload(2 * MIB, 60, discards=False)
        self.io(*with_commands(["--image-opts", options], commands))
        self.io(*with_commands(["-f", "raw", "a.raw"], commands))
        qemu_img("compare", "-f", "raw", "-F", "qcow2", self.path("a.raw"), self.path("a.qcow2"))
        image_check(self.path("a.qcow2"))

    def test_filters_in_a_daemon(self):
        """Under an export: what was read is stored, jobs pass the filters by, and the size follows."""
        chain = self.create_chain(["base", "top"], 4 * MIB, pattern=False)
        run(PEER_IO, "-f", "qcow2", "-c", "write -q -P 5 0 2M", chain[0][1])
        daemon = self.daemon()
        qmp = daemon.qmp
        daemon.add_qcow2("base", chain[0][1])
        image = {"driver": "file", "filename": chain[1][1]}
        rules = [{"event": "l2_load", "once": True, "errno": 28}]
        top = {"driver": "qcow2", "node-name": "top", "backing": "base",
               "file": {"driver": "blkdebug", "node-name": "debug", "image": image, "inject-error": rules}}
        qmp.execute("blockdev-add", {"driver": "copy-on-read", "node-name": "copy", "file": top})
        daemon.nbd_server()
        daemon.export("copy")
        with nbd_handle(daemon.uri("copy")) as handle:
            with self.assertRaisesRegex(Exception, "No space left"):
                handle.pwrite(b"\1" * 512, 3 * MIB)
            handle.pwrite(b"\7" * 512, 3 * MIB)
            self.assertEqual(handle.pread(64 * KIB, 0), b"\5" * 64 * KIB)
            handle.pwrite(b"\6" * 512, 512)
            qmp.execute("block-commit", {"device": "top", "job-id": "down"})
            qmp.wait_event("BLOCK_JOB_READY", device="down")
            self.assertEqual(handle.pread(64 * KIB, MIB), b"\5" * 64 * KIB)
            handle.pwrite(b"\4" * 512, MIB)
            qmp.execute("job-complete", {"id": "down"})
            self.assertIsNone(qmp.wait_job("down"))
            handle.pwrite(b"\3" * 512, 2 * MIB)
            expected = {0: 5, 512: 6, 1024: 5, MIB: 4, MIB + 512: 5, 2 * MIB: 3, 3 * MIB: 7}
            for offset, value in expected.items():
                self.assertEqual(handle.pread(512, offset), bytes([value]) * 512)
        edges = {(edge["parent"], edge["role"]): edge["child"] for edge in qmp.execute("query-graph")["edges"]}
        self.assertEqual(edges["copy", "filtered"], "base")
        qmp.execute("block_resize", {"node-name": "copy", "size": 8 * MIB})
        sizes = {node["node-name"]: node["size"] for node in qmp.execute("query-graph")["nodes"]}
        self.assertEqual((sizes["copy"], sizes["base"]), (8 * MIB, 8 * MIB))
        qmp.execute("block-export-del", {"id": "export-copy"})
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        qmp.execute("blockdev-del", {"node-name": "copy"})
        daemon.stop()
        for offset, value in expected.items():
            self.assertNotIn("failed", run(PEER_IO, "-r", "-f", "qcow2", "-c", f"read -P {value} {offset} 512", chain[0][1]).stdout)
        image_check(chain[0][1])
