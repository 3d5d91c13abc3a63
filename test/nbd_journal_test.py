# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the nbd driver with a reconnect-delay remembers for a server that dies, against servers that forget all they may:
what is not flushed is gone when they die, and they die in the worst moments, again and again."""
import os
import socket
import struct
import threading
import time
import unittest

import harness
from harness import KIB, MIB, scale
from nbd_liar_test import FLUSH, READ, TRIM, WRITE, ZEROES, Cut, Liar

try:
    import nbd
except ImportError:
    nbd = None

SIZE = 4 * MIB
FUA, FAST = 1, 16
FLAG_FAST_ZERO = 0x800
CHANGES = (WRITE, ZEROES, TRIM)
EIO, ENOTSUP = 5, 95


class Forgetful(Liar):
    """A server of memory, with a cache that is written back by flushes and FUA alone; start() and die() at will."""

    def __init__(self, path, **more):
        self.path = path
        self.durable = bytearray(SIZE)
        self.content = bytearray(SIZE)
        self.lock = threading.Lock()
        self.connections = []
        self.log = []  # (kind, offset, length, flags) of this life
        self.lives = 0
        self.dies_after = None  # changes of one life
        self.died = threading.Event()  # of those, or has read something: then it has them all
        self.swap_answers = False  # of two changes: the first answer waits a while for the second
        self.hook = None  # (kind, offset, length, flags): before it is done; may raise Cut
        self.delay = 0.0  # of each change
        self.error_of_flush = 0
        super().__init__(path, content=self.content, **more)

    def start(self):
        """Its successor: has what was durable."""
        self.content[:] = self.durable
        self.log = []
        self.lives += 1
        self.died.clear()
        os.unlink(self.path)
        self.listener = socket_at(self.path)
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def die(self):
        """Without a word. What it had in its cache is lost."""
        with self.lock:
            super_close(self)
            for client in self.connections:
                try:
                    client.shutdown(2)
                except OSError:
                    pass
            self.connections = []

    def close(self):
        self.die()

    def serve(self, client):
        with self.lock:
            self.connections.append(client)
        super().serve(client)

    def request(self, client):
        _, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(client, 28))
        data = self.receive(client, length) if kind == WRITE else b""
        if kind == 2:
            raise Cut
        if self.hook:
            self.hook(kind, offset, length, flags)
        if kind in CHANGES and self.delay:
            time.sleep(self.delay)
        with self.lock:
            if client not in self.connections:
                raise Cut
            if kind in CHANGES and self.dies_after is not None:
                if self.dies_after == 0:
                    self.died.set()
                    raise Cut
                self.dies_after -= 1
            if kind == READ and self.dies_after is not None:
                self.died.set()
                raise Cut
            self.log.append((kind, offset, length, flags))
            answer = self.carry_out(kind, cookie, offset, length, flags, data)
        if self.swap_answers and kind in CHANGES:
            self.swap_answers = False
            threading.Timer(0.15, client.sendall, [answer]).start()
        else:
            client.sendall(answer)

    def carry_out(self, kind, cookie, offset, length, flags, data):
        if kind == FLUSH:
            if self.error_of_flush:
                return self.chunk(cookie, 0x8001, struct.pack(">IH", self.error_of_flush, 0))
            self.durable[:] = self.content
        elif kind in (ZEROES, TRIM):
            if flags & FAST and not self.flags & FLAG_FAST_ZERO:
                return self.chunk(cookie, 0x8001, struct.pack(">IH", ENOTSUP, 0))
            self.content[offset : offset + length] = bytes(length)
        answer = self.honest(kind, cookie, offset, length, data)
        if kind in CHANGES and flags & FUA:
            self.durable[offset : offset + length] = self.content[offset : offset + length]
        return answer


def socket_at(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    return listener


def super_close(server):
    try:
        server.listener.shutdown(2)
    except OSError:
        pass
    server.listener.close()


@unittest.skipUnless(nbd, "needs libnbd's Python module")
class Journal(harness.TestCase):
    builds = ("asan",)

    def setUp(self):
        super().setUp()
        self.server = None
        self.under_test = self.daemon()
        self.under_test.nbd_server()

    def clean_up(self):
        if self.server:
            self.server.close()
        super().clean_up()

    def open(self, delay=20, **more):
        """A server, the node over it and a handle on its export."""
        self.server = Forgetful(self.path("s.sock"), **more)
        self.under_test.qmp.execute("blockdev-add", {"driver": "nbd", "node-name": "n", "discard": "unmap",
                                                     "server": {"type": "unix", "path": self.server.path},
                                                     "reconnect-delay": delay})
        self.under_test.export("n")
        handle = nbd.NBD()
        handle.connect_uri(self.under_test.uri("n"))
        return handle

    def change(self, handle, content, kinds=("write", "write", "fua", "zero", "trim")):
        """One change at random, done and noted in `content`. Offsets repeat themselves, lengths overlap."""
        length = self.random.randrange(1, 9) * 4096
        offset = self.random.randrange(0, 24) * 4096
        kind = self.random.choice(kinds)
        if kind in ("write", "fua"):
            data = self.random.randbytes(length)
            handle.pwrite(data, offset, FUA if kind == "fua" else 0)
        else:
            data = bytes(length)
            (handle.zero if kind == "zero" else handle.trim)(length, offset)
        content[offset : offset + length] = data

    def die_after(self, number):
        """The next life ends with its change `number`, or when it has all. Somebody waits for a read."""
        self.server.dies_after = number
        self.server.start()
        self.assertTrue(self.server.died.wait(10 * harness.SLOWNESS))
        self.server.die()

    def test_dies_in_every_replay(self):
        """Its successor dies after one change, the next after two, ...: in the end nothing is missing."""
        handle = self.open()
        content = bytearray(SIZE)
        for _ in range(scale(4, 60)):
            for _ in range(self.random.randrange(1, 25)):
                self.change(handle, content)
            if self.random.random() < 0.3:
                handle.flush()
                self.assertEqual(self.server.durable, content)
            self.server.die()
            buffer = nbd.Buffer(512 * KIB)
            cookie = handle.aio_pread(buffer, 0)
            for _ in range(self.random.randrange(0, 4)):
                self.die_after(self.random.randrange(0, 12))
            self.server.dies_after = None
            self.server.start()
            while not handle.aio_command_completed(cookie):
                handle.poll(1000)
            self.assertEqual(buffer.to_bytearray(), content[: 512 * KIB])
        handle.flush()
        self.assertEqual(self.server.durable, content)
        handle.shutdown()

    def test_flush_outstanding(self):
        """A flush that was on its way when the server died is answered when its successor has everything."""
        handle = self.open()
        content = bytearray(SIZE)
        for done in (False, True):  # whether the flush was carried out before
            for _ in range(12):
                self.change(handle, content, ("write", "zero"))

            def cut(kind, *_):
                if kind == FLUSH:
                    if done:
                        self.server.durable[:] = self.server.content
                    self.server.hook = None
                    threading.Thread(target=self.server.die).start()
                    time.sleep(0.05)
                    raise Cut

            self.server.hook = cut
            cookie = handle.aio_flush()
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:
                handle.poll(20)
            self.assertFalse(handle.aio_command_completed(cookie))
            self.server.start()
            while not handle.aio_command_completed(cookie):
                handle.poll(1000)
            self.assertEqual(self.server.durable, content)
        handle.shutdown()

    def test_stays_as_it_was_read(self):
        """Two overlapping writes at once: which of them is on top may be anything, but does not change later."""
        handle = self.open()
        self.server.swap_answers = True
        writes = [nbd.Buffer.from_bytearray(bytearray(bytes([7 + i]) * 8192)) for i in range(2)]
        cookies = [handle.aio_pwrite(writes[i], i * 4096) for i in range(2)]
        for cookie in cookies:
            while not handle.aio_command_completed(cookie):
                handle.poll(100)
        seen = bytes(handle.pread(12288, 0))
        self.server.die()
        self.server.start()
        self.assertEqual(bytes(handle.pread(12288, 0)), seen)
        handle.shutdown()

    def test_flushes_that_fail(self):
        """Nothing can be forgotten if no flush succeeds: then writes are refused, and memory is bounded all the same."""
        handle = self.open()
        self.server.error_of_flush = EIO
        data = os.urandom(MIB)
        failures = 0
        for number in range(100):
            try:
                handle.pwrite(data, number % 4 * MIB)
            except nbd.Error:
                failures += 1
        writes = [entry for entry in self.server.log if entry[0] == WRITE]
        self.assertGreater(failures, 70)
        self.assertLess(len(writes), 30)
        self.server.error_of_flush = 0
        handle.pwrite(data, 0)
        handle.flush()
        self.assertEqual(self.server.durable[:MIB], data)
        handle.shutdown()

    def test_slow_replay(self):
        """A successor that works, but slowly, is not given up: neither after the delay nor for good."""
        handle = self.open(delay=1)
        content = bytearray(SIZE)
        for number in range(250):
            data = self.random.randbytes(512)
            handle.pwrite(data, number * 4096)
            content[number * 4096 : number * 4096 + 512] = data
        self.server.die()
        self.server.delay = 0.005
        self.server.start()
        self.assertEqual(bytes(handle.pread(250 * 4096, 0)), bytes(content[: 250 * 4096]))
        self.assertEqual(self.server.lives, 1)
        self.server.delay = 0.0
        handle.flush()
        self.assertEqual(self.server.durable, content)
        handle.shutdown()

    @unittest.skipUnless(harness.FULL, "waits for seconds; in the long form")
    def test_stuck_in_replay(self):
        """A successor that takes one change and then says nothing is given up, and the one after it has everything."""
        handle = self.open(delay=1)
        handle.pwrite(b"a" * 4096, 0)
        handle.pwrite(b"b" * 4096, 8192)
        self.server.die()
        stuck = threading.Event()

        def hook(kind, *_):
            if kind == WRITE:
                stuck.wait(20)
                raise Cut

        self.server.hook = hook
        self.server.start()
        start = time.monotonic()
        with self.assertRaises(nbd.Error):
            handle.pread(4096, 0)
        self.assertLess(time.monotonic() - start, 6 * harness.SLOWNESS)
        self.server.hook = None
        self.server.die()
        stuck.set()
        self.server.start()
        deadline = time.monotonic() + 10 * harness.SLOWNESS
        while True:
            try:
                self.assertEqual(bytes(handle.pread(12288, 0)), b"a" * 4096 + bytes(4096) + b"b" * 4096)
                break
            except nbd.Error:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.05)
        handle.shutdown()

    def test_fua_is_not_taken_back(self):
        """What is durable by FUA has nothing older on top of it, at no moment of a replay."""
        handle = self.open()
        for number in range(6):
            handle.pwrite(bytes([number + 1]) * 16384, number * 4096)
        handle.pwrite(b"F" * 8192, 8192, FUA)
        handle.pwrite(b"G" * 4096, 12288, FUA)
        content = bytes(handle.pread(64 * KIB, 0))
        self.server.die()
        cookie = handle.aio_pread(nbd.Buffer(4096), 0)
        seen = set()
        for number in (1, 3, 2):
            self.die_after(number)
            seen.add(bytes(self.server.content[8192:16384]))
        self.server.dies_after = None
        self.server.start()
        while not handle.aio_command_completed(cookie):
            handle.poll(1000)
        self.assertEqual(bytes(handle.pread(64 * KIB, 0)), content)
        self.assertEqual(seen, {b"F" * 4096 + b"G" * 4096})
        handle.shutdown()

    def test_successor_that_can_less(self):
        """It is not written to, and does not make an error of a write that could have been done: the next one serves."""
        handle = self.open()
        content = bytearray(SIZE)
        for _ in range(8):
            self.change(handle, content)
        everything = self.server.flags
        for missing in (0x4, 0x8, 0x20, 0x40, -0x2):  # flush, FUA, trim, zeroes; read-only
            self.server.die()
            self.server.flags = everything & ~missing if missing > 0 else everything | -missing
            self.server.start()
            data = self.random.randbytes(4096)
            buffer = nbd.Buffer.from_bytearray(bytearray(data))
            cookie = handle.aio_pwrite(buffer, 0, flags=FUA)
            deadline = time.monotonic() + 0.12
            while time.monotonic() < deadline:
                handle.poll(10)
            self.assertFalse(handle.aio_command_completed(cookie), f"without {missing:#x}")
            self.assertEqual([entry for entry in self.server.log if entry[0] in CHANGES], [])
            self.server.die()
            self.server.flags = everything
            self.server.start()
            while not handle.aio_command_completed(cookie):
                handle.poll(1000)
            content[:4096] = data
            self.assertEqual(bytes(handle.pread(512 * KIB, 0)), bytes(content[: 512 * KIB]))
        handle.shutdown()

    def test_without_delay(self):
        """Nothing is written again then: but the flush after a loss does not say that all is well."""
        handle = self.open(delay=0)
        for lost in (True, False, True):
            handle.pwrite(b"x" * 4096, 0)
            if not lost:
                handle.flush()
                handle.pwrite(b"y" * 4096, 8192, FUA)
            handle.pread(4096, 0)
            self.server.die()
            self.server.start()
            harness.nbd_served_again(handle)
            handle.pwrite(b"z" * 4096, 4096)
            if lost:
                with self.assertRaises(nbd.Error):
                    handle.flush()
            handle.flush()
        self.assertIn("may be lost", self.under_test.stderr())
        handle.shutdown()

    def test_fast_zero(self):
        """A zeroing that had to be fast is written again whether it is fast or not."""
        handle = self.open(flags=0x1 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80 | FLAG_FAST_ZERO)
        handle.pwrite(b"x" * 65536, 0)
        handle.flush()
        handle.zero(65536, 0, FAST)
        self.server.die()
        self.server.start()
        self.assertEqual(bytes(handle.pread(65536, 0)), bytes(65536))
        self.assertEqual([entry[3] & FAST for entry in self.server.log if entry[0] == ZEROES], [0])
        handle.shutdown()

    def close_node(self, handle):
        handle.shutdown()
        self.under_test.qmp.execute("block-export-del", id="export-n", mode="hard")
        self.under_test.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-n")
        self.under_test.qmp.execute("blockdev-del", {"node-name": "n"})

    def test_closed(self):
        """A node that is closed has flushed."""
        handle = self.open()
        handle.pwrite(b"x" * 65536, 0)
        self.close_node(handle)
        self.assertEqual(self.server.durable[:65536], b"x" * 65536)
        self.assertNotIn("lost", self.under_test.stderr())

    def test_closed_while_away(self):
        """If it cannot, somebody is told what that means."""
        handle = self.open()
        handle.pwrite(b"x" * 65536, 0)
        self.server.die()
        cookie = handle.aio_flush()
        for _ in range(10):
            handle.poll(10)
        self.assertFalse(handle.aio_command_completed(cookie))
        self.server.start()
        while not handle.aio_command_completed(cookie):
            handle.poll(100)
        self.assertEqual(self.server.durable[:65536], b"x" * 65536)
        handle.pwrite(b"y" * 65536, 0)
        self.server.die()
        self.close_node(handle)
        self.assertIn("has not flushed what it was given", self.under_test.stderr())

    @unittest.skipUnless(harness.FULL, "waits for seconds; in the long form")
    def test_closed_while_stuck(self):
        handle = self.open()
        handle.pwrite(b"x" * 65536, 0)
        stuck = threading.Event()
        self.server.hook = lambda kind, *_: kind == FLUSH and stuck.wait(30)
        start = time.monotonic()
        self.close_node(handle)
        self.assertLess(time.monotonic() - start, 8 * harness.SLOWNESS)
        stuck.set()
        self.assertIn("has not flushed what it was given", self.under_test.stderr())


if __name__ == "__main__":
    unittest.main()
