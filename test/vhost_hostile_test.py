# SPDX-License-Identifier: LGPL-2.1-or-later
"""Front ends of vhost-user-blk that behave badly, message by message (src/export/vhost_user/session_test.c has what each
wrong message is answered): a thousand of them cost nothing that stays, and the next one is served."""
import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import socket
import struct
import time
import unittest

import harness
from harness import KIB, MIB, scale

SIZE = 4 * MIB
MEMORY = 256 * KIB
GUEST, USER = 1 << 32, 1 << 40
(GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE) = range(1, 6)
(SET_NUM, SET_ADDR, SET_BASE, GET_BASE, SET_KICK, SET_CALL, SET_ERR, GET_PROTOCOL, SET_PROTOCOL) = range(8, 17)
SET_ENABLE, BACKEND_REQ, GET_CONFIG, GET_INFLIGHT, SET_INFLIGHT = 18, 21, 24, 31, 32
RESET_DEVICE, ADD_REGION, REMOVE_REGION = 34, 37, 38
NEED_REPLY = 8
QUEUE = 64


def message(request, payload=b"", flags=1, length=None):
    return struct.pack("<III", request, flags, len(payload) if length is None else length) + payload


def number(request, value):
    return message(request, struct.pack("<Q", value))


def vring(request, index, value):
    return message(request, struct.pack("<II", index, value))


def eventfd():
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.eventfd(0, os.O_CLOEXEC)


