# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD clients that do not behave, and those who suffer: the administrator who changes the graph meanwhile, other clients,
the daemon's descriptors. (nbd_server_test.NbdHostile has the clients by themselves.)"""
import contextlib
import os
import resource
import socket
import struct
import time
import unittest

import harness
from harness import MIB, QmpError
from nbd_server_test import SIZE, Extended, NbdTestCase, Raw

TIB = 1 << 40
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
NO_HOLE = 2


class Bystanders(NbdTestCase):
    builds = ("asan",)

    def quickly(self, daemon, command, arguments=None, **more):
        started = time.monotonic()
        result = daemon.qmp.execute(command, arguments, **more)
        self.assertLess(time.monotonic() - started, 3 * harness.SLOWNESS, command)
        return result

    def test_zeroes_without_end(self):
        """Terabytes of zeroes hold up neither a change of the graph, nor another client, nor the export's end."""
        daemon = self.start()
        daemon.add_qcow2("n0", self.create_image("big.qcow2", 8 * TIB), discard="unmap")
        daemon.add_qcow2("top", self.create_image("top.qcow2", 8 * TIB))
        daemon.export("n0")
        other = Extended(daemon.nbd_path).go("n0")
        greedy = [Extended(daemon.nbd_path).go("n0") for _ in range(2)]
        for client in greedy:
            for i in range(8):
                client.send(Extended.request(ZEROES, i * TIB + 512, TIB - 4096, i, NO_HOLE))
        time.sleep(0.05)
        for i in range(20):
            started = time.monotonic()
            self.assertEqual(other.pread(4096, i * TIB // 4), bytes(4096))
            self.assertLess(time.monotonic() - started, 1 * harness.SLOWNESS)
        self.quickly(daemon, "blockdev-snapshot", {"node": "n0", "overlay": "top"})
        greedy[0].close()
        self.quickly(daemon, "block-export-del", id="export-n0", mode="hard")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", timeout=3 * harness.SLOWNESS)

    def test_pieces_of_zeroes(self):
        """A long range that is cut into pieces is zeroes all over, and nothing else is."""
        daemon = self.start()
        size = 1024 * MIB
        image = self.create_image("disk.qcow2", size)
        daemon.add_qcow2("n0", image, discard="unmap")
        daemon.export("n0")
        client = Extended(daemon.nbd_path).go("n0")
        edges = [256 * MIB * i + at for i in range(1, 4) for at in (-65536, 0, 65536)]
        for kind, flags in ((ZEROES, 0), (ZEROES, NO_HOLE), (ZEROES, 1), (TRIM, 1)):
            for edge in [0, *edges, size - 131072]:
                self.assertEqual(client.reply(WRITE, edge, 0, payload=b"\x77" * 65536), [(0, b"")])
            start, end = self.random.randrange(1, 128) * 512, size - 65536 - self.random.randrange(1, 128) * 512
            self.assertEqual(client.reply(kind, start, end - start, flags), [(0, b"")])
            for edge in edges:
                self.assertEqual(client.pread(65536, edge), bytes(65536))
            rest = bytes(65536 - start) if kind == ZEROES else b"\x77" * (65536 - start)  # half of a cluster stays
            self.assertEqual(client.pread(65536, 0), b"\x77" * start + rest)
            self.assertEqual(client.pread(65536 - end % 65536, end), b"\x77" * (65536 - end % 65536))
        client.close()
        daemon.stop()
        harness.image_check(image)

    def test_who_does_not_read(self):
        """Clients that ask for a gigabyte each and read nothing, and one that stops in the middle of its own data, hold
        up no change of the graph."""
        daemon = self.start("--object", "iothread,id=t0")
        daemon.add_qcow2("n0", self.create_image("disk.qcow2", SIZE), discard="unmap")
        daemon.add_qcow2("top", self.create_image("top.qcow2", SIZE))
        daemon.export("n0")
        daemon.export("n0", name="t", export_id="t", **{"writable": True, "iothread": "t0"})
        other = Raw(daemon.nbd_path).go("t")
        crowd = []
        for name in ("n0", "t", "n0", "t"):
            crowd.append(Raw(daemon.nbd_path).go(name))
            crowd[-1].send(b"".join(Raw.request(READ, 0, 32 * MIB, i) for i in range(32)))
            crowd.append(Raw(daemon.nbd_path).go(name))
            crowd[-1].send(Raw.request(WRITE, 0, 32 * MIB) + bytes(100000))
        time.sleep(0.1)
        self.quickly(daemon, "blockdev-snapshot", {"node": "n0", "overlay": "top"})
        self.quickly(daemon, "block_resize", {"node-name": "top", "size": 2 * SIZE})
        self.quickly(daemon, "block-commit", {"job-id": "j", "device": "top"})
        daemon.qmp.wait_event("BLOCK_JOB_READY", timeout=5 * harness.SLOWNESS)
        self.quickly(daemon, "job-complete", id="j")
        self.assertIsNone(daemon.qmp.wait_job("j"))
        other.send(Raw.request(WRITE, 0, 512) + b"x" * 512 + Raw.request(READ, 0, 512))
        self.assertEqual([other.reply(), other.reply()], [(0, 0)] * 2)
        self.assertEqual(other.receive(512), b"x" * 512)
        with open(f"/proc/{daemon.pid}/statm") as statm:
            self.assertLess(int(statm.read().split()[1]) * 4096, 600 * MIB * harness.SLOWNESS)
        self.quickly(daemon, "block-export-del", id="t", mode="hard")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="t", timeout=3 * harness.SLOWNESS)
        self.quickly(daemon, "nbd-server-stop")
        self.assertTrue(crowd[0].ended())

    def session(self):
        """What a client says from its first byte to its last."""
        text = struct.pack(">I", 2) + b"n0"
        option = lambda number, data=b"": struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data
        stream = struct.pack(">I", 3) + option(3) + option(99, b"what") + option(11)
        stream += option(10, text + struct.pack(">II", 1, 15) + b"base:allocation") + option(7, text + b"\0\1\0\3")
        request = Extended.request
        return (stream + request(WRITE, 4096, 0, 1, payload=b"y" * 600) + request(READ, 0, 65536, 2)
                + request(STATUS, 0, MIB, 3) + request(ZEROES, 4096, 4096, 4) + request(FLUSH, 0, 0, 5)
                + request(TRIM, 0, MIB, 6) + request(READ, 0, 4 * MIB, 7) + request(DISC, 0, 0, 8))

    def test_ends_at_every_byte(self):
        """Hung up at each, politely or not, with answers unread: nobody is left, and nothing of them."""
        daemon = self.served()
        stream = self.session()
        descriptors = lambda: len(os.listdir(f"/proc/{daemon.pid}/fd"))
        before = descriptors()
        for cut in range(0, len(stream) + 1):
            client = Raw(daemon.nbd_path)
            if cut % 2:
                client.receive(18)
            client.send(stream[:cut])
            if cut % 3 == 0:
                client.socket.shutdown(socket.SHUT_WR)
                self.assertTrue(client.ended())
            client.close()
        self.wait_until(lambda: not daemon.qmp.execute("query-nbd-clients") and descriptors() == before)
        last = Extended(daemon.nbd_path).go("n0")
        self.assertEqual(last.pread(4096, 0), bytes(4096))

    def test_no_descriptors_left(self):
        """More clients than the daemon may have descriptors: who is in goes on, the administrator is told why his file
        does not open, and the daemon waits for better times without running."""
        daemon = self.daemon()
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (64, 64))
        daemon.qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": daemon.nbd_path}},
                                                "max-connections": 0})
        daemon.add_file("n0", self.raw_image())
        daemon.export("n0")
        good = Extended(daemon.nbd_path).go("n0")
        crowd = []
        for _ in range(100):
            with contextlib.suppress(BlockingIOError):
                crowd.append(Raw(daemon.nbd_path))
        self.wait_until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) >= 64)
        self.assertEqual(good.pread(4096, 0), bytes(4096))
        with self.assertRaisesRegex(QmpError, "Too many open files"):
            daemon.add_file("n1", self.raw_image("other.img"))
        before = self.processor(daemon)
        time.sleep(0.5)
        self.assertLess(self.processor(daemon) - before, 0.1 * harness.SLOWNESS)
        for client in crowd:
            client.close()
        self.wait_until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) < 32)
        daemon.add_file("n1", self.path("other.img"))
        self.assertEqual(Extended(daemon.nbd_path).go("n0").pread(4096, 0), bytes(4096))
        self.assertEqual(good.pread(4096, 0), bytes(4096))

    @staticmethod
    def processor(daemon):
        """Seconds of processor that it has used."""
        with open(f"/proc/{daemon.pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    unittest.main()
