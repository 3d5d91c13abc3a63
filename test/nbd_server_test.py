# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NBD server as its clients and its administrator see it: the usual tools, the life of exports, and clients that
do not behave. (The protocol's details, byte by byte, are in src/export/nbd/server_test.c.)"""
import contextlib
import fcntl
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import threading
import time
import unittest

import harness
from harness import MIB, QmpError, run, scale

try:
    import nbd
except ImportError:
    nbd = None

SIZE = 64 * MIB


class Raw:
    """A client that speaks as little of the protocol as a test needs, and misbehaves where it wants."""

    def __init__(self, path, timeout=20 * harness.SLOWNESS):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        self.socket.connect(path)

    def receive(self, count):
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def go(self, name):
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        data = struct.pack(">I", len(name)) + name.encode() + b"\0\0"
        self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, len(data)) + data)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.receive(20))
            self.receive(length)
            if kind == 1:
                return self
            if kind & 0x80000000:
                raise EOFError

    @staticmethod
    def request(kind, offset, length, cookie=0, flags=0):
        return struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length)

    def send(self, data):
        self.socket.sendall(data)

    def reply(self):
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return error, cookie

    def ended(self):
        """True when the server has hung up."""
        try:
            while self.socket.recv(65536):
                pass
            return True
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def close(self):
        self.socket.close()

    __del__ = close


class Extended(Raw):
    """A client with extended headers, and the contexts it asks for; keeps to the protocol where a test does not mean
    otherwise."""

    def option(self, number, data=b""):
        self.socket.sendall(struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data)
        replies = []
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.receive(20))
            replies.append((kind, self.receive(length)))
            if kind == 1:
                return replies
            if kind & 0x80000000:
                raise EOFError

    def go(self, name, *contexts):
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.socket.sendall(struct.pack(">I", 3))
        self.option(11)
        text = struct.pack(">I", len(name)) + name.encode()
        queries = b"".join(struct.pack(">I", len(context)) + context.encode() for context in contexts)
        chosen = self.option(10, text + struct.pack(">I", len(contexts)) + queries)
        self.contexts = {data[4:].decode(): struct.unpack(">I", data[:4])[0] for kind, data in chosen if kind == 4}
        infos = {data[:2]: data[2:] for kind, data in self.option(7, text + b"\0\0") if kind == 3}
        self.size, self.flags = struct.unpack(">QH", infos[b"\0\0"])
        return self

    @staticmethod
    def request(kind, offset, length, cookie=0, flags=0, payload=b""):
        if payload:
            flags, length = flags | 32, len(payload)
        return struct.pack(">IHHQQQ", 0x21E41C71, flags, kind, cookie, offset, length) + payload

    def reply(self, kind, offset, length, flags=0, payload=b""):
        """The chunks of the answer to one request, [(type, body)]."""
        self.send(self.request(kind, offset, length, 77, flags, payload))
        chunks = []
        while True:
            magic, done, chunk, cookie, echo, size = struct.unpack(">IHHQQQ", self.receive(32))
            assert (magic, cookie, echo) == (0x6E8A278C, 77, offset)
            chunks.append((chunk, self.receive(size)))
            if done & 1:
                return chunks

    def pread(self, length, offset):
        """What is read, hole by hole."""
        data = bytearray(length)
        for chunk, body in self.reply(0, offset, length):
            start = struct.unpack(">Q", body[:8])[0] - offset
            if chunk == 1:
                data[start:start + len(body) - 8] = body[8:]
            else:
                assert chunk == 2
        return bytes(data)

    def status(self, offset, length, *contexts, flags=0):
        """{context: [(length, flags)]}; with contexts: of these only."""
        payload = b""
        if contexts:
            payload = struct.pack(">Q", length) + b"".join(struct.pack(">I", self.contexts[name]) for name in contexts)
        names = {number: name for name, number in self.contexts.items()}
        answer = {}
        for chunk, body in self.reply(7, offset, length, flags, payload):
            assert chunk == 6
            number, count = struct.unpack(">II", body[:8])
            assert len(body) == 8 + 16 * count
            answer[names[number]] = list(struct.iter_unpack(">QQ", body[8:]))
        return answer


