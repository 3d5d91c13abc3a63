# SPDX-License-Identifier: LGPL-2.1-or-later
"""How far a job raises the daemon's memory: not further than 32 MiB, whatever the image. Here it is of 1 TiB, with some
data in nearly every table, so that caches of tables and bitmaps of the whole image would show."""
import os
import random

from harness import IS_PEER, KIB, MIB, PROGRAM, SANITIZED, TestCase, image_check, image_compare, run, scale

SIZE = 1024 * 1024 * MIB
PIECES = scale(1000, 4000)
MOST = 32 * MIB


class JobMemory(TestCase):
    def setUp(self):
        super().setUp()
        if IS_PEER or SANITIZED:
            self.skipTest("what is measured is our own memory, without a sanitizer's")
        raw = self.path("raw")
        chance = random.Random(self.seed)
        with open(raw, "wb") as file:
            file.truncate(SIZE)
            for place in chance.sample(range(SIZE // (64 * KIB)), PIECES):
                file.seek(place * 64 * KIB)
                file.write(chance.randbytes(4 * KIB))
        self.full = self.path("full.qcow2")
        run(PROGRAM, "img", "convert", "-f", "raw", "-O", "qcow2", raw, self.full)
        os.unlink(raw)

    def status(self, name):
        with open(f"/proc/{self.server.pid}/status") as lines:
            return next(int(line.split()[1]) * KIB for line in lines if line.startswith(name))

    def run_job(self, command, **arguments):
        """How far the daemon's memory rises above what it was."""
        with open(f"/proc/{self.server.pid}/clear_refs", "w") as file:
            file.write("5")  # the peak is what is there now
        before = self.status("VmRSS:")
        qmp = self.server.qmp
        qmp.execute(command, job_id="j", auto_finalize=True, **arguments)
        if command == "blockdev-mirror" or arguments.get("base_node") and arguments["device"] == "full":
            qmp.wait_event("BLOCK_JOB_READY")
            qmp.execute("job-complete", id="j")
        self.assertIsNone(qmp.wait_job("j"))
        return self.status("VmHWM:") - before

    def measure(self, chain, command, result, **arguments):
        """One daemon on a chain, from base to top: the image that is full, and those that are made empty."""
        paths = []
        for name in chain:
            backing = paths[-1] if paths else None
            paths.append(self.full if name == "full" else self.create_image(f"{name}.qcow2", SIZE, backing=backing))
        self.server = self.daemon()
        self.server.add_chain(list(zip(chain, paths)))
        if "target" in arguments:
            self.server.add_qcow2("target", self.create_image("target.qcow2", SIZE))
        rise = self.run_job(command, **arguments)
        self.server.stop()
        self.assertLess(rise, MOST)
        image_check(self.path(result))
        image_compare(self.full, self.path(result))

    def test_commit(self):
        self.measure(["base", "full", "top"], "block-commit", "base.qcow2", device="top", top_node="full", base_node="base")

    def test_active_commit(self):
        self.measure(["base", "full"], "block-commit", "base.qcow2", device="full", base_node="base")

    def test_stream(self):
        self.measure(["full", "top"], "block-stream", "top.qcow2", device="top")

    def test_mirror(self):
        self.measure(["full"], "blockdev-mirror", "target.qcow2", device="full", target="target", sync="full")

    def test_backup(self):
        self.measure(["full"], "blockdev-backup", "target.qcow2", device="full", target="target", sync="full")
