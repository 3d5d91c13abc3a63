# SPDX-License-Identifier: LGPL-2.1-or-later
"""FUSE exports: a node as a regular file of the host, as programs see it that know nothing of it."""
import concurrent.futures
import contextlib
import ctypes
import errno
import os
import random
import subprocess
import time
import unittest

from harness import KIB, MIB, PEER, TestCase, run, scale

SIZE = 16 * MIB


def can_mount():
    return os.access("/dev/fuse", os.R_OK | os.W_OK) and os.geteuid() == 0


class FuseTestCase(TestCase):
    time_limit = 40

    def mounted(self, *options, image=None, command=None, name="disk"):
        """A daemon that exports an image over a file; (daemon, path of the file)."""
        path = self.path(f"{name}.file")
        with open(path, "wb"):
            pass
        image = image or self.create_image(f"{name}.qcow2", SIZE)
        daemon = self.daemon(
            "--blockdev", f"qcow2,node-name={name},discard=unmap,file.driver=file,file.filename={image}",
            command=command, name=f"{name}-daemon",
        )
        export = {"type": "fuse", "id": "f0", "node-name": name, "mountpoint": path, "writable": True}
        export.update(options[0] if options else {})
        daemon.qmp.execute("block-export-add", **export)
        self.addCleanup(subprocess.run, ["umount", "-l", path], stderr=subprocess.DEVNULL, check=False)
        return daemon, path