class NbdTestCase(harness.TestCase):
    def start(self, *options):
        daemon = self.daemon(*options)
        daemon.nbd_server()
        return daemon

    def wait_until(self, is_so):
        deadline = time.monotonic() + 5 * harness.SLOWNESS
        while not is_so():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def raw_image(self, name="raw.img", size=SIZE):
        path = self.path(name)
        with open(path, "wb") as image:
            image.truncate(size)
        return path

    def served(self, *options, **more):
        """A daemon that serves a raw file as "n0"."""
        daemon = self.start(*options)
        daemon.add_file("n0", self.raw_image())
        daemon.export("n0", **more)
        return daemon


class NbdClients(NbdTestCase):
    """The tools that people use are content with us."""

    def random_file(self, size=8 * MIB):
        path = self.path("random")
        with open(path, "wb") as out:
            for _ in range(size // MIB):
                out.write(self.random.randbytes(MIB - 4096) + bytes(4096))
        return path

    def qcow2_served(self):
        path = self.path("q.qcow2")
        harness.qemu_img("create", "-f", "qcow2", path, str(8 * MIB))
        daemon = self.start()
        daemon.add_qcow2("n0", path)
        daemon.export("n0")
        return daemon, path

    def test_nbdcopy_there_and_back(self):
        daemon, path = self.qcow2_served()
        source, back = self.random_file(), self.path("back")
        run("nbdcopy", source, daemon.uri("n0"))
        run("nbdcopy", daemon.uri("n0"), back)
        run("cmp", source, back)
        daemon.stop()
        harness.image_check(path)
        harness.image_compare(source, path, "raw", "qcow2")

    def test_qemu_img_convert_there_and_back(self):
        daemon, path = self.qcow2_served()
        source, back = self.random_file(), self.path("back")
        harness.qemu_img("convert", "-n", "-f", "raw", "-O", "raw", source, daemon.uri("n0"))
        harness.qemu_img("convert", "-f", "raw", "-O", "raw", daemon.uri("n0"), back)
        run("cmp", source, back)
        harness.image_compare(source, daemon.uri("n0"), "raw", "raw")

    def test_qemu_io(self):
        daemon = self.served()
        harness.qemu_io(
            daemon.uri("n0"), "write -P 1 0 1M", "write -P 2 12345 54321", "write -z 100k 3k", "discard 2M 1M",
            "read -P 1 0 12345", "read -P 0 100k 3k", "write -f -P 3 63M 1M", "read -P 3 63M 1M", "flush",
            image_format="raw",
        )

    def test_nbdinfo_says_what_the_peer_says(self):
        daemon = self.served()
        text = run("nbdinfo", daemon.uri("n0")).stdout
        for line in ("export-size: 67108864", "base:allocation", "is_read_only: false", "can_cache: true",
                     "can_df: true", "can_fast_zero: true", "can_flush: true", "can_fua: true",
                     "can_multi_conn: true", "can_trim: true", "can_zero: true", "block_size_minimum: 1",
                     "block_size_preferred: 4096", "block_size_maximum: 33554432"):
            self.assertIn(line, text)

    def test_nbdinfo_lists_exports(self):
        daemon = self.served()
        daemon.export("n0", writable=False, name="another", description="the same, to look at")
        text = run("nbdinfo", "--list", daemon.uri("")).stdout
        self.assertIn('export="n0"', text)
        self.assertIn('export="another"', text)
        self.assertIn("description: the same, to look at", text)

    def test_nbdinfo_map(self):
        daemon, _ = self.qcow2_served()
        harness.qemu_io(daemon.uri("n0"), "write -P 1 1M 64k", "write -z 2M 64k", image_format="raw")
        words = [line.split()[:3] for line in run("nbdinfo", "--map", daemon.uri("n0")).stdout.splitlines()]
        self.assertEqual(words[:3], [["0", "1048576", "3"], ["1048576", "65536", "0"], ["1114112", "7274496", "3"]])

    @unittest.skipUnless(shutil.which("fio"), "needs fio")
    def test_fio_with_verification(self):
        daemon = self.served()
        run("fio", "--name=n", "--ioengine=nbd", f"--uri={daemon.uri('n0')}", "--rw=randrw", "--bs=4k",
            "--iodepth=16", "--size=16M", "--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1", f"--output={self.path('fio')}")

    def test_over_tcp(self):
        daemon = self.daemon()
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        daemon.qmp.execute("nbd-server-start",
                           {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}})
        daemon.add_file("n0", self.raw_image())
        daemon.export("n0")
        harness.qemu_io(f"nbd://127.0.0.1:{port}/n0", "write -P 5 1M 1M", "read -P 5 1M 1M", image_format="raw")
        # Both sides of a connection of our own are asked, while it is idle, whether they are still there.
        client = self.daemon("--blockdev", json.dumps({
            "driver": "nbd", "node-name": "remote", "export": "n0",
            "server": {"type": "inet", "host": "127.0.0.1", "port": str(port)}}))
        self.assertEqual(len(client.qmp.execute("query-named-block-nodes")), 1)

        def timers():
            with open("/proc/net/tcp") as table:
                rows = [row.split() for row in table if f":{port:04X}" in row]
            return [row[5][:2] for row in rows if row[3] == "01"]
        # "02" is the kernel's number for an idle connection's timer. An acknowledgement may still be under way.
        deadline = time.monotonic() + 10
        while timers() != ["02", "02"]:
            self.assertLess(time.monotonic(), deadline, timers())
            time.sleep(0.05)

    @unittest.skipUnless(nbd, "needs python3-libnbd")
    def test_libnbd_with_and_without_structured_replies(self):
        daemon = self.served()
        data = self.random.randbytes(3 * MIB)
        for structured in (True, False):
            handle = nbd.NBD()
            handle.set_request_structured_replies(structured)
            handle.connect_uri(daemon.uri("n0"))
            handle.pwrite(data, 4097)
            handle.flush()
            self.assertEqual(handle.pread(len(data), 4097), data)
            handle.zero(MIB, MIB, nbd.CMD_FLAG_NO_HOLE)
            self.assertEqual(handle.pread(MIB, MIB), bytearray(MIB))
            handle.trim(MIB, 2 * MIB, nbd.CMD_FLAG_FUA)
            handle.cache(MIB, 0)
            handle.shutdown()


