# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mirrors under a guest that verifies what it reads: every sync and copy mode, changed live, anywhere in a chain; what
users find afterwards, here and offline; the bound on the way to READY; the peer's events beside ours."""
import os
import time

from harness import FULL, IS_PEER, KIB, MIB, PEER, SLOWNESS, QmpError, TestCase, image_check, image_compare, qemu_img, qemu_io, scale
from verifying import Region

SIZE = 16 * MIB
NAMES = ("base", "a", "b", "top")


class MirrorCase(TestCase):
    builds = ("release",)
    long_builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("mirrors of any node are ours")
        below = None
        for position, name in enumerate(NAMES):
            below = self.create_image(f"{name}.qcow2", SIZE, backing=below)
            qemu_io(below, *(f"write -q -P {16 * position + n + 1} {(3 * position + n) * MIB // 2} {200 * KIB * (n + 1)}"
                             for n in range(4)))
        self.original = self.path("original.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", below, self.original)
        self.server = self.daemon()
        self.qmp = self.server.qmp
        self.server.add_chain([(name, self.path(f"{name}.qcow2")) for name in NAMES], discard="unmap")
        self.server.nbd_server()
        self.server.export("top")

    def add_target(self, name="target", size=SIZE, **more):
        self.server.add_qcow2(name, self.create_image(f"{name}.qcow2", size), discard="unmap", **more)

    def guest(self, *options, name="guest", block=4096):
        self.region = Region(self.directory, name, self.seed, 0, SIZE, block, original=self.original)
        client = self.region.start(self.server.nbd_path, "top", "--depth", "8", *options)
        if "--requests" not in options:
            client.wait_progress(20)
        return client

    def mirror(self, device="top", target="target", sync="full", job="j", **more):
        self.qmp.execute("blockdev-mirror", job_id=job, device=device, target=target, sync=sync, **more)

    def await_status(self, *wanted, job="j", timeout=20 * SLOWNESS):
        deadline = time.monotonic() + timeout
        while (status := self.qmp.jobs().get(job, {"status": "null"})["status"]) not in wanted:
            self.assertLess(time.monotonic(), deadline, f"{job} is {status}, not {wanted}")
            self.assertNotEqual(status, "null", self.qmp.events)
            time.sleep(0.01)

    def complete(self, job="j"):
        self.await_status("ready", job=job)
        began = time.monotonic()
        self.qmp.execute("job-complete", id=job)
        self.assertIsNone(self.qmp.wait_job(job))
        return time.monotonic() - began

    def where(self, export="top"):
        """The node that an export is on."""
        return {info["id"]: info["node-name"] for info in self.qmp.execute("query-block-exports")}[f"export-{export}"]

    def verify_offline(self, image):
        """What the peer finds in the image and all that it leans on."""
        self.server.stop()
        image_check(self.path(image))
        raw = self.path("after.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", self.path(image), raw)
        self.region.verify_file(raw)

    def backing_string(self, image):
        for line in qemu_img("info", "-U", self.path(image)).splitlines():
            if line.startswith("backing file: "):
                return os.path.basename(line.split(": ", 1)[1].split(" (")[0])
        return None