@unittest.skipUnless(can_mount(), "needs /dev/fuse and root")
class Fuse(FuseTestCase):
    builds = ("release", "asan")

    def test_what_is_written_is_read_and_is_in_the_image(self):
        daemon, path = self.mounted()
        wanted = bytearray(SIZE)
        file = os.open(path, os.O_RDWR)
        self.assertEqual(os.fstat(file).st_size, SIZE)
        for _ in range(scale(60, 1000)):
            offset = self.random.randrange(SIZE)
            data = self.random.randbytes(min(self.random.choice([1, 511, 4096, 70000, 3 * MIB]), SIZE - offset))
            self.assertEqual(os.pwrite(file, data, offset), len(data))
            wanted[offset : offset + len(data)] = data
            at = self.random.randrange(SIZE)
            self.assertEqual(os.pread(file, 100000, at), wanted[at : at + 100000])
        os.fsync(file)
        os.close(file)
        daemon.qmp.execute("block-export-del", id="f0", mode="hard")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
        daemon.stop()
        run("qemu-img", "check", "-f", "qcow2", self.path("disk.qcow2"))
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.path("disk.qcow2"), self.path("content"))
        with open(self.path("content"), "rb") as content:
            self.assertEqual(content.read(), wanted)
        self.assertEqual(os.stat(path).st_size, 0)  # what was mounted over is there again

    def test_many_at_once(self):
        _, path = self.mounted()

        def work(seed):
            chance = random.Random(seed)
            region = SIZE // 8
            with open(path, "r+b", buffering=0) as file:
                for _ in range(scale(40, 400)):
                    offset = seed * region + chance.randrange(region - 64 * KIB)
                    data = chance.randbytes(chance.randrange(1, 64 * KIB))
                    os.pwrite(file.fileno(), data, offset)
                    if os.pread(file.fileno(), len(data), offset) != data:
                        return f"{offset}+{len(data)} is not what was written"
            return None

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for problem in pool.map(work, range(8)):
                self.assertIsNone(problem)

    def facts(self, path):
        """What a program finds out about a file of this size, in order."""
        file = os.open(path, os.O_RDWR)
        found = []

        def note(function, *arguments):
            try:
                found.append(function(*arguments))
            except OSError as problem:
                found.append(errno.errorcode[problem.errno])

        os.pwrite(file, b"x" * 100000, 5 * MIB)
        for offset in (0, 5 * MIB, 5 * MIB + 200000, 6 * MIB):
            note(os.lseek, file, offset, os.SEEK_DATA)
            note(os.lseek, file, offset, os.SEEK_HOLE)
        run("fallocate", "--punch-hole", "--offset", 5 * MIB, "--length", MIB, path)
        note(os.lseek, file, 0, os.SEEK_DATA)
        note(os.pread, file, 10, 5 * MIB)
        note(os.pread, file, 100, SIZE - 10)
        note(os.pread, file, 10, SIZE)
        note(os.posix_fallocate, file, 0, SIZE)
        note(lambda: os.fstat(file).st_size)
        os.close(file)
        return found

    def test_holes_and_ends_are_the_peers(self):
        _, ours = self.mounted()
        _, peers = self.mounted(command=[PEER], name="peer")
        self.assertEqual(self.facts(ours), self.facts(peers))

    def test_a_write_behind_the_end_has_no_space(self):
        _, path = self.mounted()
        with open(path, "r+b", buffering=0) as file, self.assertRaises(OSError) as refused:
            os.pwrite(file.fileno(), b"12345", SIZE - 2)
        self.assertEqual(refused.exception.errno, errno.ENOSPC)

    def test_growable(self):
        _, path = self.mounted({"growable": True})
        with open(path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"behind", SIZE + 1000)
            self.assertEqual(os.fstat(file.fileno()).st_size, SIZE + 1024)
            self.assertEqual(os.pread(file.fileno(), 1006, SIZE), bytes(1000) + b"behind")
            os.ftruncate(file.fileno(), 2 * SIZE)
            self.assertEqual(os.fstat(file.fileno()).st_size, 2 * SIZE)
            with self.assertRaises(OSError) as refused:
                os.ftruncate(file.fileno(), SIZE)
            self.assertEqual(refused.exception.errno, errno.EBUSY)

    def test_read_only(self):
        _, path = self.mounted({"writable": False})
        with self.assertRaises(OSError) as refused:
            os.open(path, os.O_RDWR)
        self.assertEqual(refused.exception.errno, errno.EROFS)
        with open(path, "rb") as file:
            self.assertEqual(file.read(4096), bytes(4096))

    def test_somebody_elses_unmounting_ends_the_export(self):
        daemon, path = self.mounted()
        run("umount", path)
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
        self.assertEqual(daemon.qmp.execute("query-block-exports"), [])

    def test_stopping_the_nbd_server_is_not_about_it(self):
        daemon, path = self.mounted()
        address = {"type": "unix", "data": {"path": self.path("sock")}}
        daemon.qmp.execute("nbd-server-start", addr=address)
        daemon.qmp.execute("nbd-server-stop")
        self.assertEqual(os.stat(path).st_size, SIZE)
        daemon.stop()
        self.assertEqual(os.stat(path).st_size, 0)

    def test_going_with_clients_inside(self):
        daemon, path = self.mounted()
        file = os.open(path, os.O_RDWR)

        def write_until_gone():
            try:
                while True:
                    os.pwrite(file, bytes(100000), self.random.randrange(SIZE - 100000))
            except OSError as problem:
                return problem.errno

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            gone = pool.submit(write_until_gone)
            daemon.qmp.execute("block-export-del", id="f0", mode="hard")
            daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
            self.assertIn(gone.result(), (errno.ENOTCONN, errno.ECONNABORTED))
        with self.assertRaises(OSError):  # a close is a last flush
            os.close(file)

    def test_refusals(self):
        daemon, path = self.mounted()
        add = {"type": "fuse", "id": "f1", "node-name": "disk"}
        for pattern, mountpoint in (
            ("already: 'f0'", path), ("[Nn]o such file", self.path("nothing")), ("directory|regular", self.directory)
        ):
            self.assert_refused(pattern, daemon.qmp.execute, "block-export-add", **add, mountpoint=mountpoint)
        self.assert_refused("not writable", daemon.qmp.execute, "block-export-add", **add,
                            mountpoint=self.path("disk.qcow2"), growable=True)
        self.assertEqual(len(daemon.qmp.execute("query-block-exports")), 1)

    def test_a_commit_moves_it(self):
        names = self.create_chain(["base", "top"], SIZE)
        daemon, path = self.mounted(image=names[1][1])
        with open(path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"before", 0)
            daemon.qmp.execute("block-commit", **{"job-id": "j", "device": "disk"})
            daemon.qmp.wait_event("BLOCK_JOB_READY")
            os.pwrite(file.fileno(), b"while", MIB)
            daemon.qmp.execute("job-complete", id="j")
            daemon.qmp.wait_event("BLOCK_JOB_COMPLETED")
            os.pwrite(file.fileno(), b"after", 2 * MIB)
            self.assertEqual(os.pread(file.fileno(), 6, 0), b"before")
            os.fsync(file.fileno())
        daemon.stop()
        for offset, text in ((0, b"before"), (MIB, b"while"), (2 * MIB, b"after")):
            run("qemu-img", "dd", "-f", "qcow2", "-O", "raw", f"if={names[0][1]}", f"of={self.path('piece')}", "bs=512",
                f"skip={offset // 512}", f"count={offset // 512 + 1}")
            with open(self.path("piece"), "rb") as piece:
                self.assertEqual(piece.read(len(text)), text)