class NbdExtended(NbdTestCase):
    """Extended headers: requests of 64 bits. (libnbd has them from version 1.18 on only.)"""

    GIB = 1024 * MIB

    def served_qcow2(self, size):
        path = self.path("q.qcow2")
        harness.qemu_img("create", "-f", "qcow2", path, str(size))
        daemon = self.start()
        daemon.add_qcow2("n0", path)
        daemon.export("n0", allocation_depth=True)
        return daemon, path

    def test_more_than_4_gib_at_once(self):
        daemon, path = self.served_qcow2(8 * self.GIB)
        client = Extended(daemon.nbd_path).go("n0", "base:allocation", "qemu:allocation-depth")
        self.assertEqual(client.size, 8 * self.GIB)
        self.assertTrue(client.flags & 0x1000, "a payload for block status is offered")
        data = self.random.randbytes(65536)
        self.assertEqual(client.reply(1, 7 * self.GIB, 0, payload=data), [(0, b"")])
        self.assertEqual(client.pread(131072, 7 * self.GIB - 32768), bytes(32768) + data + bytes(32768))
        both = client.status(0, 8 * self.GIB)
        self.assertEqual(both["base:allocation"],
                         [(7 * self.GIB, 3), (65536, 0), (self.GIB - 65536, 3)])
        self.assertEqual(both["qemu:allocation-depth"], [(7 * self.GIB, 0), (65536, 1), (self.GIB - 65536, 0)])
        self.assertEqual(client.status(0, 8 * self.GIB, "qemu:allocation-depth"),
                         {"qemu:allocation-depth": both["qemu:allocation-depth"]})
        self.assertEqual(client.status(0, 8 * self.GIB, "base:allocation", flags=8),
                         {"base:allocation": [(7 * self.GIB, 3)]})
        self.assertEqual(client.reply(6, self.GIB, 6 * self.GIB + 65536), [(0, b"")])
        self.assertEqual(client.status(0, 8 * self.GIB, "base:allocation"), {"base:allocation": [(8 * self.GIB, 3)]})
        self.assertEqual(client.reply(4, 0, 8 * self.GIB), [(0, b"")])
        self.assertEqual(client.reply(3, 0, 0), [(0, b"")])
        daemon.stop()
        harness.image_check(path)

    def test_without_contexts_no_payload_is_offered(self):
        daemon = self.served()
        client = Extended(daemon.nbd_path).go("n0")
        self.assertFalse(client.flags & 0x1000)
        self.assertEqual(client.reply(7, 0, 512, payload=struct.pack(">QI", 512, 1))[0][0], 0x8001)
        self.assertEqual(client.reply(3, 0, 0), [(0, b"")])

    def test_what_is_no_extended_request(self):
        """Every kind of nonsense is answered or ends its own connection; who behaves notices nothing."""
        daemon = self.served()
        good = Extended(daemon.nbd_path).go("n0", "base:allocation")
        for _ in range(scale(60, 3000)):
            bad = Extended(daemon.nbd_path).go("n0", "base:allocation")
            stream = bytearray()
            for _ in range(self.random.randrange(1, 6)):
                kind = self.random.choice((0, 1, 3, 4, 5, 6, 7, 7, 8, 65535))
                offset = self.random.choice((0, 4096, SIZE - 1, SIZE, 1 << 63, (1 << 64) - 1))
                length = self.random.choice((0, 1, 12, 528, 4096, 70000, 1 << 25, 1 << 32, (1 << 64) - 1))
                stream += bad.request(kind, offset, length, 0, self.random.choice((0, 0, 32, 32, 8, 65535)))
                stream += bytes(min(length, 80000)) if self.random.random() < 0.5 else b""
            if self.random.random() < 0.3:
                stream[self.random.randrange(len(stream))] ^= 1 << self.random.randrange(8)
            bad.socket.setblocking(False)
            with contextlib.suppress(OSError):
                bad.socket.send(stream)
            bad.close()
        self.assertEqual(good.reply(1, 4096, 0, payload=b"x" * 512), [(0, b"")])
        self.assertEqual(good.pread(512, 4096), b"x" * 512)


