# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes to huge pages in tmpfs takes no more memory than what is copied otherwise."""
import os

from harness import IS_PEER, KIB, MIB, PROGRAM, TestCase, image_compare, run

SLACK = 64 * KIB


class HugePages(TestCase):
    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("our own program's memory")
        if not self.path("x").startswith("/dev/shm"):
            self.skipTest("the tests' directory is not in tmpfs")

    def source(self, runs):
        path = self.path("source")
        with open(path, "wb") as file:
            for bytes_, data in runs:
                file.write(os.urandom(bytes_) if data else bytes(bytes_))
        return path

    def used(self, name):
        return os.stat(self.path(name)).st_blocks * 512

    def convert(self, source, image_format, *options):
        run(PROGRAM, "img", "convert", "-f", "raw", "-O", image_format, *options, source, self.path("out"))
        image_compare(source, self.path("out"), "raw", image_format)
        return self.used("out")

    def test_written_zeroes_become_holes(self):
        self.assertLessEqual(self.convert(self.source([(6 * MIB, False)]), "raw"), SLACK)

    def test_zeroes_between_the_places_that_are_looked_at(self):
        runs = [(4 * KIB, True), (508 * KIB, False)] * 128
        self.assertLessEqual(self.convert(self.source(runs), "raw"), 512 * KIB + SLACK)

    def test_out_of_order_qcow2(self):
        self.assertLessEqual(self.convert(self.source([(6 * MIB, False)]), "qcow2", "-W"), 320 * KIB + 2 * MIB)
        self.assertLessEqual(os.path.getsize(self.path("out")), 320 * KIB + 2 * MIB)

    def test_the_last_extent_ends_with_the_file(self):
        used = self.convert(self.source([(3 * MIB, True)]), "qcow2")
        self.assertLessEqual(used, os.path.getsize(self.path("out")) + SLACK)

    def test_mirror_of_written_zeroes(self):
        source = self.source([(64 * MIB, False)])
        target = self.create_image("target", 64 * MIB)
        server = self.daemon()
        server.add_file("source", source)
        server.add_qcow2("target", target)
        server.qmp.execute("blockdev-mirror", device="source", target="target", sync="full", job_id="j")
        server.qmp.wait_event("BLOCK_JOB_READY")
        server.qmp.execute("job-complete", id="j")
        self.assertIsNone(server.qmp.wait_job("j"))
        server.stop()
        self.assertLessEqual(self.used("target"), 320 * KIB + MIB)

    def test_data_file_that_is_shorter_than_its_image(self):
        source = self.path("source")
        with open(source, "wb") as file:
            file.truncate(64 * MIB)
            for place in range(2 * MIB, 64 * MIB, 2 * MIB):
                file.seek(place)
                file.write(os.urandom(256 * KIB))
        run(PROGRAM, "img", "create", "-f", "qcow2", "-o", f"data_file={self.path('data')}", self.path("out"), "1M")
        run(PROGRAM, "img", "resize", "-f", "qcow2", self.path("out"), "64M")
        run(PROGRAM, "img", "convert", "-n", "-f", "raw", "-O", "qcow2", source, self.path("out"))
        image_compare(source, self.path("out"), "raw", "qcow2")
        self.assertLessEqual(self.used("data"), self.used("source") + SLACK)

    def test_preallocation_is_kept(self):
        used = self.convert(self.source([(6 * MIB, False)]), "raw", "-o", "preallocation=falloc")
        self.assertEqual(used, 6 * MIB)
