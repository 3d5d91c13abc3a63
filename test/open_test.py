# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opening and closing nodes: names, backing chains by name and by header, read-only, image locks between processes,
windows, holes, direct I/O. What the daemon and the peer have in common is compared with the peer where that is possible."""
import os
import shutil
import tempfile
import unittest

import nbd

from harness import DAEMON, IS_PEER, KIB, MIB, Daemon, PEER, QmpError, TestCase, qemu_img, qemu_io, run


def nodes_of(daemon):
    return {info["node-name"]: info for info in daemon.qmp.execute("query-named-block-nodes")}


class Opening(TestCase):
    builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        self.daemon = Daemon(self.directory)
        self.daemons.append(self.daemon)

    def path(self, name):
        return os.path.join(self.directory, name)

    def image(self, name, backing=None, image_format="qcow2", size="1M"):
        line = ["create", "-q", "-f", "qcow2"]
        if backing:
            line += ["-u", "-b", backing]
            if image_format:
                line += ["-F", image_format]
        qemu_img(*line, self.path(name), size)
        return self.path(name)

    def rewrite_backing(self, name, old, new):
        """Puts another string of the same length into the header, which the peer would not write."""
        self.assertEqual(len(old), len(new))
        with open(self.path(name), "r+b") as image:
            content = image.read(64 * KIB)
            image.seek(content.index(old.encode(), 512 if old.encode() not in content[:512] else 0))
            image.write(new.encode())

    def remove_format(self, name):
        """Turns the header extension with the backing format into one that nobody knows."""
        with open(self.path(name), "r+b") as image:
            content = image.read(4096)
            image.seek(content.index(bytes.fromhex("e2792aca")))
            image.write(bytes.fromhex("11223344"))

    def add(self, name, file, **more):
        return self.daemon.qmp.execute(
            "blockdev-add", {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": file}, **more}
        )

    def refused(self, pattern, call, *arguments, **more):
        with self.assertRaisesRegex(QmpError, pattern):
            call(*arguments, **more)
        self.assertEqual(nodes_of(self.daemon), self.before, "a refused command left nodes behind")

    def test_names(self):
        file = self.image("a")
        self.before = {}
        for name in ("", "1a", "-a", "#a", "a b", "a/b", "ä", "a" * 32):
            self.refused("ode-name", self.add, name, file)
        self.add("a" * 31, file, **{"read-only": True})
        self.add("b-._9", file, **{"read-only": True})
        self.before = nodes_of(self.daemon)
        self.assertEqual(len(self.before), 4)
        self.refused("Duplicate", self.add, "b-._9", file, **{"read-only": True})
        inner = {"driver": "file", "node-name": "c", "filename": file}
        arguments = {"driver": "qcow2", "node-name": "c", "file": inner, "read-only": True}
        self.refused("Duplicate", self.daemon.qmp.execute, "blockdev-add", arguments)
        self.refused("node-name", self.daemon.qmp.execute, "blockdev-add", {"driver": "null-co"})

    def test_chain_by_header(self):
        self.image("base.raw")
        run("truncate", "-s", "1M", self.path("base.raw"))
        self.image("mid", "base.raw", "raw")
        self.image("top", "file:mid", "qcow2")
        self.add("top", self.path("top"))
        nodes = nodes_of(self.daemon)
        self.assertEqual(len(nodes), 6)
        self.assertEqual([node["ro"] for node in nodes.values()].count(False), 2)
        self.assertEqual(nodes["top"]["backing_file_depth"], 2)
        self.assertEqual(nodes["top"]["image"]["backing-filename"], "file:mid")
        self.assertEqual(nodes["top"]["image"]["full-backing-filename"], self.path("mid"))
        self.assertEqual(nodes["top"]["image"]["backing-image"]["backing-image"]["format"], "raw")
        self.before = nodes
        for name in nodes:
            if name != "top":
                self.refused("not owned by the monitor", self.daemon.qmp.execute, "blockdev-del", {"node-name": name})
        self.daemon.qmp.execute("blockdev-del", {"node-name": "top"})
        self.assertEqual(nodes_of(self.daemon), {})

    def test_backing_by_option(self):
        self.image("base")
        top = self.image("top", "no-such-file", "qcow2")
        self.add("base", self.path("base"))
        self.add("none", top, backing=None, **{"read-only": True})
        self.add("named", top, backing="base", **{"read-only": True})
        inline = {"driver": "qcow2", "file": {"driver": "file", "filename": self.path("base"), "locking": "off"}}
        self.add("inline", top, backing=inline, **{"read-only": True})
        nodes = nodes_of(self.daemon)
        self.assertEqual([nodes[name]["backing_file_depth"] for name in ("none", "named", "inline")], [0, 1, 1])
        self.before = nodes
        self.refused("in use by node 'named'", self.daemon.qmp.execute, "blockdev-del", {"node-name": "base"})
        self.refused("no-such-file", self.add, "header", top, **{"read-only": True})
        self.refused("Cannot find node 'nobody'", self.add, "wrong", top, backing="nobody", **{"read-only": True})
        self.daemon.qmp.execute("blockdev-del", {"node-name": "named"})
        self.daemon.qmp.execute("blockdev-del", {"node-name": "base"})

    def test_bad_backing_strings(self):
        self.before = {}
        self.image("x")
        for string in ("nbd://localhost/x", "json:{}aaaaaaaaaaaaa", "https://host/image", "ssh://host/path/im"):
            self.image("top", "y" * len(string))
            self.rewrite_backing("top", "y" * len(string), string)
            self.refused(string.split(":")[0], self.add, "top", self.path("top"))
        self.image("top", "x", "qcow2")
        self.remove_format("top")
        self.refused("without its format", self.add, "top", self.path("top"))
        self.image("top", "x" * 6, "qcow2")
        os.mkdir(self.path("x" * 6))
        self.refused("directory", self.add, "top", self.path("top"))
        self.refused("regular file|device", self.add, "top", "/dev/null")
        self.refused("No such file", self.add, "top", self.path("missing"))
        self.refused("", self.add, "top", "")

    def test_loops_and_depth(self):
        self.before = {}
        self.image("a", "b")
        self.image("b", "a")
        self.image("self", "self")
        self.refused("leads back", self.add, "top", self.path("a"))
        self.refused("leads back", self.add, "top", self.path("self"))
        os.symlink("self", self.path("link"))
        self.image("self", "link")
        self.refused("leads back", self.add, "top", self.path("self"))
        self.image("0", size="64k")
        for index in range(1, 202):
            self.image(str(index), str(index - 1), size="64k")
        qemu_io(self.path("0"), "write -P 7 0 64k")
        self.refused("200", self.add, "top", self.path("200"))
        self.add("top", self.path("199"))
        self.daemon.nbd_server()
        self.daemon.export("top")
        handle = nbd.NBD()
        handle.connect_uri(self.daemon.uri("top"))
        self.assertEqual(handle.pread(64 * KIB, 0), b"\7" * 64 * KIB)
        handle.pwrite(b"\5" * 512, 1024)
        self.assertEqual(handle.pread(2048, 0), b"\7" * 1024 + b"\5" * 512 + b"\7" * 512)
        handle.shutdown()
        self.daemon.qmp.execute("block-export-del", {"id": "export-top"})

    def test_read_only(self):
        self.image("a")
        self.add("a", self.path("a"), **{"read-only": True})
        self.daemon.nbd_server()
        with self.assertRaisesRegex(QmpError, "read-only"):
            self.daemon.export("a", writable=True)
        self.daemon.export("a", writable=False)
        raw = {"driver": "file", "node-name": "f", "filename": self.path("a"), "read-only": True}
        self.daemon.qmp.execute("blockdev-add", raw)
        self.before = nodes_of(self.daemon)
        over = {"driver": "raw", "node-name": "r", "file": "f"}
        self.refused("read-only", self.daemon.qmp.execute, "blockdev-add", over)
        self.daemon.qmp.execute("blockdev-add", {**over, "auto-read-only": True})
        self.assertTrue(nodes_of(self.daemon)["r"]["ro"])

    def test_raw_window(self):
        with open(self.path("data"), "wb") as data:
            data.write(b"".join(bytes([index]) * 512 for index in range(8)) + b"tail")
        self.before = {}

        def window(name, **more):
            file = {"driver": "file", "filename": self.path("data")}
            arguments = {"driver": "raw", "node-name": name, "file": file, "read-only": True, **more}
            self.daemon.qmp.execute("blockdev-add", arguments)

        self.refused("multiples of 512", window, "r", offset=100)
        self.refused("multiples of 512", window, "r", size=100)
        self.refused("behind the end", window, "r", offset=1 << 20)
        self.refused("beyond the end", window, "r", offset=512, size=4096)
        self.refused("", window, "r", offset=(1 << 63) - 512, size=1 << 62)
        self.daemon.nbd_server()
        window("r", offset=1024, size=1024)
        window("all")
        for name in ("r", "all"):
            self.daemon.export(name, writable=False)
        handle = nbd.NBD()
        handle.connect_uri(self.daemon.uri("r"))
        self.assertEqual(handle.pread(handle.get_size(), 0), b"\2" * 512 + b"\3" * 512)
        handle = nbd.NBD()
        handle.connect_uri(self.daemon.uri("all"))
        self.assertEqual(handle.get_size(), 9 * 512)
        self.assertEqual(handle.pread(512, 8 * 512), b"tail" + bytes(508))

    def test_discard_and_zeroes_free_space(self):
        run("truncate", "-s", "8M", self.path("data"))
        self.daemon.nbd_server()
        for name, options in (("keep", {}), ("free", {"discard": "unmap", "detect-zeroes": "unmap"})):
            file = {"driver": "file", "filename": self.path("data")}
            self.daemon.qmp.execute("blockdev-add", {"driver": "raw", "node-name": name, "file": file, **options})
            self.daemon.export(name)
            handle = nbd.NBD()
            handle.connect_uri(self.daemon.uri(name))

            def used():
                return os.stat(self.path("data")).st_blocks * 512 // MIB

            handle.pwrite(b"x" * 8 * MIB, 0)
            self.assertEqual(used(), 8)
            handle.trim(4 * MIB, 0)
            self.assertEqual(used(), 8 if name == "keep" else 4)
            handle.pwrite(bytes(MIB), 4 * MIB)
            self.assertEqual(used(), 8 if name == "keep" else 3)
            self.assertEqual(handle.pread(MIB, 4 * MIB), bytes(MIB))
            handle.zero(MIB, 5 * MIB)
            self.assertEqual(handle.pread(MIB, 5 * MIB), bytes(MIB))
            self.assertEqual(used(), 8 if name == "keep" else 2)
            handle.shutdown()
            self.daemon.qmp.execute("block-export-del", {"id": f"export-{name}"})
            self.daemon.qmp.execute("blockdev-del", {"node-name": name})

    def test_direct_io_takes_any_offset(self):
        folder = tempfile.mkdtemp(prefix="il-direct-", dir="/var/tmp")
        self.addCleanup(run, "rm", "-rf", folder)
        path = os.path.join(folder, "data")
        size = 256 * KIB + 100
        model = bytearray(self.random.randbytes(size))
        with open(path, "wb") as data:
            data.write(model)
        file = {"driver": "file", "filename": path}
        try:
            self.daemon.qmp.execute(
                "blockdev-add", {"driver": "raw", "node-name": "r", "file": file, "cache": {"direct": True}}
            )
        except QmpError as error:
            raise unittest.SkipTest(f"no direct I/O in {folder}") from error
        self.daemon.nbd_server()
        self.daemon.export("r")
        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.connect_uri(self.daemon.uri("r"))
        for _ in range(300):
            offset = self.random.randrange(size)
            length = min(size - offset, self.random.choice((1, 511, 512, 4096, self.random.randrange(1, 20000))))
            kind = self.random.choice("rrwwz")
            if kind == "r":
                self.assertEqual(handle.pread(length, offset), bytes(model[offset : offset + length]))
            elif kind == "w":
                data = self.random.randbytes(length)
                handle.pwrite(data, offset)
                model[offset : offset + length] = data
            else:
                handle.zero(length, offset)
                model[offset : offset + length] = bytes(length)
        handle.flush()
        handle.shutdown()
        self.daemon.qmp.execute("block-export-del", {"id": "export-r"})
        self.daemon.qmp.execute("blockdev-del", {"node-name": "r"})
        with open(path, "rb") as data:
            self.assertEqual(data.read(), bytes(model))


class Sync(TestCase):
    """The kernel reports a page that it could not write once, and may drop it: no later flush succeeds."""

    builds = ("release",)

    def test_a_failed_flush_is_not_forgotten(self):
        if not shutil.which("strace"):
            raise unittest.SkipTest("strace is not installed")
        folder = tempfile.mkdtemp(prefix="il-sync-", dir="/var/tmp")  # in memory there is nothing to sync
        self.addCleanup(run, "rm", "-rf", folder)
        path = os.path.join(folder, "data")
        run("truncate", "-s", "1M", path)
        inject = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=fdatasync:error=EIO:when=1"]
        daemon = self.daemon("--engine", "epoll", command=[*inject, *DAEMON])
        daemon.add_file("f", path)
        daemon.nbd_server()
        daemon.export("f")
        handle = nbd.NBD()
        handle.connect_uri(daemon.uri("f"))
        handle.pwrite(b"x" * 4096, 0)
        for _ in range(20):  # each thread has a first fdatasync of its own, and one that would succeed
            with self.assertRaises(nbd.Error) as caught:
                handle.flush()
            self.assertEqual(caught.exception.errno, "EIO")
        self.assertEqual(handle.pread(4096, 0), b"x" * 4096)
        handle.shutdown()


class Locks(TestCase):
    """Who may open an image that another process has open: ours and the peer's daemon, each against the peer's tools."""

    def setUp(self):
        super().setUp()
        self.image = os.path.join(self.directory, "image")
        qemu_img("create", "-q", "-f", "qcow2", self.image, "1M")

    def holder(self, command=None, **options):
        daemon = Daemon(self.directory, command=command, name=f"d{len(self.daemons)}")
        self.daemons.append(daemon)
        daemon.qmp.execute(
            "blockdev-add",
            {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": self.image}, **options},
        )
        return daemon

    def test_the_peers_tools_against_our_daemon(self):
        if IS_PEER:
            raise unittest.SkipTest("compares with the peer")
        info = ["qemu-img", "info", self.image]
        write = ["qemu-io", "-f", "qcow2", "-c", "write 0 4k", self.image]
        read = ["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 4k", self.image]
        for read_only in (False, True):
            verdicts = []
            for command in (None, [PEER]):
                daemon = self.holder(command, **{"read-only": read_only})
                verdicts.append([run(*line, check=False).returncode == 0 for line in (info, write, read, [*info, "-U"])])
                daemon.stop()
            self.assertEqual(verdicts[0], verdicts[1], f"read-only: {read_only}")
            self.assertEqual(verdicts[0], [read_only, False, read_only, True])

    def test_our_daemon_against_the_peers(self):
        if IS_PEER:
            raise unittest.SkipTest("compares with the peer")
        for theirs in (False, True):
            peer = self.holder([PEER], **{"read-only": theirs})
            for ours in (False, True):
                if theirs and ours:
                    self.holder(**{"read-only": True})
                    continue
                with self.assertRaisesRegex(QmpError, 'Failed to get (shared )?"(write|consistent read)" lock') as caught:
                    self.holder(**{"read-only": ours})
                self.assertIn(self.image, str(caught.exception))
            self.holder(**{"read-only": True, "force-share": True})
            peer.stop()
            for daemon in self.daemons:
                daemon.stop()

    def test_two_nodes_of_one_daemon(self):
        daemon = self.holder()
        file = {"driver": "file", "filename": self.image}
        for read_only in (False, True):
            with self.assertRaisesRegex(QmpError, "lock"):
                daemon.qmp.execute(
                    "blockdev-add", {"driver": "qcow2", "node-name": "m", "file": file, "read-only": read_only}
                )
        file["locking"] = "off"
        daemon.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "m", "file": file, "read-only": True})

    def test_locks_follow_a_commit(self):
        """The base is locked for writing while a commit writes to it, and no longer."""
        top = os.path.join(self.directory, "top")
        qemu_img("create", "-q", "-f", "qcow2", "-b", self.image, "-F", "qcow2", top)
        qemu_io(top, "write -P 1 0 1M")
        daemon = Daemon(self.directory)
        self.daemons.append(daemon)
        daemon.qmp.execute(
            "blockdev-add", {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": top}}
        )

        def may_read():
            return run("qemu-img", "info", self.image, check=False).returncode == 0

        self.assertTrue(may_read())
        daemon.qmp.execute("block-commit", {"device": "n", "job-id": "j", "speed": 65536})
        self.assertFalse(may_read())
        daemon.qmp.execute("block-job-cancel", {"device": "j", "force": True})
        daemon.qmp.wait_event("BLOCK_JOB_CANCELLED", device="j")
        daemon.qmp.wait_jobs([])
        self.assertTrue(may_read())