class NbdExports(NbdTestCase):
    """The life of exports, as the peer lives it."""

    def refused(self, daemon, command, text, **arguments):
        with self.assertRaises(QmpError) as caught:
            daemon.qmp.execute(command, **arguments)
        self.assertEqual(caught.exception.error_class, "GenericError")
        self.assertIn(text.lower(), caught.exception.desc.lower())

    def test_query(self):
        daemon = self.served()
        self.assertEqual(
            daemon.qmp.execute("query-block-exports"),
            [{"id": "export-n0", "type": "nbd", "node-name": "n0", "shutting-down": False}],
        )

    def test_delete_safe_is_refused_while_a_client_is_there(self):
        daemon = self.served()
        client = Raw(daemon.nbd_path).go("n0")
        self.refused(daemon, "block-export-del", "still in use", id="export-n0")
        client.send(Raw.request(0, 0, 512))
        self.assertEqual(client.reply(), (0, 0))
        client.close()
        deadline = time.monotonic() + 5 * harness.SLOWNESS
        while True:
            try:
                daemon.qmp.execute("block-export-del", id="export-n0")
                break
            except QmpError:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.01)
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-n0")
        self.assertEqual(daemon.qmp.execute("query-block-exports"), [])

    def test_delete_hard_disconnects(self):
        daemon = self.served()
        client = Raw(daemon.nbd_path).go("n0")
        daemon.qmp.execute("block-export-del", id="export-n0", mode="hard")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-n0")
        self.assertTrue(client.ended())
        daemon.export("n0")
        Raw(daemon.nbd_path).go("n0").close()

    def test_a_deleted_export_is_not_found(self):
        daemon = self.served()
        daemon.qmp.execute("block-export-del", id="export-n0")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-n0")
        with self.assertRaises(EOFError):
            Raw(daemon.nbd_path).go("n0")

    def test_refusals(self):
        daemon = self.served()
        self.refused(daemon, "block-export-del", "is not found", id="nope")
        more = {"type": "nbd", "node-name": "n0"}
        self.refused(daemon, "block-export-add", "'export-n0' is already in use", id="export-n0", **more)
        self.refused(daemon, "block-export-add", "already has export named 'n0'", id="e1", **more)
        self.refused(daemon, "block-export-add", "Invalid block export id", id="e 1", name="x", **more)
        self.refused(daemon, "block-export-add", "iothread \"t\" not found", id="e1", name="x", iothread="t", **more)
        self.refused(daemon, "block-export-add", "nope", id="e1", name="x", type="nbd", node_name="nope")
        self.refused(daemon, "nbd-server-start", "already running", addr={"type": "unix", "data": {"path": "x"}})
        self.assertEqual(len(daemon.qmp.execute("query-block-exports")), 1)

    def test_a_node_in_use_is_not_deleted(self):
        daemon = self.served()
        self.refused(daemon, "blockdev-del", "n0", node_name="n0")

    def test_server_stop_deletes_exports_and_disconnects(self):
        daemon = self.served()
        client = Raw(daemon.nbd_path).go("n0")
        waiting = Raw(daemon.nbd_path)
        waiting.receive(18)
        daemon.qmp.execute("nbd-server-stop")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-n0")
        self.assertTrue(client.ended() and waiting.ended())
        self.assertEqual(daemon.qmp.execute("query-block-exports"), [])
        self.assertFalse(os.path.exists(daemon.nbd_path))
        self.refused(daemon, "nbd-server-stop", "not running")
        self.refused(daemon, "block-export-add", "not running", id="e", type="nbd", node_name="n0")
        daemon.nbd_server()
        daemon.export("n0")
        Raw(daemon.nbd_path).go("n0").close()
        daemon.qmp.execute("nbd-server-stop")
        daemon.qmp.execute("blockdev-del", node_name="n0")

    def test_writable_export_of_a_read_only_node_is_refused(self):
        daemon = self.start()
        daemon.add_file("n0", self.raw_image(), **{"read-only": True})
        self.refused(daemon, "block-export-add", "read-only", id="e", type="nbd", node_name="n0", writable=True)
        daemon.export("n0", writable=False)
        client = Raw(daemon.nbd_path).go("n0")
        client.send(Raw.request(1, 0, 512) + bytes(512) + Raw.request(6, 0, 512) + Raw.request(4, 0, 512))
        refusal = 22 if harness.IS_PEER else 1  # the protocol wants EPERM
        self.assertEqual([client.reply()[0] for _ in range(3)], [refusal] * 3)

    def test_two_exports_of_one_node(self):
        daemon = self.served()
        daemon.export("n0", name="second")
        harness.qemu_io(daemon.uri("n0"), "write -P 9 0 64k", image_format="raw")
        harness.qemu_io(daemon.uri("second"), "read -P 9 0 64k", image_format="raw")


