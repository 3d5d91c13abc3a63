# SPDX-License-Identifier: LGPL-2.1-or-later
"""`interlock nbd` in the place of qemu-nbd: the tools are content with it, it ends when it should, and its list is the
peer's."""
import os
import shutil
import signal
import socket
import time
import unittest

import harness
import tls_test
from harness import MIB, die_with_parent, qemu_img, run

try:
    import nbd
except ImportError:
    nbd = None

SIZE = 8 * MIB
PEER = ["qemu-nbd"]
OURS = [harness.PROGRAM, "nbd"]


@unittest.skipUnless(nbd and shutil.which("qemu-nbd"), "needs qemu-nbd, and libnbd's Python module")
class Tool(harness.TestCase):
    certify = tls_test.Tls.certify
    certificates = tls_test.Tls.certificates
    keys = tls_test.Tls.keys

    def setUp(self):
        super().setUp()
        self.socket_path = self.path("s.sock")

    def serve(self, *options, program=OURS, **more):
        """A server, when it listens."""
        server = self.launch(*program, "-k", self.socket_path, *options, text=True, **more)
        deadline = time.monotonic() + 15 * harness.SLOWNESS
        while not os.path.exists(self.socket_path):
            if server.poll() is not None or time.monotonic() > deadline:
                self.fail(f"it does not listen: {server.stderr.read()}")
            time.sleep(0.005)
        return server

    def uri(self, name=""):
        return f"nbd+unix:///{name}?socket={self.socket_path}"

    def connect(self, name="", **more):
        handle = nbd.NBD()
        for key, value in more.items():
            getattr(handle, key)(value)
        handle.connect_uri(self.uri(name))
        return handle

    def ended(self, server, status=0):
        self.assertEqual(server.wait(15 * harness.SLOWNESS), status, server.stderr.read())
        self.assertFalse(os.path.exists(self.socket_path))

    def image(self, name="disk.qcow2"):
        path = self.create_image(name, SIZE)
        harness.qemu_io(path, "write -P 17 0 1M", "write -P 18 5M 300k")
        return path

    # --- the tools ---

    def test_tools(self):
        image = self.image()
        server = self.serve("-t", "-e", "0", "-f", "qcow2", "--cache=writeback", "--discard=unmap", "--aio=io_uring", image)
        self.assertIn("virtual size: 8 MiB", run("qemu-img", "info", self.uri()).stdout)
        self.assertEqual(int(run("nbdinfo", "--size", self.uri()).stdout), SIZE)
        copy = self.path("copy.raw")
        run("nbdcopy", self.uri(), copy)
        with open(copy, "rb") as file:
            content = file.read()
        self.assertEqual(content[:MIB], b"\x11" * MIB)
        self.assertEqual(content[5 * MIB : 5 * MIB + 300 * 1024], b"\x12" * (300 * 1024))
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", copy, self.uri())
        other = self.path("other.raw")
        with open(other, "wb") as file:
            file.write(self.random.randbytes(SIZE))
        run("nbdcopy", other, self.uri())
        server.send_signal(signal.SIGTERM)
        self.ended(server)
        self.assertIn("Images are identical", qemu_img("compare", "-f", "qcow2", "-F", "raw", image, other))
        harness.image_check(image)

    def test_list(self):
        image = self.image()
        qemu_img("bitmap", "--add", image, "b0")
        options = ["-x", "an export", "-D", "what it is", "-f", "qcow2", "-A", "-B", "b0", "-t", image]
        for program in (PEER, OURS):
            server = self.serve(*options, program=program)
            theirs = run("qemu-nbd", "-L", "-k", self.socket_path).stdout
            ours = run(*OURS, "-L", "-k", self.socket_path).stdout
            # Theirs speaks extended headers, libnbd 1.14 does not: what depends on that is left out of both.
            drop = lambda text: [line.replace("block-status-payload ", "").replace("0x1", "0x") for line in text.splitlines()
                                 if "transaction size" not in line]
            self.assertEqual(drop(ours), drop(theirs))
            self.assertIn("qemu:dirty-bitmap:b0", ours)
            self.assertIn("description: what it is", ours)
            self.assertIsNone(server.poll())  # who only looks is no client
            server.terminate()
            self.ended(server)
        failed = run(*OURS, "-L", "-k", self.path("nothing"), check=False)
        self.assertEqual(failed.returncode, 1)
        self.assertIn("No such file", failed.stderr)

    # --- its life ---

    def test_ends_with_its_last_client(self):
        image = self.image()
        server = self.serve("-e", "2", "-f", "qcow2", image)
        first, second = self.connect(), self.connect()
        self.assertTrue(first.can_multi_conn())
        first.pwrite(b"x" * 4096, 0)
        first.shutdown()
        time.sleep(0.1)
        self.assertEqual(bytes(second.pread(4096, 0)), b"x" * 4096)
        second.shutdown()
        self.ended(server)
        server = self.serve("-f", "qcow2", "-r", image)
        only = self.connect()
        self.assertFalse(only.can_multi_conn())
        self.assertTrue(only.is_read_only())
        only.shutdown()
        self.ended(server)

    def test_shared(self):
        """One client at a time: the next one waits until the first has gone."""
        self.serve("-t", "-f", "qcow2", self.image())
        first = self.connect()
        second = nbd.NBD()
        second.aio_connect_uri(self.uri())
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            second.poll(50)
        self.assertFalse(second.aio_is_ready())
        first.shutdown()
        deadline = time.monotonic() + 10 * harness.SLOWNESS
        while not second.aio_is_ready() and time.monotonic() < deadline:
            second.poll(1000)
        self.assertEqual(bytes(second.pread(512, 0)), b"\x11" * 512)
        second.shutdown()

    def test_fork(self):
        image, pidfile = self.image(), self.path("pid")
        run(*OURS, "--fork", f"--pid-file={pidfile}", "-k", self.socket_path, "-f", "qcow2", image)
        with open(pidfile) as file:
            number = int(file.read())
        handle = self.connect()
        self.assertEqual(bytes(handle.pread(512, 0)), b"\x11" * 512)
        handle.shutdown()
        deadline = time.monotonic() + 15 * harness.SLOWNESS
        while os.path.exists(f"/proc/{number}") and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertFalse(os.path.exists(self.socket_path))
        failed = run(*OURS, "--fork", "-k", self.socket_path, "-f", "qcow2", self.path("nothing"), check=False)
        self.assertEqual(failed.returncode, 1)
        self.assertIn("No such file", failed.stderr)

    def test_passed_socket(self):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.socket_path)
        listener.listen(8)

        def pass_it():
            die_with_parent()
            os.dup2(listener.fileno(), 3)
            os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")

        server = self.launch(*OURS, "-f", "qcow2", self.image(), pass_fds=(3,), text=True, preexec_fn=pass_it)
        listener.close()
        handle = self.connect()
        self.assertEqual(bytes(handle.pread(512, 0)), b"\x11" * 512)
        handle.shutdown()
        self.assertEqual(server.wait(15 * harness.SLOWNESS), 0)

    # --- what is served ---

    def test_views(self):
        image = self.image()
        qemu_img("snapshot", "-c", "before", image)
        harness.qemu_io(image, "write -P 99 0 64k")
        with open(image, "rb") as file:
            stored = file.read()
        for options, first, writable in ((["-l", "before"], 17, False), (["-l", "snapshot.name=before"], 17, False),
                                         (["-s"], 99, True), (["-o", str(5 * MIB)], 18, True), (["-r"], 99, False)):
            server = self.serve("-f", "qcow2", *options, image)
            handle = self.connect()
            self.assertEqual(bytes(handle.pread(512, 0)), bytes([first]) * 512, options)
            self.assertEqual(handle.is_read_only(), not writable)
            self.assertEqual(handle.get_size(), SIZE - (5 * MIB if "-o" in options else 0))
            if "-s" in options:
                handle.pwrite(b"gone" * 128, 0)
                self.assertEqual(bytes(handle.pread(512, 0)), b"gone" * 128)
                handle.flush()
            handle.shutdown()
            self.ended(server)
        with open(image, "rb") as file:
            self.assertEqual(file.read(), stored)

    @unittest.skipUnless(shutil.which("certtool"), "needs gnutls-bin")
    def test_tls(self):
        folder, keys = self.certificates(), self.keys()
        image = self.image()
        cases = [(f"tls-creds-x509,id=t,endpoint=server,dir={folder}", f"tls-creds-x509,id=t,endpoint=client,dir={folder}",
                  ["--tls-hostname=localhost"]),
                 (f"tls-creds-psk,id=t,endpoint=server,dir={keys}", f"tls-creds-psk,id=t,endpoint=client,dir={keys}", [])]
        for server_object, client_object, host in cases:
            server = self.serve("-t", "-f", "qcow2", "--object", server_object, "--tls-creds", "t", image)
            for program in (PEER, OURS):
                out = run(*program, "-L", "-k", self.socket_path, "--object", client_object, "--tls-creds=t", *host).stdout
                self.assertIn("size:  8388608", out)
                failed = run(*program, "-L", "-k", self.socket_path, check=False)
                self.assertEqual(failed.returncode, 1)
            server.terminate()
            self.ended(server)

    # --- the command line ---

    def test_refusals(self):
        image = self.image()
        for words in (["-f", "qcow2"], ["-f", "qcow2", image, image], ["-e", "x", "-f", "qcow2", image],
                      ["-e", "-1", "-f", "qcow2", image], ["-p", "99999", "-f", "qcow2", image],
                      ["-o", "x", "-f", "qcow2", image], ["-o", str(SIZE + 1), "-k", self.socket_path, "-f", "qcow2", image],
                      ["--cache=much", "-f", "qcow2", image], ["--discard=all", "-f", "qcow2", image],
                      ["--aio=fast", "-f", "qcow2", image], ["--detect-zeroes=no", "-f", "qcow2", image],
                      ["-f", "nonsense", image], ["--image-opts", "-f", "qcow2", image],
                      ["-k", self.socket_path, "-f", "qcow2", "-B", "none", image],
                      ["-k", self.socket_path, "-f", "qcow2", "-l", "none", image],
                      ["-k", self.socket_path, "-f", "qcow2", "--tls-creds=none", image],
                      ["--tls-hostname=x", "-f", "qcow2", image], ["--tls-authz=x", "-f", "qcow2", image],
                      ["-L", image], ["-L", "-f", "raw"], ["-L", "-x", "e"], ["--no-such-option"],
                      ["-k", self.socket_path, "-p", "1", "-f", "qcow2", image]):
            failed = run(*OURS, *words, check=False)
            self.assertEqual(failed.returncode, 1, words)
            self.assertTrue(failed.stderr.startswith("interlock nbd: "), words)
        for words in (["-c", "/dev/nbd0", image], ["-d", "/dev/nbd0"], ["-T", "x", image], ["--selinux-label=x", image]):
            self.assertIn("not supported", run(*OURS, *words, check=False).stderr)
        unguessed = run(*OURS, "-k", self.socket_path, image, check=False)
        self.assertIn("-f FORMAT", unguessed.stderr)

    def test_personality(self):
        """Called by that name it goes by it."""
        link = self.path("qemu-nbd")
        os.symlink(harness.PROGRAM, link)
        self.assertRegex(run(link, "--version").stdout, r"^qemu-nbd 10\.0\.2")
        ours, theirs = run(link, "--help").stdout, run("qemu-nbd", "--help").stdout
        for word in theirs.replace("=", " ").replace(",", " ").split():
            if word.startswith("--") and word not in ("--trace", "--selinux-label", "--connect", "--disconnect"):
                self.assertIn(word, ours)
        self.assertTrue(run(link, check=False).stderr.startswith("qemu-nbd: "))


if __name__ == "__main__":
    unittest.main()