class Mirrors(MirrorCase):
    def pivot(self, sync, mode, changes=False):
        self.add_target()
        guest = self.guest("--zeroes", "10", "--trims", "10")
        self.mirror(sync=sync, copy_mode=mode)
        modes = ("background", "write-blocking")
        for step in range(scale(4, 40) if changes else 0):
            self.qmp.execute("block-job-change", {"id": "j", "type": "mirror", "copy-mode": modes[step % 2]})
            guest.wait_progress(20)
        self.complete()
        self.assertEqual(self.where(), "target")
        guest.wait_progress(50)
        guest.stop()
        self.region.verify(self.server.nbd_path, "top")
        below = {"full": None, "top": "b.qcow2", "none": "top.qcow2"}[sync]
        self.assertEqual(self.backing_string("target.qcow2"), below)
        self.verify_offline("target.qcow2")

    def test_full(self):
        self.pivot("full", "background")

    def test_top_write_blocking(self):
        self.pivot("top", "write-blocking")

    def test_none_changed_live(self):
        self.pivot("none", "background", changes=True)

    def test_full_changed_live(self):
        self.pivot("full", "write-blocking", changes=True)

    def test_all(self):
        if not FULL:
            self.skipTest("in the long form")
        for sync in ("top", "none"):
            for mode in ("background", "write-blocking"):
                with self.subTest(sync=sync, mode=mode):
                    self.tearDown()
                    self.clean_up()
                    self.setUp()
                    self.pivot(sync, mode)

    def test_a_cancel_when_ready_leaves_a_copy(self):
        self.add_target()
        guest = self.guest()
        self.mirror(copy_mode="write-blocking")
        self.await_status("ready")
        self.assertTrue(self.qmp.execute("query-block-jobs")[0]["ready"])
        guest.stop()
        deadline = time.monotonic() + 20 * SLOWNESS  # what was discarded is copied later
        while not self.qmp.execute("query-block-jobs")[0]["actively-synced"]:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)
        self.qmp.execute("block-job-cancel", device="j")
        event = self.qmp.wait_event("BLOCK_JOB_COMPLETED", device="j")
        self.assertEqual(event["data"]["target-state"], "complete")
        self.assertEqual(self.where(), "top")
        self.server.stop()
        image_compare(self.path("top.qcow2"), self.path("target.qcow2"))
        image_check(self.path("target.qcow2"))

    def test_a_node_in_the_middle_is_replaced(self):
        for turn, (device, sync) in enumerate((("b", "full"), ("target0", "top"), ("target1", "none"))):
            target = f"target{turn}"
            self.add_target(target)
            if turn == 0:
                guest = self.guest("--zeroes", "10")
            self.mirror(device, target, sync, replaces=device)
            self.await_status("ready")
            guest.wait_progress(20)
            self.complete()
            self.assertEqual(self.backing_string("top.qcow2"), f"{target}.qcow2")
        self.assertEqual(self.server.chain_of("top"), ["top", "target2", "target1"])
        guest.wait_progress(50)
        guest.stop()
        self.verify_offline("top.qcow2")

    def test_names_in_headers_are_given_or_left_alone(self):
        self.add_target()
        os.symlink("target.qcow2", self.path("other.qcow2"))
        self.mirror("b", sync="full", replaces="b", backing_file="other.qcow2")
        self.complete()
        self.assertEqual(self.backing_string("top.qcow2"), "other.qcow2")
        self.add_target("second")
        self.mirror("target", "second", replaces="target", keep_backing=True)
        self.complete()
        self.assertEqual(self.backing_string("top.qcow2"), "other.qcow2")
        self.assertEqual(self.server.chain_of("second"), ["second"])

    def test_two_mirrors_of_a_written_node(self):
        self.add_target("one")
        self.add_target("two")
        guest = self.guest()
        self.mirror(target="one", job="j1")
        self.mirror(target="two", job="j2", copy_mode="write-blocking")
        self.complete("j1")
        self.assertEqual(self.where(), "one")
        guest.wait_progress(20)
        self.complete("j2")
        self.assertEqual(self.where(), "two")
        guest.wait_progress(20)
        guest.stop()
        self.verify_offline("two.qcow2")

    def test_increments(self):
        self.add_target()
        self.mirror()
        self.await_status("ready")
        self.qmp.execute("block-dirty-bitmap-add", node="top", name="m")
        self.qmp.execute("block-job-cancel", device="j")
        self.qmp.wait_job("j")
        for turn in range(scale(2, 10)):
            guest = self.guest("--requests", "200") if turn == 0 else self.region.start(
                self.server.nbd_path, "top", "--depth", "8", "--requests", "200")
            guest.wait()
            self.mirror(sync="incremental", bitmap="m")
            self.await_status("ready")
            self.qmp.execute("block-job-cancel", device="j")
            self.assertIsNone(self.qmp.wait_job("j"))
        self.verify_offline("target.qcow2")

    def test_files_are_made(self):
        guest = self.guest()
        self.qmp.execute("drive-mirror", {"job-id": "j", "device": "top", "target": self.path("made.qcow2"), "sync": "top",
                                          "node-name": "made", "unmap": False})
        self.complete()
        self.assertEqual(self.where(), "made")
        self.create_image("there.qcow2", SIZE)
        self.qmp.execute("drive-mirror", {"job-id": "j", "device": "made", "target": self.path("there.qcow2"), "sync": "full",
                                          "mode": "existing", "format": "qcow2", "node-name": "there"})
        self.complete()
        self.assertEqual(self.where(), "there")
        guest.wait_progress(20)
        guest.stop()
        self.verify_offline("there.qcow2")

    def test_what_does_not_fit_is_refused(self):
        self.add_target("small", SIZE // 2)
        self.add_target()
        for expected, arguments in (
                ("different sizes", {"target": "small"}),
                ("Can't mirror node into itself", {"target": "top"}),
                ("needs write-data on node 'a'", {"target": "a"}),
                ("Cannot replace 'a'", {"replaces": "a"}),
                ("Failed to find node", {"replaces": "nobody"}),
                ("holds the image", {"device": "top-file"}),
                ("power of 2", {"granularity": 513}),
                ("'m' not found", {"sync": "incremental", "bitmap": "m"})):
            with self.subTest(expected=expected), self.assertRaises(QmpError) as raised:
                self.mirror(**arguments)
            self.assertIn(expected, raised.exception.desc)
        self.mirror(speed=64 * KIB)
        with self.assertRaises(QmpError) as raised:
            self.qmp.execute("block-job-change", {"id": "j", "type": "commit", "copy-mode": "background"})
        self.assertIn("is no commit but a mirror", raised.exception.desc)
        self.assertEqual([event for event in self.qmp.drain_events() if event["data"].get("status") == "ready"], [])


class Convergence(MirrorCase):
    """A guest that rewrites its whole disk, faster than the job is allowed to copy."""
    speed = 8 * MIB
    after = 1

    def outrun(self):
        return self.guest("--reads", "0", "--max-blocks", "64", "--depth", "16", block=64 * KIB)

    def check_bound(self, guest, job="j"):
        """One pass over all of it, the time that was asked for, one pass more; and what the machine takes for itself."""
        bound = 2 * SIZE / self.speed + self.after
        began = time.monotonic()
        self.await_status("ready", job=job, timeout=(3 * bound + 5) * SLOWNESS)
        self.assertGreater(time.monotonic() - began, SIZE / self.speed / 2, "it was not held back at all")
        guest.wait_progress(50)
        self.assertLess(self.complete(job), 1.5 * SLOWNESS, "ready, but not done at once")
        guest.wait_progress(20)
        guest.stop()

    def test_a_mirror(self):
        self.add_target()
        guest = self.outrun()
        self.mirror(speed=self.speed, switch_after=self.after, switch_ratio=0)
        self.check_bound(guest)
        self.assertEqual(self.where(), "target")
        self.verify_offline("target.qcow2")

    def test_an_active_commit(self):
        guest = self.outrun()
        guest.wait_progress(500)
        self.qmp.execute("block-commit", job_id="j", device="top", base_node="b", speed=self.speed,
                         switch_after=self.after, switch_ratio=0)
        self.check_bound(guest)
        self.assertEqual(self.where(), "b")
        self.verify_offline("b.qcow2")

    def test_without_a_bound_there_is_none(self):
        if not FULL:
            self.skipTest("in the long form")
        self.add_target()
        guest = self.outrun()
        self.mirror(speed=self.speed, switch_after=0, switch_ratio=0)
        time.sleep(2 * SIZE / self.speed + self.after + 1)
        self.assertEqual(self.qmp.jobs()["j"]["status"], "running")
        self.qmp.execute("block-job-change", {"id": "j", "type": "mirror", "copy-mode": "write-blocking"})
        self.await_status("ready", timeout=(3 * SIZE / self.speed + 5) * SLOWNESS)
        guest.stop()


class BesideThePeer(TestCase):
    """The same commands, the same events in the same order with the same numbers, but for what only we say."""

    def record(self, command, calls):
        below = self.create_image("p-base.qcow2", 8 * MIB)
        qemu_io(below, "write -q -P 1 0 1M")
        top = self.create_image("p-top.qcow2", 8 * MIB, backing=below)
        qemu_io(top, "write -q -P 2 1M 1M")
        self.create_image("p-target.qcow2", 8 * MIB)
        server = self.daemon(command=command)
        server.add_qcow2("base", below)
        server.add_qcow2("top", top, "base")
        server.add_qcow2("target", self.path("p-target.qcow2"), discard="unmap")
        events = []
        for name, arguments, last in calls:
            server.qmp.execute(name, arguments)
            while True:
                event = self.next_event(server.qmp)
                data = {key: value for key, value in event["data"].items() if key not in ("id", "target-state")}
                events.append((event["event"], data))
                if data.get("status") == last or event["event"] == last:
                    break
        server.stop()
        return events

    @staticmethod
    def next_event(qmp):
        while not qmp.events:
            message = qmp.receive()
            if "event" in message:
                qmp.events.append(message)
        return qmp.events.pop(0)

    def test_events(self):
        if IS_PEER:
            self.skipTest("both are started here")
        from harness import DAEMON
        for sync in ("full", "top", "none"):
            for end in ("block-job-complete", "block-job-cancel"):
                calls = [("blockdev-mirror", {"job-id": "j", "device": "top", "target": "target", "sync": sync}, "BLOCK_JOB_READY"),
                         (end, {"device": "j"}, "null")]
                with self.subTest(sync=sync, end=end):
                    self.assertEqual(self.record(DAEMON, calls), self.record([PEER], calls))