class NbdClientList(NbdTestCase):
    """query-nbd-clients: who is there and what they have done."""

    def clients(self, daemon):
        return daemon.qmp.execute("query-nbd-clients")

    def test_what_is_said_of_them(self):
        daemon = self.start()
        self.assertEqual(self.clients(daemon), [])
        daemon.add_file("n0", self.raw_image())
        daemon.export("n0", name="disk")
        waiting = Raw(daemon.nbd_path)
        waiting.receive(18)
        busy = Extended(daemon.nbd_path).go("disk")
        busy.reply(1, 0, 0, payload=bytes(8192))
        busy.reply(0, 0, 4096)
        busy.reply(0, SIZE, 1)
        first, second = self.clients(daemon)
        self.assertGreaterEqual(first.pop("since"), second.pop("since"))
        self.assertIn(f"process {os.getpid()}", second["address"])
        self.assertEqual(first, {"address": second["address"], "tls": False, "phase": "handshake", "headers": "simple"})
        self.assertEqual(second, {
            "address": second["address"], "tls": False, "phase": "transmission", "headers": "extended", "name": "disk",
            "id": "export-disk", "thread-id": daemon.pid, "requests": 3, "read-bytes": 4096, "written-bytes": 8192})
        waiting.close()
        busy.close()
        self.wait_until(lambda: self.clients(daemon) == [])
        daemon.qmp.execute("nbd-server-stop")
        self.assertEqual(self.clients(daemon), [])


