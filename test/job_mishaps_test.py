# SPDX-License-Identifier: LGPL-2.1-or-later
"""What once lost data, crashed or hung when jobs met other commands at a bad moment: one test for each."""
import contextlib
import time

from harness import IS_PEER, KIB, MIB, SLOWNESS, QmpError, TestCase, nbd_handle, qemu_img, qemu_io

SIZE = 4 * MIB


class JobMishaps(TestCase):
    builds = ("asan",)
    long_builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the peer decides otherwise")

    def wait_status(self, qmp, job, *wanted):
        deadline = time.monotonic() + 10 * SLOWNESS
        while (status := qmp.jobs().get(job, {"status": "null"})["status"]) not in wanted:
            self.assertLess(time.monotonic(), deadline, f"{job} is {status}, not {wanted}")
            time.sleep(0.01)

    def job_errors(self, qmp):
        return {
            event["data"]["device"]: event["data"].get("error")
            for event in qmp.drain_events()
            if event["event"] == "BLOCK_JOB_COMPLETED"
        }

    def open_ready_commit(self):
        """A daemon with an active commit of `top` into `base` that is ready, and an image `o` that nobody has opened."""
        daemon = self.daemon()
        daemon.add_chain(self.create_chain(["base", "top"], SIZE))
        daemon.nbd_server()
        daemon.qmp.execute("block-commit", {"job-id": "j", "device": "top", "base-node": "base"})
        self.wait_status(daemon.qmp, "j", "ready")
        return daemon, self.create_image("o.qcow2", SIZE)

    def read_export(self, daemon, name):
        with nbd_handle(daemon.uri(name)) as handle:
            return handle.pread(SIZE, 0)

    def test_no_overlay_over_an_image_that_clients_write_during_its_commit(self):
        daemon, overlay = self.open_ready_commit()
        daemon.export("top")
        self.assert_refused("export-top", daemon.add_qcow2, "o", overlay, "top")
        daemon.qmp.execute("block-job-cancel", {"device": "j", "force": True})
        self.wait_status(daemon.qmp, "j", "null")

    def test_no_writable_export_below_an_overlay_that_came_during_a_commit(self):
        daemon, overlay = self.open_ready_commit()
        daemon.add_qcow2("o", overlay, "top")
        self.assert_refused("o -> top", daemon.export, "top")
        daemon.qmp.execute("block-job-cancel", {"device": "j", "force": True})
        self.wait_status(daemon.qmp, "j", "null")
        self.assert_refused("o -> top", daemon.export, "top")
        daemon.qmp.execute("blockdev-del", node_name="o")
        daemon.export("top")

    def test_an_overlay_that_comes_during_a_commit_is_claimed_at_once(self):
        daemon, overlay = self.open_ready_commit()
        daemon.add_qcow2("o", overlay, "top")
        format_over = {"driver": "raw", "node-name": "r", "file": "o"}
        self.assert_refused("block-commit j", daemon.qmp.execute, "blockdev-add", format_over)
        daemon.qmp.execute("job-complete", id="j")
        self.wait_status(daemon.qmp, "j", "null")
        self.assertEqual(self.job_errors(daemon.qmp), {"j": None})
        daemon.qmp.execute("blockdev-add", format_over)

    def test_claims_on_an_overlay_end_when_it_is_deleted(self):
        daemon, overlay = self.open_ready_commit()
        daemon.add_qcow2("o", overlay, "top")
        daemon.qmp.execute("blockdev-del", node_name="o")
        holders = {holder["id"]: holder for holder in daemon.qmp.execute("query-access")["holders"]}
        self.assertNotIn("o", [claim["node"] for claim in holders["j"]["claims"]])

    def test_a_stream_does_not_lean_on_a_base_that_an_active_commit_changes(self):
        daemon, overlay = self.open_ready_commit()
        daemon.add_qcow2("o", overlay, "top")
        daemon.export("o", writable=False)
        before = self.read_export(daemon, "o")
        daemon.qmp.execute("block-stream", {"job-id": "s", "device": "o", "base-node": "base"})
        self.wait_status(daemon.qmp, "s", "null")
        self.assertRegex(self.job_errors(daemon.qmp)["s"], "base")
        self.assert_refused("o -> top", daemon.export, "top")
        self.assertEqual(self.read_export(daemon, "o"), before)

    def test_a_pause_after_a_soft_cancel_pauses(self):
        daemon, _ = self.open_ready_commit()
        qmp = daemon.qmp
        daemon.export("top")
        qmp.execute("block-job-set-speed", device="j", speed=1)
        with nbd_handle(daemon.uri("top")) as handle:
            for at in range(3):
                handle.pwrite(b"x" * 64 * KIB, at * MIB)
        deadline = time.monotonic() + 10 * SLOWNESS
        while qmp.execute("query-block-jobs")[0]["len"] == qmp.execute("query-block-jobs")[0]["offset"]:
            self.assertLess(time.monotonic(), deadline)
        time.sleep(0.2)  # the copy waits for the speed limit
        qmp.execute("block-job-cancel", {"device": "j"})
        qmp.execute("job-pause", id="j")
        self.wait_status(qmp, "j", "standby")
        self.assertLess(len(qmp.drain_events(0.2)), 20)
        qmp.execute("block-job-set-speed", device="j", speed=0)
        qmp.execute("job-resume", id="j")
        self.wait_status(qmp, "j", "null")
        self.assertEqual(self.job_errors(qmp), {"j": None})

    def test_a_stream_into_an_image_that_a_commit_makes_longer(self):
        """The middle image is shorter than what lies below: there x shows zeroes, before the stream and after it."""
        y = self.create_image("y.qcow2", SIZE)
        m = self.create_image("m.qcow2", SIZE // 2, backing=y)
        x = self.create_image("x.qcow2", SIZE // 2, backing=m)
        t = self.create_image("t.qcow2", SIZE, backing=x)
        for path, command in ((y, f"write -P 9 0 {SIZE}"), (m, "write -P 8 0 1M"), (t, "write -P 7 0 64k")):
            qemu_io(path, command)
        raw = self.path("before.raw")
        qemu_img("convert", "-O", "raw", t, raw)
        with open(raw, "rb") as content:
            before = content.read()
        daemon = self.daemon()
        daemon.add_chain([("y", y), ("m", m), ("x", x), ("t", t)])
        daemon.nbd_server()
        daemon.export("t", writable=False)
        qmp = daemon.qmp
        qmp.execute("block-stream", {"job-id": "s", "device": "x", "base-node": "y", "speed": 64 * KIB})
        qmp.execute("block-commit", {"job-id": "c", "device": "t", "base-node": "x"})
        self.wait_status(qmp, "c", "ready")
        with contextlib.suppress(QmpError):
            qmp.execute("block-job-set-speed", device="s", speed=0)
        self.wait_status(qmp, "s", "null")
        self.assertEqual(self.read_export(daemon, "t"), before)
        qmp.execute("job-complete", id="c")
        self.wait_status(qmp, "c", "null")
        self.assertEqual(self.job_errors(qmp), {"s": None, "c": None})
        self.assertEqual(self.read_export(daemon, "t"), before)

    def test_an_image_that_was_committed_is_no_overlay(self):
        """After a pivot the old top is still there and points to the base: the base is the top of the chain now."""
        daemon = self.daemon()
        chain = self.create_chain(["a", "b", "c"], SIZE)
        daemon.add_chain(chain)
        daemon.nbd_server()
        daemon.export("c")
        before = self.read_export(daemon, "c")
        for job, top, base in (("one", "c", "b"), ("two", "b", "a")):
            daemon.qmp.execute("block-commit", {"job-id": job, "device": top, "base-node": base})
            self.wait_status(daemon.qmp, job, "ready", "null")
            daemon.qmp.execute("job-complete", id=job)
            self.wait_status(daemon.qmp, job, "null")
        self.assertEqual(self.job_errors(daemon.qmp), {"one": None, "two": None})
        self.assertEqual(self.read_export(daemon, "c"), before)
        daemon.stop()
        self.assertTrue(qemu_img("info", "-f", "qcow2", chain[2][1]).count("b.qcow2"))

    def test_a_name_with_a_colon_is_found_again(self):
        base, middle, top = "f:a.qcow2", "f:b.qcow2", "c.qcow2"
        for name, below in ((base, None), (middle, base), (top, middle)):
            self.create_image(name, SIZE, backing=below and f"./{below}")
        daemon = self.daemon()
        daemon.add_chain([("a", base), ("b", middle), ("c", top)])
        daemon.qmp.execute("block-commit", {"job-id": "j", "device": "c", "top-node": "b", "base-node": "a"})
        self.wait_status(daemon.qmp, "j", "null")
        self.assertEqual(self.job_errors(daemon.qmp), {"j": None})
        daemon.stop()
        self.assertIn(base, qemu_img("info", "--backing-chain", "-f", "qcow2", self.path(top)))

    def test_a_format_over_an_image_goes_with_its_other_users(self):
        """What is opened over an image during its active commit is not left behind on it when its users move."""
        daemon, _ = self.open_ready_commit()
        daemon.qmp.execute("blockdev-add", {"driver": "raw", "node-name": "r", "file": "top", "read-only": True})
        daemon.export("r", writable=False)
        before = self.read_export(daemon, "r")
        daemon.qmp.execute("job-complete", id="j")
        self.wait_status(daemon.qmp, "j", "null")
        self.assertEqual(self.job_errors(daemon.qmp), {"j": None})
        self.assertEqual(self.read_export(daemon, "r"), before)
        edges = {(edge["parent"], edge["role"]): edge["child"] for edge in daemon.qmp.execute("query-graph")["edges"]}
        self.assertEqual(edges[("r", "file")], "base")