@unittest.skipUnless(can_mount(), "needs /dev/fuse and root")
class FuseFaults(FuseTestCase):
    """What fails below, what fails around it, and a daemon that is no more."""

    builds = ("asan",)

    def faulty(self, *errors):
        """An export over a disk whose requests fail as the rules say."""
        path = self.path("disk.file")
        for name, size in ((path, 0), (self.path("disk.raw"), SIZE)):
            with open(name, "wb") as file:
                file.truncate(size)
        daemon = self.daemon()
        daemon.qmp.execute("blockdev-add", {
            "driver": "blkdebug", "node-name": "disk", "image": {"driver": "file", "filename": self.path("disk.raw")},
            "inject-error": [{"event": "none", "once": False, **error} for error in errors]})
        daemon.qmp.execute("block-export-add", {"type": "fuse", "id": "f0", "node-name": "disk", "mountpoint": path,
                                                "writable": True})
        self.addCleanup(subprocess.run, ["umount", "-l", path], stderr=subprocess.DEVNULL, check=False)
        return daemon, path

    def fails(self, number, function, *arguments):
        with self.assertRaises(OSError) as failed:
            function(*arguments)
        self.assertEqual(failed.exception.errno, number)

    def test_errors_below(self):
        """Each is told to whoever asked, as it was, and to nobody else."""
        daemon, path = self.faulty({"iotype": "read", "errno": errno.EIO, "sector": 8},
                                   {"iotype": "write", "errno": errno.ENOSPC, "sector": 16},
                                   {"iotype": "write-zeroes", "errno": errno.EIO, "sector": 24},
                                   {"iotype": "flush", "errno": errno.EIO})
        file = os.open(path, os.O_RDWR)
        self.fails(errno.EIO, os.pread, file, 65536, 0)
        self.assertEqual(os.pread(file, 4096, 0), bytes(4096))
        self.fails(errno.ENOSPC, os.pwrite, file, bytes(65536), 0)
        self.assertEqual(os.pwrite(file, b"x" * 4096, 0), 4096)
        self.fails(errno.ENOSPC, os.pwrite, file, bytes(512), 16 * 512)
        libc = ctypes.CDLL(None, use_errno=True)
        punch = lambda offset, length: libc.fallocate(file, 3, ctypes.c_long(offset), ctypes.c_long(length))
        self.assertEqual((punch(0, 65536), ctypes.get_errno()), (-1, errno.EIO))
        self.assertEqual(punch(65536, 65536), 0)
        self.fails(errno.EIO, os.fsync, file)
        self.fails(errno.EIO, os.close, file)
        self.assertEqual(os.stat(path).st_size, SIZE)
        daemon.qmp.execute("block-export-del", id="f0", mode="hard")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")

    def test_reader_that_is_killed(self):
        """With its requests inside, of which it wants no answers any more."""
        daemon, path = self.mounted()
        for _ in range(scale(4, 40)):
            reader = subprocess.Popen(["dd", f"if={path}", "of=/dev/null", "bs=1M", "iflag=direct", "status=none"])
            time.sleep(0.002 + self.random.random() * 0.01)
            reader.kill()
            reader.wait()
        with open(path, "rb") as file:
            self.assertEqual(file.read(4096), bytes(4096))
        daemon.stop()

    def test_daemon_that_is_killed(self):
        """Its mount can be taken away, and its successor, which says what is to be done, comes in its place."""
        daemon, path = self.mounted()
        with open(path, "r+b", buffering=0) as file:
            file.write(b"stable")
            os.fsync(file.fileno())
            daemon.kill()
            with self.assertRaises(OSError) as failed:
                os.stat(path)
            # The second while the kernel still ends what is under way.
            self.assertIn(failed.exception.errno, (errno.ENOTCONN, errno.ECONNABORTED))
            with self.assertRaises(OSError):
                file.read(1)
            successor = self.daemon("--blockdev", "qcow2,node-name=disk,file.driver=file,file.filename="
                                    + self.path("disk.qcow2"))
            add = {"type": "fuse", "id": "f0", "node-name": "disk", "mountpoint": path, "writable": True}
            self.assert_refused("fusermount3 -uz", successor.qmp.execute, "block-export-add", add)
            run("fusermount3", "-uz", path)  # although somebody has it open
            successor.qmp.execute("block-export-add", add)
            with open(path, "rb") as again:
                self.assertEqual(again.read(6), b"stable")
            with self.assertRaises(OSError):
                file.read(1)
            with contextlib.suppress(OSError):
                file.close()
        successor.stop()
        self.assertEqual(os.stat(path).st_size, 0)

    def test_it_does_not_open_itself(self):
        """A daemon that did could not end, nor be killed."""
        daemon, path = self.mounted()
        os.symlink(path, self.path("link"))
        for name in (path, self.path("link")):
            self.assert_refused("[Dd]eadlock", daemon.qmp.execute, "blockdev-add",
                                {"driver": "file", "node-name": "itself", "filename": name})
        self.assert_refused("already", daemon.qmp.execute, "block-export-add",
                            {"type": "fuse", "id": "f1", "node-name": "disk", "mountpoint": self.path("link")})
        self.assertEqual(os.stat(path).st_size, SIZE)
        other = self.daemon("--blockdev", f"file,node-name=it,filename={path}")
        self.assertEqual(other.qmp.execute("query-named-block-nodes")[0]["image"]["virtual-size"], SIZE)
        other.stop()


if __name__ == "__main__":
    unittest.main()