class NbdActivation(NbdTestCase):
    """Sockets that a service manager has opened (sd_listen_fds(3))."""

    def listening(self, name):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.bind(self.path(name))
        made.listen(5)
        # High enough to be in nobody's way when they become 3 and 4.
        high = fcntl.fcntl(made.fileno(), fcntl.F_DUPFD, 100)
        made.close()
        return high

    def activate(self, variables, *options):
        """The program under `options`, as the service manager would start it; `variables` as the shell takes them."""
        sockets = [self.listening("nbd.sock"), self.listening("qmp.sock")]

        def pass_them():
            for place, descriptor in enumerate(sockets):
                os.dup2(descriptor, 3 + place)

        with open(self.path("stderr"), "wb") as stderr:
            process = subprocess.Popen(["sh", "-c", f'{variables} exec "$@"', "sh", *harness.DAEMON, *options],
                                       pass_fds=(3, 4), preexec_fn=pass_them, stdin=subprocess.DEVNULL, stdout=stderr,
                                       stderr=stderr, env={**harness.SANITIZER_OPTIONS, **os.environ})
        for descriptor in sockets:
            os.close(descriptor)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_sockets_by_name_and_number(self):
        image = self.raw_image()
        process = self.activate(
            "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=disk:monitor", "--blockdev",
            f"file,node-name=n0,filename={image}", "--nbd-server", "addr.type=fd,addr.str=disk", "--export",
            "nbd,id=e0,node-name=n0", "--chardev", "socket,id=m,fd=4,server=on,wait=off", "--monitor", "m")
        client = Extended(self.path("nbd.sock")).go("n0")  # however early it comes, the export is there
        self.assertEqual(client.pread(512, 0), bytes(512))
        qmp = harness.Qmp(self.path("qmp.sock"), True)
        self.assertEqual(qmp.execute("query-nbd-clients")[0]["requests"], 1)
        qmp.execute("quit")
        self.assertEqual(process.wait(20 * harness.SLOWNESS), 0)
        self.assertTrue(os.path.exists(self.path("nbd.sock")), "the socket file is not ours to remove")

    def refused(self, variables, text, name="disk"):
        process = self.activate(variables, "--nbd-server", f"addr.type=fd,addr.str={name}")
        self.assertEqual(process.wait(20 * harness.SLOWNESS), 1)
        with open(self.path("stderr")) as said:
            self.assertRegex(said.read(), text)
        for path in ("nbd.sock", "qmp.sock"):
            os.unlink(self.path(path))

    def test_what_is_not_for_us(self):
        named = "LISTEN_FDNAMES=disk:monitor"
        self.refused(f"LISTEN_PID=1 LISTEN_FDS=2 {named}", "'disk' is not the number")
        self.refused(f"LISTEN_FDS=2 {named}", "'disk' is not the number")
        self.refused(f"LISTEN_PID=$$ LISTEN_FDS=two {named}", "LISTEN_FDS is 'two'")
        self.refused(f"LISTEN_PID=$$ LISTEN_FDS=0 {named}", "LISTEN_FDS is '0'")
        self.refused(f"LISTEN_PID=$$ {named}", "LISTEN_FDS is ''")
        self.refused(f"LISTEN_PID=here LISTEN_FDS=2 {named}", "LISTEN_PID is 'here'")
        self.refused(f"LISTEN_PID=$$ LISTEN_FDS=9 {named}", "descriptor 5")
        self.refused(f"LISTEN_PID=$$ LISTEN_FDS=2 {named}", "'disc' is not the number", name="disc")
        self.refused(f"LISTEN_PID=$$ LISTEN_FDS=2 {named}", "'3x' is not the number", name="3x")


