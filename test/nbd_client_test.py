# SPDX-License-Identifier: LGPL-2.1-or-later
"""The nbd driver, our client of NBD servers: every server there is, with TLS and without; what becomes of requests when a
server dies; and servers that lie."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
import unittest

import harness
import tls_test
from harness import MIB, qemu_img, run, scale

try:
    import nbd
except ImportError:
    nbd = None

SIZE = 8 * MIB


def connect(uri):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


@unittest.skipUnless(nbd and shutil.which("nbdkit"), "needs nbdkit, and libnbd's Python module")
class Client(harness.TestCase):
    """Servers and clients of them."""

    certify = tls_test.Tls.certify
    certificates = tls_test.Tls.certificates
    keys = tls_test.Tls.keys

    def image(self, name="disk.img", size=SIZE):
        """A quarter of random data, a quarter of zeroes, and again."""
        path = self.path(name)
        with open(path, "wb") as out:
            for _ in range(2):
                out.write(self.random.randbytes(size // 4))
                out.seek(size // 4, 1)
            out.truncate(size)
        return path

    def spawn(self, *command, socket_path):
        """A server; waits until it listens."""
        if os.path.exists(socket_path):
            os.unlink(socket_path)
        server = self.launch(*command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10 * harness.SLOWNESS
        while time.monotonic() < deadline and server.poll() is None:
            probe = socket.socket(socket.AF_UNIX)
            try:
                probe.connect(socket_path)
                return server
            except OSError:
                time.sleep(0.01)
            finally:
                probe.close()
        self.fail(f"{command[0]} does not listen: {server.stderr.read() if server.poll() is not None else ''}")

    def nbdkit(self, image, *more):
        """`more`: options, and parameters of filters (NAME=VALUE)."""
        socket_path = self.path("s.sock")
        options = [item for item in more if item.startswith("-")]
        return self.spawn("nbdkit", "-f", "-U", socket_path, *options, "file", image,
                          *[item for item in more if not item.startswith("-")], socket_path=socket_path)

    def qemu_nbd(self, image, *more):
        socket_path = self.path("s.sock")
        return self.spawn("qemu-nbd", "-t", "-k", socket_path, "-f", "raw", "-e", "8", "--discard=unmap", *more, image,
                          socket_path=socket_path)

    def interlock(self, image):
        daemon = self.daemon("--blockdev", f"file,node-name=disk,filename={image},discard=unmap")
        daemon.nbd_server()
        daemon.export("disk")
        return daemon

    def options(self, path=None, **more):
        return {"driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": path or self.path("s.sock")},
                "discard": "unmap", **more}

    def client(self, *options, **more):
        """A daemon with the node "n" over the server, exported."""
        daemon = self.daemon(*options)
        daemon.qmp.execute("blockdev-add", self.options(**more))
        daemon.nbd_server()
        daemon.export("n")
        return daemon


class Servers(Client):
    """What is written by us is what the server's file has, whoever serves."""

    def exercise(self, daemon, image):
        with open(image, "rb") as file:
            content = bytearray(file.read())
        handle = connect(daemon.uri("n"))
        self.assertEqual(handle.get_size(), len(content))
        for number in range(scale(40, 1000)):
            offset = self.random.randrange(len(content) // 512) * 512
            length = min(self.random.choice([512, 4096, 65536, MIB]), len(content) - offset)
            kind = self.random.choice(["write", "fua", "zero", "trim", "read"])
            if kind in ("write", "fua"):
                data = self.random.randbytes(length)
                handle.pwrite(data, offset, 1 if kind == "fua" else 0)
                content[offset : offset + length] = data
            elif kind == "zero":
                handle.zero(length, offset, self.random.choice([0, 2]))  # NO_HOLE or not
                content[offset : offset + length] = bytes(length)
            elif kind == "trim":
                handle.trim(length, offset)
                content[offset : offset + length] = handle.pread(length, offset)
            self.assertEqual(bytes(handle.pread(length, offset)), bytes(content[offset : offset + length]), kind)
        handle.flush()
        self.assertEqual(bytes(handle.pread(len(content), 0)), bytes(content))
        with open(image, "rb") as file:
            self.assertEqual(file.read(), bytes(content))
        handle.shutdown()

    def test_nbdkit(self):
        image = self.image()
        self.nbdkit(image)
        self.exercise(self.client(), image)

    def test_nbdkit_limits(self):
        image = self.image()
        self.nbdkit(image, "--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-preferred=4096",
                    "blocksize-maximum=64k", "blocksize-error-policy=error")
        self.exercise(self.client(), image)

    def test_nbdkit_poor(self):
        """Without FUA, zeroing, trimming and several connections."""
        image = self.image()
        self.nbdkit(image, "--filter=nozero", "--filter=fua", "--filter=multi-conn", "multi-conn-mode=disable")
        self.exercise(self.client(), image)

    def test_qemu_nbd(self):
        image = self.image()
        self.qemu_nbd(image, "-x", "some/export")
        self.exercise(self.client(export="some/export"), image)

    def test_interlock(self):
        image = self.image()
        server = self.interlock(image)
        self.exercise(self.client(path=server.nbd_path, export="disk"), image)

    def test_several_loops(self):
        self.use_from_several_loops()

    def test_several_loops_on_one_connection(self):
        self.use_from_several_loops("--filter=multi-conn", "multi-conn-mode=disable")

    def use_from_several_loops(self, *more):
        """Exports on I/O threads of their own, and another one, use the node at once."""
        self.nbdkit(self.image(), *more)
        daemon = self.client("--object", "iothread,id=t0", "--object", "iothread,id=t1")
        for number in range(2):
            daemon.export("n", name=f"t{number}", export_id=f"t{number}", iothread=f"t{number}")
        problems = []

        def load(name, start):
            try:
                handle = connect(daemon.uri(name))
                for round_number in range(40):
                    data = os.urandom(65536)
                    offset = start + round_number % 16 * 65536
                    handle.pwrite(data, offset)
                    if bytes(handle.pread(65536, offset)) != data:
                        problems.append(f"{name}: {offset}")
                handle.shutdown()
            except Exception as problem:  # pylint: disable=broad-except
                problems.append(problem)

        threads = [threading.Thread(target=load, args=(name, at * 2 * MIB)) for at, name in enumerate(("n", "t0", "t1"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(problems, [])
        for number in range(2):
            daemon.qmp.execute("block-export-del", id=f"t{number}", mode="hard")
            daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id=f"t{number}")
            daemon.qmp.execute("object-del", id=f"t{number}")

    def test_status_and_names(self):
        """Extents, sizes and names as the peer sees them, by every way to name an export."""
        image = self.image()
        self.qemu_nbd(image, "-x", "e")
        socket_path = self.path("s.sock")
        names = [f"nbd:unix:{socket_path}:exportname=e", f"nbd+unix:///e?socket={socket_path}"]
        for name in names:
            for command in (("info",), ("map", "--output=json")):
                ours = run(harness.PROGRAM, "img", *command, name).stdout
                theirs = run("qemu-img", *command, name).stdout
                self.assertEqual(ours, theirs)
        image_options = f"driver=raw,file.driver=nbd,file.export=e,file.server.type=unix,file.server.path={socket_path}"
        self.assertIn("Images are identical", run(harness.PROGRAM, "img", "compare", "-U", "--image-opts", image_options,
                                                  f"driver=raw,file.filename={image}").stdout)
        out = run(harness.PROGRAM, "io", "-f", "raw", "-c", "write -P 7 1M 64k", "-c", "read -P 7 1M 64k", names[0]).stdout
        self.assertIn("read 65536/65536", out)

    def test_dirty_bitmap(self):
        """x-dirty-bitmap shows a bitmap as block status."""
        image = self.create_image("bitmap.qcow2", SIZE)
        qemu_img("bitmap", "--add", image, "b0")
        harness.qemu_io(image, "write 1M 64k", "write 5M 128k")
        socket_path = self.path("s.sock")
        self.spawn("qemu-nbd", "-t", "-k", socket_path, "-f", "qcow2", "-B", "b0", image, socket_path=socket_path)
        options = (f"driver=nbd,server.type=unix,server.path={socket_path},x-dirty-bitmap=")
        for context in ("qemu:dirty-bitmap:b0",):
            ours = run(harness.PROGRAM, "img", "map", "--output=json", "--image-opts", options + context).stdout
            theirs = run("qemu-img", "map", "--output=json", "--image-opts", options + context).stdout
            what = lambda text: [(extent["start"], extent["length"], extent["data"]) for extent in json.loads(text)]
            self.assertEqual(what(ours), what(theirs))
            self.assertEqual([extent["start"] for extent in json.loads(ours) if not extent["data"]], [MIB, 5 * MIB])
        failed = run(harness.PROGRAM, "img", "map", "--image-opts", options + "qemu:dirty-bitmap:none", check=False)
        self.assertIn("no metadata context", failed.stderr)

    def test_read_only(self):
        self.nbdkit(self.image(), "-r")
        daemon = self.daemon()
        self.assert_refused("read-only", daemon.qmp.execute, "blockdev-add", self.options())
        daemon.qmp.execute("blockdev-add", {**self.options(), "auto-read-only": True})
        node = daemon.qmp.execute("query-named-block-nodes")[0]
        self.assertTrue(node["ro"])


@unittest.skipUnless(shutil.which("certtool"), "needs gnutls-bin")
class WithTls(Client):
    """TLS, of both kinds, to servers that are not ours."""

    def working(self, daemon):
        handle = connect(daemon.uri("n"))
        data = os.urandom(3 * MIB)
        handle.pwrite(data, MIB)
        self.assertEqual(bytes(handle.pread(len(data), MIB)), data)
        handle.flush()
        handle.shutdown()

    def test_certificates(self):
        folder = self.certificates()
        self.spawn("nbdkit", "-f", "-U", self.path("s.sock"), "--tls=require", f"--tls-certificates={folder}",
                   "--tls-verify-peer", "file", self.image(), socket_path=self.path("s.sock"))
        daemon = self.daemon("--object", f"tls-creds-x509,id=t,endpoint=client,dir={folder}")
        add = lambda **more: daemon.qmp.execute("blockdev-add", self.options(**more))
        self.assert_refused("TLS", add)
        self.assert_refused("elsewhere|certificate", add, **{"tls-creds": "t", "tls-hostname": "elsewhere"})
        self.assert_refused("host name", add, **{"tls-creds": "t"})
        add(**{"tls-creds": "t", "tls-hostname": "localhost"})
        daemon.nbd_server()
        daemon.export("n")
        self.working(daemon)

    def test_shared_keys(self):
        folder = self.keys()
        self.qemu_nbd(self.image(), "--object", f"tls-creds-psk,id=t,endpoint=server,dir={folder}", "--tls-creds", "t")
        daemon = self.client("--object", f"tls-creds-psk,id=t,endpoint=client,dir={folder}", **{"tls-creds": "t"})
        self.working(daemon)
        self.assert_refused("in use", daemon.qmp.execute, "object-del", id="t")
        socket_path = self.path("s.sock")
        out = run(harness.PROGRAM, "img", "info", "--object", f"tls-creds-psk,id=t,endpoint=client,dir={folder}",
                  f"nbds+unix://?socket={socket_path}&tls-creds=t").stdout
        self.assertIn("virtual size: 8 MiB", out)

    def test_server_without(self):
        self.nbdkit(self.image(), "--tls=off")
        daemon = self.daemon("--object", f"tls-creds-psk,id=t,endpoint=client,dir={self.keys()}")
        self.assert_refused("does not do TLS", daemon.qmp.execute, "blockdev-add", self.options(**{"tls-creds": "t"}))


class Deaths(Client):
    """A server that is killed and comes back has everything that was acknowledged; one that does not, is an error."""

    def qemu_nbd_qcow2(self, image):
        """What it keeps of the image's metadata in its memory is gone when it is killed."""
        path = self.path("s.sock")
        return self.spawn("qemu-nbd", "-t", "-k", path, "-f", "qcow2", "-e", "8", image, socket_path=path)

    def interlock_qcow2(self, image):
        path = self.path("s.sock")
        return self.spawn(harness.PROGRAM, "nbd", "-t", "-k", path, "-f", "qcow2", "-e", "8", image, socket_path=path)

    def test_killed_and_restarted(self):
        for serve in (self.nbdkit, self.qemu_nbd_qcow2, self.interlock_qcow2):
            image = self.path(f"{serve.__name__}.img")
            qemu_img("create", "-q", "-f", "qcow2" if "qcow2" in serve.__name__ else "raw", image, str(64 * MIB))
            server = serve(image)
            daemon = self.client("--object", "iothread,id=t0", **{"reconnect-delay": 30})
            daemon.export("n", name="t", export_id="t", iothread="t0")
            self.survive(daemon, image, serve, server)
            daemon.stop()

    def survive(self, daemon, image, serve, server):
        """Two clients write, and read what was acknowledged, while the server is killed again and again."""
        stop = threading.Event()
        blocks = [{}, {}]  # number -> what it must hold
        problems = []

        def write(which, name):
            random_source = random.Random(self.seed + which)
            handle = connect(daemon.uri(name))
            try:
                while not stop.is_set():
                    batch = {}
                    cookies = []
                    for _ in range(8):
                        number = random_source.randrange(256)
                        if number in batch:
                            continue
                        batch[number] = random_source.randbytes(64) * 256
                        buffer = nbd.Buffer.from_bytearray(bytearray(batch[number]))
                        cookies.append((handle.aio_pwrite(buffer, (which * 512 + number) * 16384), buffer))
                    for cookie, _ in cookies:
                        while not handle.aio_command_completed(cookie):
                            handle.poll(-1)
                    blocks[which].update(batch)
                    if random_source.random() < 0.01:
                        handle.flush()
                    number = random_source.choice(list(blocks[which]))
                    if bytes(handle.pread(16384, (which * 512 + number) * 16384)) != blocks[which][number]:
                        problems.append(f"block {number} of {name} was lost")
                handle.shutdown()
            except Exception as problem:  # pylint: disable=broad-except
                problems.append(problem)

        threads = [threading.Thread(target=write, args=(which, name)) for which, name in enumerate(("n", "t"))]
        for thread in threads:
            thread.start()
        for _ in range(scale(2, 40)):
            time.sleep(self.random.choice([0.02, 0.15]) + self.random.random() * 0.2)  # in the replay, now and then
            server.send_signal(signal.SIGKILL)
            server.wait()
            if self.random.random() < 0.5:
                time.sleep(0.1)
            server = serve(image)
        time.sleep(0.1)
        stop.set()
        for thread in threads:
            thread.join(60)
            self.assertFalse(thread.is_alive())
        self.assertEqual(problems, [])
        self.assertGreater(min(len(which) for which in blocks), 8)
        if "qcow2" in serve.__name__:
            handle = connect(daemon.uri("n"))
            handle.flush()
            handle.shutdown()
        server.kill()
        server.wait()
        if "qcow2" in serve.__name__:
            qemu_img("convert", "-f", "qcow2", "-O", "raw", image, image + ".raw")
            image += ".raw"
        with open(image, "rb") as file:
            for which in range(2):
                for number, content in blocks[which].items():
                    file.seek((which * 512 + number) * 16384)
                    self.assertEqual(file.read(16384), content, f"{which}: {number}")

    def test_what_is_remembered_is_bounded(self):
        """Nobody flushes: so the driver does, before what it has to remember grows too long."""
        log = self.path("log")
        self.nbdkit(self.image(size=64 * MIB), "--filter=log", f"logfile={log}")
        daemon = self.client(**{"reconnect-delay": 10})
        handle = connect(daemon.uri("n"))
        flushes = []
        for number in range(22):
            handle.pwrite(bytes([number + 1]) * (2 * MIB), number * 2 * MIB)
            with open(log) as file:
                flushes.append(file.read().count(" Flush id="))
        self.assertEqual(flushes[6], 0)
        self.assertGreater(flushes[8], 0)
        self.assertGreater(flushes[21], 1)
        handle.shutdown()

    def test_delay_runs_out(self):
        image = self.image()
        server = self.nbdkit(image)
        daemon = self.client(**{"reconnect-delay": 1})
        handle = connect(daemon.uri("n"))
        handle.pread(4096, 0)
        server.kill()
        server.wait()
        start = time.monotonic()
        with self.assertRaises(nbd.Error):
            handle.pread(4096, 0)
        self.assertGreater(time.monotonic() - start, 0.8)
        start = time.monotonic()
        with self.assertRaises(nbd.Error):
            handle.pwrite(bytes(4096), 0)
        self.assertLess(time.monotonic() - start, 0.7)
        self.nbdkit(image)
        harness.nbd_served_again(handle)
        handle.shutdown()

    def test_no_delay(self):
        """Requests that were under way fail; the next ones go to the server that is there then."""
        image = self.image()
        server = self.nbdkit(image, "--filter=delay", "rdelay=300ms")
        daemon = self.client()
        handle = connect(daemon.uri("n"))
        buffer = nbd.Buffer(4096)
        handle.aio_pread(buffer, 0)
        time.sleep(0.2)
        server.kill()
        server.wait()
        while handle.aio_in_flight() and not handle.aio_peek_command_completed():
            handle.poll(-1)
        with self.assertRaises(nbd.Error):
            handle.aio_command_completed(handle.aio_peek_command_completed())
        self.nbdkit(image)
        harness.nbd_served_again(handle)
        handle.shutdown()

    def test_another_export(self):
        """A server that comes back with another disk is not written to."""
        image = self.image()
        server = self.nbdkit(image)
        daemon = self.client(**{"reconnect-delay": 1})
        server.kill()
        server.wait()
        other = self.image("other.img", SIZE // 2)
        with open(other, "rb") as file:
            before = file.read()
        self.nbdkit(other)
        handle = connect(daemon.uri("n"))
        with self.assertRaises(nbd.Error):
            handle.pwrite(b"x" * 4096, 0)
        with open(other, "rb") as file:
            self.assertEqual(file.read(), before)
        self.assertIn("had", daemon.stderr())

    def test_open_timeout(self):
        image = self.image()
        daemon = self.daemon()
        start = time.monotonic()
        self.assert_refused("s.sock", daemon.qmp.execute, "blockdev-add", self.options())
        self.assert_refused("s.sock", daemon.qmp.execute, "blockdev-add", self.options(**{"open-timeout": 1}))
        self.assertGreater(time.monotonic() - start, 0.7)
        self.launch("sh", "-c", f"sleep 0.3; exec nbdkit -f -U {self.path('s.sock')} file {image}", stderr=None)
        daemon.qmp.execute("blockdev-add", self.options(**{"open-timeout": 20}))

    def test_closed_while_away(self):
        """A node whose server has gone is removed, and the daemon ends, without waiting for it."""
        server = self.nbdkit(self.image())
        daemon = self.daemon()
        daemon.qmp.execute("blockdev-add", self.options(**{"reconnect-delay": 1000}))
        daemon.nbd_server()
        daemon.export("n")
        handle = connect(daemon.uri("n"))
        server.kill()
        server.wait()
        handle.aio_pread(nbd.Buffer(4096), 0)
        time.sleep(0.2)
        server = self.nbdkit(self.path("disk.img"))
        while handle.aio_in_flight() and not handle.aio_peek_command_completed():
            handle.poll(-1)
        server.kill()
        handle.shutdown()
        daemon.qmp.execute("block-export-del", id="export-n", mode="hard")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-n")
        daemon.qmp.execute("blockdev-del", {"node-name": "n"})


if __name__ == "__main__":
    unittest.main()