class Front:
    """One connection with a split queue of requests that read, as far as a test wants it set up."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10 * harness.SLOWNESS)
        self.fds = []
        while True:
            try:
                self.socket.connect(path)
                return
            except BlockingIOError:  # the queue of those who want to be let in is full
                time.sleep(0.002)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()
        for fd in self.fds:
            os.close(fd)

    def own(self, fd):
        self.fds.append(fd)
        return fd

    def send(self, data, fds=()):
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        return self.socket.sendmsg([data], ancillary)

    def reply(self):
        header = self.receive(12)
        return self.receive(struct.unpack("<III", header)[2])

    def receive(self, count):
        data = b""
        while len(data) < count:
            piece, ancillary, _, _ = self.socket.recvmsg(count - len(data), 64)
            for _, _, fds in ancillary:
                for fd in array.array("i", fds):
                    self.own(fd)
            if not piece:
                raise ConnectionError("sent away")
            data += piece
        return data

    def negotiate(self):
        self.send(number(SET_FEATURES, 1 << 32 | 1 << 30))
        self.send(number(SET_PROTOCOL, 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15))

    def regions(self, count=1, **more):
        size = MEMORY // count
        table = b"".join(struct.pack("<QQQQ", GUEST + i * size, size, USER + i * size, i * size) for i in range(count))
        return message(SET_MEM_TABLE, struct.pack("<II", count, 0) + table, **more)

    def set_up(self):
        """A running queue. The memory: descriptors, rings at 4 KiB and 8 KiB, headers and statuses, data from 64 KiB."""
        self.negotiate()
        self.memory_fd = self.own(os.memfd_create("guest"))
        os.ftruncate(self.memory_fd, MEMORY)
        self.memory = mmap.mmap(self.memory_fd, MEMORY)
        self.send(self.regions(), [self.memory_fd])
        self.start()

    def start(self):
        self.kick, self.call = self.own(eventfd()), self.own(eventfd())
        self.send(vring(SET_NUM, 0, QUEUE) + vring(SET_BASE, 0, struct.unpack_from("<H", self.memory, 8194)[0]))
        self.send(message(SET_ADDR, struct.pack("<IIQQQQ", 0, 0, USER, USER + 8192, USER + 4096, 0)))
        self.send(number(SET_CALL, 0), [self.call])
        self.send(number(SET_KICK, 0), [self.kick])
        self.send(vring(SET_ENABLE, 0, 1))

    def submit(self, count, size=4096):
        """`count` reads of the first bytes, all at once."""
        available = struct.unpack_from("<H", self.memory, 4098)[0]
        for i in range(count):
            slot = i % (QUEUE // 4)
            self.memory[16384 + slot * 32 : 16384 + slot * 32 + 16] = struct.pack("<IIQ", 0, 0, 0)
            for at, (address, length, flags) in enumerate(((16384 + slot * 32, 16, 1), (65536, size, 3),
                                                           (16400 + slot * 32, 1, 2))):
                where = slot * 4 + at
                struct.pack_into("<QIHH", self.memory, where * 16, GUEST + address, length, flags, where + 1)
            struct.pack_into("<H", self.memory, 4100 + (available + i) % QUEUE * 2, slot * 4)
        struct.pack_into("<H", self.memory, 4098, (available + count) & 0xFFFF)
        os.write(self.kick, struct.pack("<Q", 1))
        return (available + count) & 0xFFFF

    def wait(self, used):
        while struct.unpack_from("<H", self.memory, 8194)[0] != used:
            if not select.select([self.call], [], [], 10 * harness.SLOWNESS)[0]:
                raise TimeoutError("no call")
            os.read(self.call, 8)


class Hostile(harness.TestCase):
    builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        path = self.path("disk.raw")
        with open(path, "wb") as out:
            out.write(b"\x5a" * SIZE)
        self.under_test = self.daemon("--blockdev", f"file,node-name=disk,filename={path}")
        self.socket_path = self.path("vhost.sock")
        self.under_test.qmp.execute("block-export-add", {
            "type": "vhost-user-blk", "id": "e0", "node-name": "disk", "writable": True,
            "addr": {"type": "unix", "path": self.socket_path}})

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.under_test.pid}/fd"))

    def mappings(self):
        with open(f"/proc/{self.under_test.pid}/maps") as file:
            return sum("guest" in line or "inflight" in line for line in file)

    def resident(self):
        with open(f"/proc/{self.under_test.pid}/statm") as file:
            return int(file.read().split()[1]) * 4096

    def serves(self):
        """The daemon is done with those before: it serves one at a time."""
        with Front(self.socket_path) as front:
            front.set_up()
            front.memory[65536:69632] = bytes(4096)
            front.wait(front.submit(4))
            self.assertEqual(front.memory[65536:69632], b"\x5a" * 4096)
            front.send(number(GET_BASE, 0))
            front.reply()

    def some_fds(self, front, count):
        kinds = (eventfd, lambda: os.memfd_create("guest"), lambda: os.open("/dev/null", os.O_RDWR))
        return [front.own(self.random.choice(kinds)()) for _ in range(count)]

    def misbehave(self, front):
        how = self.random.randrange(9)
        if how == 0:  # a header cut short, with descriptors
            front.send(message(SET_KICK)[: self.random.randrange(1, 12)], self.some_fds(front, 2))
        elif how == 1:  # the wrong message, or too many
            front.negotiate()
            request = self.random.choice([SET_OWNER, GET_FEATURES, SET_NUM, SET_BASE, GET_CONFIG, SET_KICK, 99])
            front.send(message(request, bytes(16)), self.some_fds(front, self.random.choice([1, 2, 8, 9, 64, 100, 253])))
        elif how == 2:  # descriptors with the payload, whose end never comes
            front.negotiate()
            data = front.regions()
            front.send(data[:12])
            front.send(data[12 : self.random.randrange(13, len(data))], self.some_fds(front, 1))
        elif how == 3:  # every one with descriptors, and then no word more
            front.negotiate()
            for _ in range(self.random.randrange(1, 6)):
                front.send(number(self.random.choice([SET_KICK, SET_CALL, SET_ERR]), 0), [front.own(eventfd())])
        elif how == 4:  # a record, which is not taken
            front.negotiate()
            for _ in range(3):
                front.send(message(GET_INFLIGHT, struct.pack("<QQHH", 0, 0, 1, QUEUE) + bytes(4)))
        elif how == 5:  # channels
            front.negotiate()
            for _ in range(3):
                ends = socket.socketpair()
                front.send(message(BACKEND_REQ), [ends[0].fileno()])
                for end in ends:
                    end.close()
        elif how == 6:  # gone in the middle of requests
            front.set_up()
            front.submit(QUEUE // 4, 65536)
            if self.random.random() < 0.5:
                front.send(number(GET_BASE, 0)[: self.random.randrange(1, 12)])
        elif how == 7:  # memory that comes and goes while they run
            front.set_up()
            for _ in range(4):
                front.submit(4, 65536)
                count = self.random.choice([1, 2, 4])
                front.send(front.regions(count), [front.memory_fd] * count)
                front.submit(4, 4096)
                front.send(message(REMOVE_REGION, struct.pack("<QQQQQ", 0, GUEST, MEMORY // count, USER, 0)))
                front.send(message(ADD_REGION, struct.pack("<QQQQQ", 0, GUEST, MEMORY // count, USER, 0)),
                           [front.memory_fd])
        else:  # more memory than there is, and then less
            front.set_up()
            front.submit(QUEUE // 4, 65536)
            os.ftruncate(front.memory_fd, 0)

    def settled(self, descriptors):
        """The daemon has no client, and nothing of one; its memory."""
        self.serves()
        deadline = time.monotonic() + 5 * harness.SLOWNESS
        while (self.descriptors(), self.mappings()) != (descriptors, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertEqual((self.descriptors(), self.mappings()), (descriptors, 0))
        return self.resident()

    def test_a_thousand(self):
        descriptors = self.descriptors()
        for _ in range(100):
            self.attempt()
        before = self.settled(descriptors)
        for _ in range(scale(900, 5000)):
            self.attempt()
        after = self.settled(descriptors)
        if not harness.SANITIZED:
            self.assertLess(after - before, MIB)

    def attempt(self):
        with Front(self.socket_path) as front:
            try:
                self.misbehave(front)
            except (ConnectionError, BrokenPipeError, OSError):
                pass

    def test_memory_changes_under_requests(self):
        """A table that replaces another waits for the requests: every one that was submitted is answered, and right."""
        with Front(self.socket_path) as front:
            front.set_up()
            for i in range(scale(40, 1000)):
                front.memory[65536 : 2 * 65536] = bytes(65536)
                used = front.submit(QUEUE // 4, 65536)
                front.send(front.regions((1, 2, 4)[i % 3]), [front.memory_fd] * (1, 2, 4)[i % 3])
                front.wait(used)
                self.assertEqual(front.memory[65536 : 2 * 65536], b"\x5a" * 65536)
        self.serves()

    def test_eventfds_that_block(self):
        """Who shares an eventfd can make it blocking again, and full: the loop does not wait for it."""
        for blocked in ("kick", "call"):
            with Front(self.socket_path) as front:
                front.set_up()
                front.wait(front.submit(4))
                if blocked == "call":
                    with contextlib.suppress(BlockingIOError):
                        os.read(front.call, 8)
                    os.write(front.call, struct.pack("<Q", (1 << 64) - 2))
                fcntl.fcntl(getattr(front, blocked), fcntl.F_SETFL, 0)
                used = front.submit(4)
                deadline = time.monotonic() + 5 * harness.SLOWNESS
                while struct.unpack_from("<H", front.memory, 8194)[0] != used and time.monotonic() < deadline:
                    time.sleep(0.005)
                self.assertEqual(len(self.under_test.qmp.execute("query-block-exports", timeout=5)), 1)
        self.serves()


if __name__ == "__main__":
    unittest.main()