class NbdHostile(NbdTestCase):
    """Clients that do not behave harm nobody but themselves."""

    builds = ("release", "asan")
    time_limit = 120

    def test_handshake_takes_too_long(self):
        daemon = self.daemon()
        daemon.qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": daemon.nbd_path}},
                                                "handshake-max-seconds": 1})
        daemon.add_file("n0", self.raw_image())
        daemon.export("n0")
        good = Raw(daemon.nbd_path).go("n0")
        idle = Raw(daemon.nbd_path)
        self.assertTrue(idle.ended())
        time.sleep(0.5)
        good.send(Raw.request(0, 0, 512))
        self.assertEqual(good.reply(), (0, 0))

    def test_max_connections(self):
        daemon = self.daemon()
        daemon.qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": daemon.nbd_path}},
                                                "max-connections": 2})
        daemon.add_file("n0", self.raw_image())
        daemon.export("n0")
        clients = [Raw(daemon.nbd_path).go("n0") for _ in range(2)]
        third = Raw(daemon.nbd_path, timeout=0.5)
        with self.assertRaises(TimeoutError):
            third.receive(18)
        clients[0].close()
        third.socket.settimeout(10 * harness.SLOWNESS)
        third.go("n0").close()

    def test_silent_clients_make_room_for_others(self):
        daemon = self.served()
        daemon.qmp.execute("nbd-server-stop")
        daemon.qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": daemon.nbd_path}},
                                                "max-connections": 4})
        daemon.export("n0")
        working = Raw(daemon.nbd_path).go("n0")
        silent = [Raw(daemon.nbd_path) for _ in range(12)]
        started = time.monotonic()
        newcomer = Raw(daemon.nbd_path).go("n0")
        self.assertLess(time.monotonic() - started, 9 * harness.SLOWNESS, "not only when their time is over")
        for client in (working, newcomer):
            client.send(Raw.request(3, 0, 0))
            self.assertEqual(client.reply(), (0, 0))
        self.assertEqual([client["phase"] for client in daemon.qmp.execute("query-nbd-clients")][0], "transmission")
        self.assertTrue(silent[0].ended())

    def test_very_many_at_once(self):
        daemon = self.daemon()
        daemon.qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": daemon.nbd_path}},
                                                "max-connections": 0})
        daemon.add_file("n0", self.raw_image())
        daemon.export("n0")
        good = Extended(daemon.nbd_path).go("n0")
        beginnings = (b"", b"\0\0", b"\0\0\0\3IHAVE", b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\1\0")
        count = scale(200, 900)
        crowd = []
        for number in range(count):
            crowd.append(Raw(daemon.nbd_path))
            crowd[-1].send(beginnings[number % len(beginnings)])
            if number % 20 == 0:
                self.assertEqual(good.pread(4096, 4096 * number), bytes(4096))
        self.wait_until(lambda: len(daemon.qmp.execute("query-nbd-clients")) == count + 1)
        with open(f"/proc/{daemon.pid}/statm") as statm:
            self.assertLess(int(statm.read().split()[1]) * 4096, 200 * MIB * harness.SLOWNESS)
        for client in crowd:
            client.close()
        self.wait_until(lambda: len(daemon.qmp.execute("query-nbd-clients")) == 1)
        self.assertEqual(good.reply(1, 0, 0, payload=bytes(512)), [(0, b"")])

    def test_byte_by_byte(self):
        daemon = self.served()
        client = Raw(daemon.nbd_path)
        client.receive(18)
        stream = struct.pack(">I8sII", 3, b"IHAVEOPT", 7, 8) + struct.pack(">I", 2) + b"n0\0\0"
        stream += Raw.request(1, 0, 8, 1) + b"8 bytes." + Raw.request(0, 0, 8, 2)
        for position in range(len(stream)):
            client.send(stream[position:position + 1])
            time.sleep(0.0005)
        for _ in range(3):
            _, _, _, length = struct.unpack(">QIII", client.receive(20))
            client.receive(length)
        self.assertEqual(client.reply(), (0, 1))
        self.assertEqual(client.reply(), (0, 2))
        self.assertEqual(client.receive(8), b"8 bytes.")

    def test_a_client_that_does_not_read_stops_itself_alone(self):
        daemon = self.served()
        greedy = Raw(daemon.nbd_path).go("n0")
        greedy.socket.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 200000:
                greedy.socket.send(b"".join(Raw.request(0, 0, MIB, i) for i in range(50)))
                sent += 50
        with open(f"/proc/{daemon.pid}/statm") as statm:
            resident = int(statm.read().split()[1]) * 4096
        self.assertLess(resident, 400 * MIB * harness.SLOWNESS)
        other = Raw(daemon.nbd_path).go("n0")
        other.send(Raw.request(3, 0, 0))
        self.assertEqual(other.reply(), (0, 0))
        greedy.close()

    def test_disconnects_at_random_moments(self):
        daemon = self.served("--object", "iothread,id=t0")
        daemon.add_file("n1", self.raw_image("second.img"))
        daemon.export("n1", iothread="t0")
        for round_number in range(scale(60, 600)):
            client = Raw(daemon.nbd_path).go(self.random.choice(("n0", "n1")))
            stream = b""
            for cookie in range(self.random.randrange(1, 40)):
                kind = self.random.choice((0, 1, 1, 3, 4, 6))
                length = self.random.choice((1, 512, 4096, 65536, 300000))
                offset = self.random.randrange(0, SIZE)
                if kind == 3:
                    offset = length = 0
                stream += Raw.request(kind, offset, length, cookie)
                if kind == 1:
                    stream += bytes(length)
            cut = self.random.randrange(1, len(stream) + 1)
            client.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.socket.send(stream[:cut])
            client.close()
        other = Raw(daemon.nbd_path).go("n1")
        other.send(Raw.request(3, 0, 0))
        self.assertEqual(other.reply(), (0, 0))

    def test_garbage(self):
        daemon = self.served()
        for _ in range(scale(50, 500)):
            client = Raw(daemon.nbd_path)
            with contextlib.suppress(OSError):
                if self.random.random() < 0.5:
                    client.go("n0")
                client.send(self.random.randbytes(self.random.randrange(1, 3000)))
            client.close()
        Raw(daemon.nbd_path).go("n0").close()


class NbdThreads(NbdTestCase):
    """Clients on I/O threads while exports come and go."""

    builds = ("release", "asan", "tsan")
    time_limit = 120

    def keep_busy(self, daemon, name, stop, seed):
        """Connects, works, is thrown out, connects again."""
        chooser = random.Random(seed)
        while not stop.is_set():
            try:
                client = Raw(daemon.nbd_path).go(name)
                for _ in range(200):
                    offset = chooser.randrange(0, SIZE // 4096) * 4096
                    batch = b"".join(
                        Raw.request(1, offset, 4096, 1) + bytes(4096) + Raw.request(6, offset, 8192, 2)
                        for _ in range(8)) if chooser.random() < 0.5 else Raw.request(3, 0, 0) * 16
                    client.send(batch)
                    for _ in range(16):
                        client.reply()
                client.close()
            except (EOFError, OSError):
                time.sleep(0.002)

    def test_exports_come_and_go_under_load(self):
        daemon = self.start("--object", "iothread,id=t0", "--object", "iothread,id=t1")
        daemon.add_file("n0", self.raw_image())
        stop = threading.Event()
        threads = []
        for number in range(4):
            threads.append(threading.Thread(
                target=self.keep_busy, args=(daemon, f"x{number % 2}", stop, self.random.random())))
            threads[-1].start()
        try:
            for round_number in range(scale(30, 500)):
                name = f"x{round_number % 2}"
                threads_of_it = ("t0", "t1", ["t0", "t1"])[round_number // 2 % 3]
                daemon.export("n0", name=name, iothread=threads_of_it)
                time.sleep(self.random.random() * 0.05)
                daemon.qmp.execute("block-export-del", id=f"export-{name}", mode="hard")
                daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id=f"export-{name}")
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def test_several_threads_for_one_export(self):
        """Clients are divided among them, and what they write at the same time, where nothing is allocated yet, is
        there afterwards."""
        path = self.path("q.qcow2")
        harness.qemu_img("create", "-f", "qcow2", path, str(SIZE))
        daemon = self.start("--object", "iothread,id=t0", "--object", "iothread,id=t1", "--blockdev",
                            f"qcow2,node-name=n0,file.driver=file,file.filename={path}")
        with self.assertRaisesRegex(QmpError, "is named twice"):
            daemon.export("n0", iothread=["t0", "t0"])
        with self.assertRaisesRegex(QmpError, '"t9" not found'):
            daemon.export("n0", iothread=["t0", "t9"])
        daemon.export("n0", iothread=["t0", "t1"])
        clients = [Extended(daemon.nbd_path).go("n0") for _ in range(4)]
        threads = [client["thread-id"] for client in daemon.qmp.execute("query-nbd-clients")]
        self.assertEqual(sorted(threads), sorted(2 * list(set(threads))))
        self.assertNotIn(daemon.pid, threads)
        with self.assertRaises(QmpError):
            daemon.qmp.execute("object-del", id="t1")
        clients.pop().close()
        self.wait_until(lambda: len(daemon.qmp.execute("query-nbd-clients")) == 3)
        clients.append(Extended(daemon.nbd_path).go("n0"))
        self.assertEqual(sorted(client["thread-id"] for client in daemon.qmp.execute("query-nbd-clients")),
                         sorted(threads))
        blocks = list(range(SIZE // 16384))
        self.random.shuffle(blocks)
        blocks = blocks[:scale(400, 4000)]

        def write(number):
            for block in blocks[number::4]:
                clients[number].reply(1, block * 16384, 0, payload=struct.pack(">Q", block + 1) * 2048)

        workers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for position, block in enumerate(blocks):
            got = clients[position % 3].pread(16384, block * 16384)
            self.assertEqual(got, struct.pack(">Q", block + 1) * 2048)
        daemon.stop()
        harness.image_check(path)

    def test_quit_under_load_is_quick(self):
        daemon = self.start("--object", "iothread,id=t0")
        daemon.add_file("n0", self.raw_image())
        daemon.export("n0", name="x0", iothread="t0")
        daemon.export("n0", name="x1")
        stop = threading.Event()
        threads = [threading.Thread(target=self.keep_busy, args=(daemon, f"x{number % 2}", stop, number))
                   for number in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        try:
            before = time.monotonic()
            daemon.stop()
            self.assertLess(time.monotonic() - before, 2 * harness.SLOWNESS)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


if __name__ == "__main__":
    unittest.main()
