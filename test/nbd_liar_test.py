# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD servers that lie, to our client of them: absurd sizes, extents and answers, and a connection that ends anywhere.
Whatever they say, the program goes on, says an error, and never takes a lie for data."""
import os
import socket
import struct
import threading
import time
import unittest

import harness
from harness import MIB, QmpError, scale

try:
    import nbd
except ImportError:
    nbd = None

SIZE = 4 * MIB
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FLAGS = 0x1 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80 | 0x400  # flush, FUA, trim, zeroes, DF, cache
CONTEXT = 7


class Cut(Exception):
    """The server is done with this client."""


class Liar:
    """A server that speaks the protocol as it is told to. `lies` are members that a test changes."""

    def __init__(self, path, **lies):
        self.size, self.flags, self.blocks = SIZE, FLAGS, (1, 4096, 32 * MIB)
        self.cut_after = None  # bytes that it sends before it hangs up
        self.content = bytearray(os.urandom(4096) * (SIZE // 4096))
        self.extents = lambda offset, length: [(length, 0)]
        self.answer = None  # (client, type, cookie, offset, length) -> bytes, or None: an honest answer
        self.context_name = b"base:allocation"
        self.clients = 0
        for name, value in lies.items():
            setattr(self, name, value)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(16)
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.clients += 1
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        self.sent = 0
        try:
            self.handshake(client)
            while True:
                self.request(client)
        except (Cut, OSError, struct.error):
            pass
        finally:
            client.close()

    def send(self, client, data):
        if self.cut_after is not None and self.sent + len(data) >= self.cut_after:
            client.sendall(data[: max(self.cut_after - self.sent, 0)])
            raise Cut
        self.sent += len(data)
        client.sendall(data)

    @staticmethod
    def receive(client, count):
        data = b""
        while len(data) < count:
            piece = client.recv(count - len(data))
            if not piece:
                raise Cut
            data += piece
        return data

    def reply_option(self, client, option, kind, data=b""):
        self.send(client, struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)

    def handshake(self, client):
        self.send(client, b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        self.receive(client, 4)
        while True:
            _, option, length = struct.unpack(">QII", self.receive(client, 16))
            self.receive(client, length)
            if option == 8:  # structured replies
                self.reply_option(client, option, 1)
            elif option == 10:  # set meta context
                self.reply_option(client, option, 4, struct.pack(">I", CONTEXT) + self.context_name)
                self.reply_option(client, option, 1)
            elif option in (6, 7):
                self.reply_option(client, option, 3, struct.pack(">HQH", 0, self.size & (1 << 64) - 1, self.flags))
                if self.blocks:
                    self.reply_option(client, option, 3, struct.pack(">HIII", 3, *self.blocks))
                self.reply_option(client, option, 1)
                if option == 7:
                    return
            else:
                self.reply_option(client, option, 0x80000001)

    @staticmethod
    def chunk(cookie, kind, data=b"", done=True):
        return struct.pack(">IHHQI", 0x668E33EF, 1 if done else 0, kind, cookie, len(data)) + data

    def request(self, client):
        _, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(client, 28))
        data = self.receive(client, length) if kind == WRITE else b""
        if kind == DISC:
            raise Cut
        answer = self.answer and self.answer(self, kind, cookie, offset, length)
        if not answer:
            answer = self.honest(kind, cookie, offset, length, data)
        self.send(client, answer)

    def honest(self, kind, cookie, offset, length, data):
        if kind == READ:
            return self.chunk(cookie, 1, struct.pack(">Q", offset) + self.content[offset : offset + length])
        if kind == WRITE:
            self.content[offset : offset + length] = data
        elif kind == STATUS:
            pairs = b"".join(struct.pack(">II", *extent) for extent in self.extents(offset, length))
            return self.chunk(cookie, 5, struct.pack(">I", CONTEXT) + pairs)
        return self.chunk(cookie, 0)


@unittest.skipUnless(nbd, "needs libnbd's Python module")
class Lies(harness.TestCase):
    builds = ("asan",)

    def setUp(self):
        super().setUp()
        self.liars = []
        self.under_test = self.daemon()
        self.under_test.nbd_server()

    def clean_up(self):
        for liar in self.liars:
            liar.close()
        super().clean_up()

    def liar(self, **lies):
        path = self.path(f"liar{len(self.liars)}.sock")
        self.liars.append(Liar(path, **lies))
        return path

    def add(self, path, **more):
        self.under_test.qmp.execute("blockdev-add", {"driver": "nbd", "node-name": "n", "discard": "unmap",
                                                     "server": {"type": "unix", "path": path}, **more})

    def remove(self):
        self.under_test.qmp.execute("block-export-del", id="export-n", mode="hard")
        self.under_test.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-n")
        self.under_test.qmp.execute("blockdev-del", {"node-name": "n"})

    def handle(self):
        self.under_test.export("n")
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_uri(self.under_test.uri("n"))
        return handle

    def test_facts(self):
        """What is impossible is refused when the node is opened; sizes of blocks that are none are as if not said."""
        for lies in ({"size": -1}, {"size": 1 << 63}, {"size": SIZE + 1, "blocks": (512, 4096, MIB)},
                     {"blocks": None, "size": -5}):
            with self.assertRaises(QmpError, msg=lies):
                self.add(self.liar(**lies))
        self.assertEqual(self.under_test.qmp.execute("query-named-block-nodes"), [])
        for blocks in ((3, 4096, MIB), (1 << 20, 1 << 20, 1 << 22), (4096, 4096, 512), (0, 0, 0), None):
            self.add(self.liar(blocks=blocks))
            handle = self.handle()
            self.assertEqual(bytes(handle.pread(4096, 4096)), bytes(self.liars[-1].content[4096:8192]))
            handle.shutdown()
            self.remove()

    def test_extents(self):
        """Lengths beyond what was asked for, of nothing, of everything; none of them hides data."""
        for extents in (lambda offset, length: [(0, 3)], lambda offset, length: [(0xFFFFFFFF, 3)],
                        lambda offset, length: [(1, 3), (0, 0)], lambda offset, length: [],
                        lambda offset, length: [(length * 2, 0), (5, 3)], lambda offset, length: [(512, 0xFFFFFFFC)]):
            self.add(self.liar(extents=extents))
            handle = self.handle()
            seen = []
            end = 0
            while end < SIZE - 1024 and len(seen) < 6:
                before = end
                try:
                    handle.block_status(1024, end, lambda name, offset, entries, error: seen.append(entries))
                except nbd.Error:
                    break
                end += sum(seen[-1][::2])
                self.assertGreater(end, before)
            self.assertLessEqual(end, SIZE)
            self.assertEqual(len(handle.pread(4096, 0)), 4096)
            handle.shutdown()
            self.remove()

    def test_answers(self):
        """Answers that are none end the connection, or fail the request; no read is taken for good that is not whole."""
        long_text = b"x" * 5000
        lies = {
            "short data": lambda liar, kind, cookie, offset, length:
                liar.chunk(cookie, 1, struct.pack(">Q", offset) + bytes(length // 2)),
            "data elsewhere": lambda liar, kind, cookie, offset, length:
                liar.chunk(cookie, 1, struct.pack(">Q", offset + length) + bytes(length)),
            "data before": lambda liar, kind, cookie, offset, length:
                liar.chunk(cookie, 1, struct.pack(">Q", (offset - 512) & (1 << 64) - 1) + bytes(length)),
            "too much": lambda liar, kind, cookie, offset, length:
                liar.chunk(cookie, 1, struct.pack(">Q", offset) + bytes(length + 512)),
            "a hole too long": lambda liar, kind, cookie, offset, length:
                liar.chunk(cookie, 2, struct.pack(">QI", offset, 0xFFFFFFFF)),
            "nothing": lambda liar, kind, cookie, offset, length: liar.chunk(cookie, 0),
            "another cookie": lambda liar, kind, cookie, offset, length: liar.chunk(cookie + 99, 0),
            "no magic": lambda liar, kind, cookie, offset, length: b"nonsense" * 4,
            "a huge chunk": lambda liar, kind, cookie, offset, length:
                struct.pack(">IHHQI", 0x668E33EF, 1, 1, cookie, 0xFFFFFFFF),
            "an unknown chunk": lambda liar, kind, cookie, offset, length: liar.chunk(cookie, 77, b"what"),
            "an error": lambda liar, kind, cookie, offset, length:
                liar.chunk(cookie, 0x8001, struct.pack(">IH", 5, 3) + b"why"),
            "an error of no number": lambda liar, kind, cookie, offset, length:
                liar.chunk(cookie, 0x8001, struct.pack(">IH", 0xFFFFFFFF, 0)),
            "an error with a lie in it": lambda liar, kind, cookie, offset, length:
                liar.chunk(cookie, 0x8001, struct.pack(">IH", 5, 65535) + long_text),
            "no lie, but a status": lambda liar, kind, cookie, offset, length:
                liar.chunk(cookie, 5, struct.pack(">III", CONTEXT, length, 0)),
        }
        for name, lie in lies.items():
            only_reads = lambda liar, kind, *rest, lie=lie: lie(liar, kind, *rest) if kind == READ else None
            self.add(self.liar(answer=only_reads))
            handle = self.handle()
            with self.assertRaises(nbd.Error, msg=name):
                handle.pread(4096, 8192)
            try:
                handle.pwrite(bytes(512), 0)  # on the same connection, or on the next one
            except nbd.Error:
                pass
            handle.shutdown()
            self.remove()
        self.assertTrue(self.under_test.is_alive())

    def test_what_the_server_cannot_bear(self):
        """A server that ends at the same request each time, and comes back: that request fails, whatever the reconnect
        delay; others are served."""

        def dies(liar, kind, cookie, offset, length):
            if (kind, offset) == (READ, MIB):
                raise Cut
            return None

        self.add(self.liar(answer=dies), **{"reconnect-delay": 60})
        handle = self.handle()
        start = time.monotonic()
        with self.assertRaises(nbd.Error):
            handle.pread(512, MIB)
        self.assertLess(time.monotonic() - start, 20 * harness.SLOWNESS)
        self.assertLess(self.liars[-1].clients, 20)
        self.assertEqual(bytes(handle.pread(4096, 4096)), bytes(self.liars[-1].content[4096:8192]))

    def test_ends_anywhere(self):
        """The connection ends after each number of bytes in turn: an error, or the next one serves."""
        whole = 18 + 20 + 20 + 20 + 4 + 15 + 20 + 12 + 20 + 14 + 20  # about the length of the handshake
        for cut in range(0, whole + 40, scale(7, 1)):
            path = self.liar(cut_after=cut)
            try:
                self.add(path)
            except QmpError:
                continue
            handle = self.handle()
            try:
                handle.pread(512, 0)
            except nbd.Error:
                pass
            handle.shutdown()
            self.remove()
        self.assertTrue(self.under_test.is_alive())

    def test_ends_in_the_middle_of_requests(self):
        """With a delay for reconnection everything arrives, however often the connection ends."""
        path = self.liar(cut_after=9000)
        self.add(path, **{"reconnect-delay": 20})
        liar = self.liars[-1]
        handle = self.handle()
        for number in range(scale(30, 300)):
            data = bytes([number % 255 + 1]) * 2048
            handle.pwrite(data, number * 2048)
            self.assertEqual(bytes(handle.pread(2048, number * 2048)), data)
        self.assertGreater(liar.clients, 3)
        handle.shutdown()

    def test_bent_answers(self):
        """Honest answers with bytes changed, left out or said twice, in the handshake too: no crash, and no request that
        never ends."""
        def bend(data):
            data = bytearray(data)
            at = self.random.randrange(len(data))
            how = self.random.randrange(4)
            if how == 0:
                data[at] = self.random.choice([0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 1 << self.random.randrange(8)])
            elif how == 1:
                del data[at : at + self.random.randrange(1, 9)]
            elif how == 2:
                data[at:at] = data[at : at + self.random.randrange(1, 9)]
            else:
                data[at : at + 4] = self.random.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0", b"\0\0\1\0"])
            return bytes(data)

        class Bent(Liar):
            """Says something wrong now and then, and hangs up when it could have confused both sides."""

            def send(bent, client, data):  # pylint: disable=no-self-argument
                if self.random.random() < bent.crookedness:
                    client.settimeout(0.1)
                    data = bend(data)
                super().send(client, data)

        for number in range(scale(12, 2000)):
            path = self.path(f"bent{number}.sock")
            liar = Bent(path, crookedness=self.random.choice([0.02, 0.1, 0.4]))
            try:
                self.add(path, **{"reconnect-delay": self.random.choice([0, 1])})
            except QmpError:
                liar.close()
                continue
            handle = self.handle()
            for _ in range(6):
                offset = self.random.randrange(SIZE // 512 - 128) * 512
                try:
                    self.random.choice([lambda: handle.pread(4096, offset), lambda: handle.pwrite(bytes(512), offset),
                                        lambda: handle.zero(65536, offset), handle.flush,
                                        lambda: handle.block_status(65536, offset, lambda *answer: 0)])()
                except nbd.Error:
                    pass
            handle.shutdown()
            liar.close()
            self.remove()
            os.unlink(path)

    def test_silence(self):
        """A server that greets and then says nothing does not stop other commands, nor the end of the daemon."""
        path = self.path("silent.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(4)
        self.under_test.qmp.send_raw(b'{"execute": "blockdev-add", "arguments": {"driver": "nbd", "node-name": "n", '
                                     b'"open-timeout": 1, "server": {"type": "unix", "path": "' + path.encode() + b'"}}}')
        start = time.monotonic()
        with self.assertRaises(AssertionError):
            self.assertIn("return", self.under_test.qmp.reply())
        self.assertLess(time.monotonic() - start, 5 * harness.SLOWNESS)
        listener.close()


if __name__ == "__main__":
    unittest.main()
