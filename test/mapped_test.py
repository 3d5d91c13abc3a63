# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files in tmpfs that are read and written through mappings (mapped=on): every byte arrives, whatever else happens to the file."""
import contextlib
import os
import random
import tempfile
import threading
import time

from harness import IS_PEER, KIB, MIB, TestCase, image_check, nbd_handle

SIZE = 24 * MIB


class Mapped(TestCase):
    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the peer has no such option")
        if not self.path("x").startswith("/dev/shm"):
            self.skipTest("the tests' directory is not in tmpfs")

    def make(self, name, image_format):
        if image_format == "qcow2":
            return self.create_image(name, SIZE)
        with open(self.path(name), "wb") as file:
            file.truncate(SIZE)
        return self.path(name)

    def serve(self, path, image_format, *options):
        daemon = self.daemon(*options)
        daemon.add_file("file", path, mapped=True, discard="unmap")
        daemon.qmp.execute(
            "blockdev-add", {"driver": image_format, "node-name": "disk", "file": "file", "discard": "unmap"}
        )
        daemon.nbd_server()
        daemon.export("disk", **({"iothread": ["t0", "t1"]} if options else {}))
        return daemon

    def request(self, chance, handle, content):
        """One at random; `content` is what the disk is to show."""
        length = min(chance.choice([1, 512, 4 * KIB, 64 * KIB, 300 * KIB, 2 * MIB]), len(content))
        offset = chance.randrange(len(content) - length + 1)
        what = chance.choice(["write", "write", "write", "read", "read", "zero", "trim"])
        if what == "write":
            content[offset : offset + length] = data = chance.randbytes(length)
            handle.pwrite(data, offset)
        elif what == "read":
            self.assertEqual(bytes(handle.pread(length, offset)), content[offset : offset + length], (offset, length))
        elif what == "zero":
            content[offset : offset + length] = bytes(length)
            handle.zero(length, offset)
        else:  # what is there then is not said
            handle.trim(length, offset)
            content[offset : offset + length] = bytes(handle.pread(length, offset))

    def resize(self, chance, daemon, content):
        size = chance.randrange(1, 3 * SIZE // MIB) * MIB
        daemon.qmp.execute("block-export-del", id="export-disk")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-disk")
        daemon.qmp.execute("block_resize", {"node-name": "disk", "size": size})
        daemon.export("disk")
        del content[size:]
        content.extend(bytes(size - len(content)))

    def test_random_requests(self):
        for image_format in ("raw", "qcow2"):
            with self.subTest(format=image_format):
                chance = random.Random(self.seed)
                path = self.make("disk." + image_format, image_format)
                daemon = self.serve(path, image_format)
                content = bytearray(SIZE)
                for _ in range(20):
                    with nbd_handle(daemon.uri("disk")) as handle:
                        for _ in range(30):
                            self.request(chance, handle, content)
                    self.resize(chance, daemon, content)
                with nbd_handle(daemon.uri("disk")) as handle:
                    self.assertEqual(bytes(handle.pread(min(len(content), 16 * MIB), 0)), content[: 16 * MIB])
                daemon.stop()
                if image_format == "qcow2":
                    image_check(path)
                else:
                    with open(path, "rb") as file:
                        self.assertEqual(file.read(), content)

    def test_reading_fills_no_hole(self):
        path = self.make("disk.raw", "raw")
        daemon = self.serve(path, "raw")

        def allocated():
            return os.stat(path).st_blocks * 512

        with nbd_handle(daemon.uri("disk")) as handle:
            handle.pwrite(b"a" * MIB, MIB)
            for trims in (False, True):
                for _ in range(2):
                    for offset in range(0, 3 * MIB, 4 * KIB):
                        data = bytes(handle.pread(4 * KIB, offset))
                        self.assertEqual(data, (b"a" if MIB <= offset < 2 * MIB and not trims else b"\0") * (4 * KIB))
                self.assertEqual(allocated(), 0 if trims else MIB)
                if not trims:
                    handle.trim(MIB, MIB)
        daemon.stop()

    def test_a_job_moves_what_was_written(self):
        path = self.create_image("disk.qcow2", SIZE)
        daemon = self.serve(path, "qcow2")
        target = self.create_image("target.qcow2", SIZE)
        daemon.add_file("target-file", target, mapped=True)
        daemon.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "target", "file": "target-file"})
        content = bytearray(random.Random(self.seed).randbytes(SIZE))
        with nbd_handle(daemon.uri("disk")) as handle:
            for offset in range(0, SIZE, MIB):
                handle.pwrite(content[offset : offset + MIB], offset)
            daemon.qmp.execute("blockdev-mirror", {"job-id": "j", "device": "disk", "target": "target", "sync": "full"})
            content[5000:9096] = b"x" * 4096
            handle.pwrite(b"x" * 4096, 5000)
            daemon.qmp.wait_event("BLOCK_JOB_READY")
            daemon.qmp.execute("job-complete", id="j")
            self.assertIsNone(daemon.qmp.wait_job("j"))
            handle.pwrite(b"y" * 4096, 0)
            content[:4096] = b"y" * 4096
        daemon.stop()
        image_check(target)
        daemon = self.serve(target, "qcow2")
        with nbd_handle(daemon.uri("disk")) as handle:
            self.assertEqual(bytes(handle.pread(SIZE, 0)), content)

    def test_somebody_else_cuts_the_file(self):
        """Who does that loses what was there, but what is written from then on is written; nobody crashes."""
        path = self.make("disk.raw", "raw")
        daemon = self.serve(path, "raw")
        with nbd_handle(daemon.uri("disk")) as handle:
            for offset in range(0, SIZE, MIB):
                handle.pwrite(b"a" * MIB, offset)
            os.truncate(path, 0)
            for offset in range(0, SIZE, 2 * MIB):
                handle.pwrite(b"b" * 4096, offset)
                self.assertEqual(bytes(handle.pread(8192, offset)), b"b" * 4096 + bytes(4096))
        daemon.stop()
        with open(path, "rb") as file:
            self.assertEqual(file.read(2 * MIB), b"b" * 4096 + bytes(2 * MIB - 4096))

    def read_late(self, daemon, content, requests, **how):
        """Asks for all of it, and begins to receive when the server can send no more for a while: so replies go in parts."""
        import nbd  # pylint: disable=import-outside-toplevel

        with nbd_handle(daemon.uri("disk"), **how) as handle:
            buffers, errors = [], []
            for offset, length in requests:
                buffers.append((nbd.Buffer(length), offset, length))
                handle.aio_pread(buffers[-1][0], offset, completion=lambda error: errors.append(error.value) or 1)
            time.sleep(0.1)
            while handle.aio_in_flight():
                handle.poll(-1)
            self.assertEqual(errors, [0] * len(requests))
            for buffer, offset, length in buffers:
                self.assertEqual(bytes(buffer.to_bytearray()), content[offset : offset + length], (offset, length))

    def test_replies_that_go_in_parts(self):
        for image_format in ("raw", "qcow2"):
            chance = random.Random(self.seed)
            path = self.make("parts." + image_format, image_format)
            daemon = self.serve(path, image_format)
            content = bytearray(chance.randbytes(SIZE))
            content[5 * MIB + 70 * KIB : 6 * MIB + 10 * KIB] = bytes(964 * KIB)  # a hole that short reads go over
            content[9 * MIB : 9 * MIB + 100 * KIB] = bytes(100 * KIB)  # zeroes that are data
            with nbd_handle(daemon.uri("disk")) as handle:
                for offset in range(0, SIZE, 64 * KIB):
                    handle.pwrite(content[offset : offset + 64 * KIB], offset)
                handle.zero(960 * KIB, 5 * MIB + 72 * KIB)
            for structured in (True, False):
                for round_number in range(6):
                    with self.subTest(format=image_format, structured=structured, round=round_number):
                        requests = []
                        while sum(length for _, length in requests) < 40 * MIB:
                            length = chance.choice([512, 4 * KIB, 64 * KIB, 100 * KIB, 256 * KIB, MIB, MIB + 4 * KIB])
                            requests.append((chance.randrange((SIZE - length) // 512 + 1) * 512, length))
                        self.read_late(daemon, content, requests, set_request_structured_replies=structured)
            daemon.stop()

    def test_reading_beside_somebody_who_punches(self):
        """On another thread: each byte is as it was written, or zero."""
        for image_format in ("raw", "qcow2"):
            with self.subTest(format=image_format):
                path = self.make("punched." + image_format, image_format)
                daemon = self.serve(path, image_format, "--object", "iothread,id=t0", "--object", "iothread,id=t1")
                chance, until = random.Random(self.seed), time.monotonic() + 1
                pages = [bytes([number % 255 + 1]) * (4 * KIB) for number in range(MIB // (4 * KIB))]
                faults = []

                def punch(uri, chance, until):
                    with nbd_handle(uri) as handle:
                        while time.monotonic() < until:
                            page = chance.randrange(len(pages) - 64)
                            handle.pwrite(b"".join(pages[page : page + 64]), page * 4 * KIB)
                            handle.trim(chance.randrange(1, 64) * 4 * KIB, page * 4 * KIB)

                puncher = threading.Thread(target=punch, args=(daemon.uri("disk"), random.Random(self.seed), until))
                puncher.start()
                with nbd_handle(daemon.uri("disk")) as handle:
                    while time.monotonic() < until:
                        count = chance.choice([1, 16, 64, 128])
                        first = chance.randrange(len(pages) - count + 1)
                        data = bytes(handle.pread(count * 4 * KIB, first * 4 * KIB))
                        for number in range(count):
                            seen = set(data[number * 4 * KIB : (number + 1) * 4 * KIB])
                            if not seen <= {0, pages[first + number][0]}:
                                faults.append((first + number, seen))
                puncher.join()
                self.assertEqual(faults, [])
                with nbd_handle(daemon.uri("disk")) as handle:
                    handle.trim(SIZE, 0)
                    self.assertEqual(bytes(handle.pread(MIB, 0)), bytes(MIB))
                if image_format == "raw":
                    self.assertEqual(os.stat(path).st_blocks, 0)
                daemon.stop()

    def test_a_long_read_is_one_event(self):
        """Although the server asks first where the data are."""
        import nbd  # pylint: disable=import-outside-toplevel

        for length in (4 * KIB, 64 * KIB, MIB):
            daemon = self.daemon()
            daemon.add_file("file", self.make("events.raw", "raw"))
            rules = {
                "set-state": [{"event": "read_aio", "state": n, "new_state": n + 1} for n in (1, 2)],
                "inject-error": [{"event": "read_aio", "state": 2, "once": False}],
            }
            daemon.qmp.execute(
                "blockdev-add",
                {"driver": "raw", "node-name": "disk", "file": {"driver": "blkdebug", "image": "file", **rules}},
            )
            daemon.nbd_server()
            daemon.export("disk")
            with nbd_handle(daemon.uri("disk")) as handle:
                handle.pread(length, 0)
                for _ in range(2):
                    self.assertRaises(nbd.Error, handle.pread, length, 0)
            daemon.stop()

    def test_a_client_goes_while_a_reply_is_being_sent(self):
        import nbd  # pylint: disable=import-outside-toplevel

        daemon = self.serve(self.make("gone.raw", "raw"), "raw")
        with nbd_handle(daemon.uri("disk")) as handle:
            for offset in range(0, SIZE, MIB):
                handle.pwrite(b"a" * MIB, offset)
        for asked in (1, 5, 24):
            handle = nbd.NBD()
            handle.connect_uri(daemon.uri("disk"))
            buffers = [nbd.Buffer(MIB) for _ in range(asked)]
            for number, buffer in enumerate(buffers):
                handle.aio_pread(buffer, number * MIB)
            handle.poll(0)
            del handle
        self.read_late(daemon, b"a" * SIZE, [(0, MIB)] * 20)
        daemon.stop()

    def test_the_file_is_cut_while_replies_are_being_sent(self):
        """Every byte that arrives is the file's, as it was or as it is; or the connection ends."""
        import nbd  # pylint: disable=import-outside-toplevel

        for round_number in range(5):
            path = self.make(f"cut{round_number}.raw", "raw")
            daemon = self.serve(path, "raw")
            with nbd_handle(daemon.uri("disk")) as handle:
                for offset in range(0, SIZE, MIB):
                    handle.pwrite(b"a" * MIB, offset)
            handle = nbd.NBD()
            handle.connect_uri(daemon.uri("disk"))
            buffers = [nbd.Buffer(MIB) for _ in range(SIZE // MIB)]
            done = []
            for number, buffer in enumerate(buffers):
                handle.aio_pread(buffer, number * MIB, completion=lambda error, n=number: done.append(n) or 1)
            time.sleep(0.01 * round_number)
            os.truncate(path, 0)
            with contextlib.suppress(nbd.Error):
                while handle.aio_in_flight():
                    handle.poll(-1)
            for number in done:
                data = bytes(buffers[number].to_bytearray())
                self.assertFalse(data.strip(b"a").strip(b"\0"), number)
            del handle
            with nbd_handle(daemon.uri("disk")) as handle:
                self.assertEqual(bytes(handle.pread(MIB, 0)), bytes(MIB))
            daemon.stop()

    def test_a_file_on_disk_is_refused(self):
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="il-") as directory:
            path = os.path.join(directory, "disk")
            with open(path, "wb") as file:
                file.truncate(MIB)
            self.assert_refused("is not in memory", self.daemon().add_file, "f", path, mapped=True)
