#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The control plane under a manager who does right things in odd orders: each test is a fault that was there once.

Nothing here is about data in flight. It is about what commands leave behind: that a refusal or an undone transaction
leaves images and bitmaps as they were, on disk too; that what is writable stays so under filters that come and go; that
a circle in the graph is walked once; and that what has ended is neither told of later nor asked.
"""
import hashlib
import os
import time

from harness import IS_PEER, KIB, MIB, Qmp, QmpError, TestCase, image_check, nbd_handle, qemu_img, qemu_io

SIZE = 4 * MIB
GRANULARITY = 4 * KIB
ABORT = {"type": "abort", "data": {}}


def action(kind, **data):
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


class ControlFaults(TestCase):
    long_builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("they are faults of ours")
        self.start()

    def start(self, *options):
        self.server = self.daemon(*options)
        self.qmp = self.server.qmp

    def add(self, name, backing=None, **more):
        """A new image and its node; returns the image's path."""
        path = self.create_image(f"{name}.qcow2", SIZE, backing=backing and self.path(f"{backing}.qcow2"))
        self.server.add_qcow2(name, path, backing, **more)
        return path

    def write(self, node, *requests):
        """Writes [(byte, offset, length), …] through an export that is gone afterwards."""
        export = f"write-{node}"
        self.server.export(node, name=export, export_id=export)
        with nbd_handle(self.server.uri(export)) as handle:
            for byte, offset, length in requests:
                handle.pwrite(bytes([byte]) * length, offset)
        self.qmp.execute("block-export-del", id=export)
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", id=export)

    def ready(self, command, job, **arguments):
        self.qmp.execute(command, {"job-id": job}, **arguments)
        while (status := self.qmp.jobs().get(job, {}).get("status")) != "ready":
            self.assertIn(status, ("created", "running"), self.qmp.events)
            time.sleep(0.001)

    def cancel(self, job):
        self.qmp.execute("block-job-cancel", device=job, force=True)
        self.assertIsNone(self.qmp.wait_job(job))

    def complete(self, job):
        self.qmp.execute("job-complete", id=job)
        self.assertIsNone(self.qmp.wait_job(job))

    def content(self, path):
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    # Who may write to a container.

    def test_snapshot_onto_an_overlay_that_is_read_only_is_refused_before_its_header_is_written(self):
        self.add("top")
        overlay = self.add("overlay", **{"read-only": True})
        self.assert_refused("'overlay' is read-only", self.qmp.execute, "blockdev-snapshot", node="top", overlay="overlay")
        self.server.stop()
        self.assertNotIn("backing file", qemu_img("info", overlay))

    def test_snapshot_onto_an_overlay_whose_own_snapshot_was_deleted(self):
        """It was not written any more since it had an overlay of its own, and nobody has asked it to be since."""
        top = self.add("top")
        overlay = self.add("overlay")
        self.qmp.execute("blockdev-snapshot-sync", node_name="overlay", snapshot_file=self.path("above.qcow2"),
                         snapshot_node_name="above")
        self.qmp.execute("blockdev-del", node_name="above")
        self.qmp.execute("blockdev-snapshot", node="top", overlay="overlay")
        self.server.stop()
        self.assertIn(f"backing file: {top}", qemu_img("info", overlay))
        image_check(overlay)

    def committed_container(self):
        """`low`, which is not written any more since it has an overlay, nor is its file; and a target as long as that."""
        low = self.create_image("low.qcow2", SIZE)
        qemu_io(low, f"write -q -P 5 0 {SIZE}")
        self.server.add_qcow2("low", low)
        self.qmp.execute("blockdev-snapshot-sync", node_name="low", snapshot_file=self.path("over.qcow2"),
                         snapshot_node_name="over")
        self.server.nbd_server()
        self.write("over", (7, 0, MIB))
        with open(self.path("copy.raw"), "wb") as copy:
            copy.truncate(os.path.getsize(low))
        self.server.add_file("copy", self.path("copy.raw"))
        return low

    def commit(self):
        self.ready("block-commit", "commit", device="over", base_node="low")

    def backup_container(self):
        self.qmp.execute("blockdev-backup", {"job-id": "backup"}, device="low-file", target="copy", sync="none")

    def check_committed(self, low):
        self.server.stop()
        image_check(low)
        qemu_io(low, f"read -q -P 7 0 {MIB}", f"read -q -P 5 {MIB} {SIZE - MIB}")

    def test_commit_writes_through_a_job_filter_that_is_over_the_container(self):
        low = self.committed_container()
        self.backup_container()
        self.commit()
        self.complete("commit")
        self.cancel("backup")
        self.check_committed(low)

    def test_commit_ends_under_a_job_filter_that_came_over_the_container_meanwhile(self):
        """What began to write to the file ends it, though it finds a filter in its place."""
        low = self.committed_container()
        self.commit()
        self.backup_container()
        self.cancel("commit")
        self.commit()
        self.cancel("backup")
        self.complete("commit")
        self.check_committed(low)

    def test_commit_and_a_copy_before_write_node_over_the_container_end_in_any_order(self):
        low = self.committed_container()
        before = {"driver": "copy-before-write", "node-name": "before", "file": "low-file", "target": "copy"}
        self.commit()
        self.qmp.execute("blockdev-add", before)
        self.cancel("commit")
        self.commit()
        self.qmp.execute("blockdev-del", node_name="before")
        self.complete("commit")
        self.check_committed(low)

    # Bitmaps of what is undone.

    def bitmaps(self):
        """{name: (bytes that are dirty, recording, busy, persistent, a hash of what the bitmap says)} of `disk`."""
        nodes = {node["node-name"]: node for node in self.qmp.execute("query-named-block-nodes", {"flat": True})}
        result = {}
        for bitmap in nodes["disk"].get("dirty-bitmaps", []):
            said = self.qmp.execute("x-debug-block-dirty-bitmap-sha256", node="disk", name=bitmap["name"])["sha256"]
            result[bitmap["name"]] = (bitmap["count"], bitmap["recording"], bitmap["busy"], bitmap["persistent"], said)
        return result

    def disk_with_bitmap(self, persistent=True):
        path = self.add("disk")
        self.qmp.execute("block-dirty-bitmap-add", node="disk", name="map", persistent=persistent, granularity=GRANULARITY)
        self.server.nbd_server()
        self.write("disk", (1, MIB + GRANULARITY, GRANULARITY))
        return path

    def undo(self, *actions):
        """A transaction that is aborted at its end, after which the bitmaps are what they were; returns them."""
        before = self.bitmaps()
        self.assertEqual(before["map"][0], GRANULARITY)
        self.assert_refused("aborted", self.qmp.execute, "transaction", {"actions": [*actions, ABORT]})
        self.assertEqual(self.bitmaps(), before)
        return before

    def undo_while_read_only(self, *actions):
        """Becoming read-only stores the bitmaps as they are by then; the image must not keep what was undone."""
        path = self.disk_with_bitmap()
        options = {"driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": None, "read-only": True}
        before = self.undo(*actions, action("blockdev-reopen", options=[options]))
        self.server.stop()
        image_check(path)
        self.start()
        self.server.add_qcow2("disk", path)
        self.assertEqual(self.bitmaps(), before, "after the image was closed")

    def test_clearing_a_bitmap_before_its_image_becomes_read_only_is_undone_on_disk(self):
        self.undo_while_read_only(action("block-dirty-bitmap-clear", node="disk", name="map"))

    def test_adding_a_bitmap_before_its_image_becomes_read_only_is_undone_on_disk(self):
        self.undo_while_read_only(action("block-dirty-bitmap-add", node="disk", name="more", persistent=True))

    def test_merging_into_a_bitmap_before_its_image_becomes_read_only_is_undone_on_disk(self):
        self.undo_while_read_only(
            action("block-dirty-bitmap-add", node="disk", name="empty", granularity=GRANULARITY),
            action("block-dirty-bitmap-clear", node="disk", name="map"),
            action("block-dirty-bitmap-merge", node="disk", target="map", bitmaps=["empty"]))

    def test_replacing_a_bitmap_before_its_image_becomes_read_only_is_undone_on_disk(self):
        self.undo_while_read_only(
            action("block-dirty-bitmap-remove", node="disk", name="map"),
            action("block-dirty-bitmap-add", node="disk", name="map", persistent=True))

    def test_undone_backup_that_would_always_change_its_bitmap_leaves_it(self):
        """A backup that has never run has copied nothing, and failed at nothing."""
        self.disk_with_bitmap(persistent=False)
        self.add("copy")
        for sync in ("full", "bitmap"):
            with self.subTest(sync=sync):
                self.undo(action("blockdev-backup", device="disk", target="copy", job_id="backup", sync=sync, bitmap="map",
                                 bitmap_mode="always"))

    # Mirrors: what may come over them, and circles.

    def test_copy_on_read_over_the_source_of_a_shallow_mirror_is_refused(self):
        """It would fill what the mirror leans on; the refusal must not wait until the mirror's filter goes."""
        self.add("low")
        self.add("over", "low")
        self.add("copy")
        copying = {"driver": "copy-on-read", "node-name": "copying", "file": "over"}
        for sync in ("none", "top"):
            with self.subTest(sync=sync):
                self.ready("blockdev-mirror", "mirror", device="over", target="copy", sync=sync)
                self.assert_refused("blockdev-mirror mirror .*does not allow", self.qmp.execute, "blockdev-add", copying)
                self.cancel("mirror")
        self.qmp.execute("blockdev-add", copying)

    def circle(self):
        """A mirror to an overlay of its own source: the source's filter leads to the target, and that to the filter."""
        low = self.create_image("low.qcow2", SIZE)
        over = self.create_image("over.qcow2", SIZE, backing=low)
        qemu_io(low, f"write -q -P 7 0 {MIB}")
        qemu_io(over, f"write -q -P 5 0 {SIZE}")
        self.server.add_chain([("low", low), ("over", over)])
        self.ready("blockdev-mirror", "mirror", device="low", target="over", sync="full")

    def check_circle(self):
        self.complete("mirror")
        self.server.stop()
        for name in ("low", "over"):
            image_check(self.path(f"{name}.qcow2"))
            qemu_io(self.path(f"{name}.qcow2"), f"read -q -P 7 0 {MIB}", f"read -q -P 0 {MIB} {SIZE - MIB}")

    def test_backup_onto_the_target_of_a_mirror_that_leans_on_its_source_is_refused(self):
        self.circle()
        self.add("other")
        self.assert_refused("blockdev-mirror mirror .*does not allow", self.qmp.execute, "blockdev-backup",
                            {"job-id": "backup"}, device="other", target="over", sync="full")
        self.check_circle()

    def test_reopen_of_the_source_of_a_mirror_whose_target_leans_on_it_is_refused(self):
        self.circle()
        self.add("other")
        options = {"driver": "qcow2", "node-name": "low", "file": "low-file", "backing": "other"}
        self.assert_refused("does not allow", self.qmp.execute, "blockdev-reopen", {"options": [options]})
        self.check_circle()

    def test_mirror_of_what_a_bitmap_says_needs_an_image_that_has_the_rest(self):
        path = self.add("disk")
        self.qmp.execute("block-dirty-bitmap-add", node="disk", name="map")
        target = self.path("new.qcow2")
        for sync in ({"sync": "incremental"}, {"sync": "bitmap", "bitmap-mode": "on-success"}):
            with self.subTest(**sync):
                arguments = {"job-id": "mirror", "device": "disk", "target": target, "format": "qcow2", "bitmap": "map", **sync}
                self.assert_refused("go with mode 'existing'", self.qmp.execute, "drive-mirror", arguments)
                self.assertFalse(os.path.exists(target))
                qemu_img("convert", "-U", "-f", "qcow2", "-O", "qcow2", path, target)
                self.ready("drive-mirror", "mirror", **arguments, mode="existing")
                self.cancel("mirror")
                os.unlink(target)

    # What is refused, ends, or has ended.

    def test_refused_copy_to_a_file_leaves_the_file_that_stands_there_alone(self):
        """Refused at once, or after it waited: a new image is made when nothing is in the way any more."""
        self.add("low")
        self.add("over", "low")
        target = self.create_image("target.qcow2", SIZE)
        qemu_io(target, f"write -q -P 9 0 {MIB}")
        before = self.content(target)
        self.commit()
        for command in ("drive-backup", "drive-mirror"):
            with self.subTest(command=command):
                arguments = {"job-id": "copy", "device": "low", "target": target, "sync": "full", "format": "qcow2"}
                self.assert_refused("block-commit commit", self.qmp.execute, command, arguments)
                self.assertEqual(self.content(target), before, "the file was written to")
                self.assert_refused("block-commit commit", self.qmp.execute, "transaction",
                                    {"actions": [{"type": command, "data": arguments}]})
                self.assertEqual(self.content(target), before, "the file was written to in a transaction")
                self.qmp.execute(command, {**arguments, "on-conflict": "wait"})
                self.qmp.execute("access-cancel", id="copy")
                self.qmp.wait_event("ACCESS_WAIT_ENDED", id="copy")
                self.assertEqual(self.content(target), before, "the file was written to while the command waited")

    def test_refused_compression_leaves_no_file_behind(self):
        self.add("low")
        target = self.path("target.raw")
        arguments = {"job-id": "copy", "device": "low", "target": target, "sync": "full", "format": "raw"}
        self.assert_refused("Compression is not supported", self.qmp.execute, "drive-backup",
                            {**arguments, "compress": True})
        self.assertFalse(os.path.exists(target))

    def test_events_of_what_is_cancelled_while_it_waits_come_before_those_of_who_takes_its_id(self):
        """Two managers: one cancels what waits, the other begins with the same id as soon as it can."""
        other = self.path("other.qmp")
        self.server.stop()
        self.start("--chardev", f"socket,id=other,path={other},server=on,wait=off", "--monitor", "chardev=other")
        for name in ("disk", "copy", "second", "second-copy"):
            self.add(name)
        second = Qmp(other)
        self.addCleanup(second.close)
        mirror = {"job-id": "job", "device": "disk", "target": "copy", "sync": "full", "on-conflict": "wait"}
        self.qmp.execute("blockdev-backup", {"job-id": "first"}, device="disk", target="copy", sync="none")
        for _ in range(30):
            self.qmp.execute("blockdev-mirror", mirror)
            self.qmp.events.clear()
            self.qmp.send_raw(b'{"execute": "job-cancel", "arguments": {"id": "job"}}')
            while True:
                try:
                    second.execute("blockdev-backup", {"job-id": "job"}, device="second", target="second-copy", sync="none")
                    break
                except QmpError:  # it is not free yet
                    continue
            self.assertIn("return", self.qmp.reply())
            self.cancel_quietly("job")
            told = [event["event"] for event in self.qmp.events if "job" in (event["data"].get("id"), event["data"].get("device"))]
            self.assertIn("ACCESS_WAIT_ENDED", told)
            self.assertNotIn("JOB_STATUS_CHANGE", told[:told.index("ACCESS_WAIT_ENDED")], told)

    def cancel_quietly(self, job):
        """Waits for the end of a job and keeps all events."""
        self.qmp.execute("block-job-cancel", device=job, force=True)
        while job in self.qmp.jobs():
            time.sleep(0.001)

    def test_exports_that_end_are_not_asked_what_they_show(self):
        """A mirror has moved an export onto an image that nobody else has: its end closes the image, and takes a while."""
        self.server.nbd_server()
        for name in ("first", "second"):
            self.add(name)
        for number in range(40):
            for name in ("first", "second"):
                self.server.export(name, export_id=name)
            self.ready("drive-mirror", "mirror", device="second", target=self.path("moved.qcow2"), sync="full", format="qcow2")
            self.complete("mirror")
            with nbd_handle(self.server.uri("second")) as handle:
                handle.pwrite(b"x" * (512 * KIB), 0)
            order = ("first", "second") if number % 2 else ("second", "first")
            ends = [f'{{"execute": "block-export-del", "arguments": {{"id": "{name}", "mode": "hard"}}}}' for name in order]
            self.qmp.send_raw(("".join(ends) + '{"execute": "query-block-exports"}' * 200).encode())
            for _ in range(202):
                self.assertIn("return", self.qmp.reply())
            for name in order:
                self.qmp.wait_event("BLOCK_EXPORT_DELETED", id=name)

    # Whose name is in whose header.

    def test_commit_names_its_base_to_what_leans_beneath_another_jobs_filter(self):
        """A mirror that copies nothing leaves its target leaning on its node itself, below the filter of a second one."""
        self.server.nbd_server()
        base = self.add("base")
        self.add("a", backing="base")
        self.write("a", (1, 0, MIB))
        self.add("top", backing="a")
        target = self.add("t1")
        self.add("t0")
        self.ready("blockdev-mirror", "none", device="a", target="t1", sync="none")
        self.qmp.execute("blockdev-mirror", job_id="full", device="a", target="t0", sync="full", speed=64 * KIB)
        self.complete("none")
        self.qmp.execute("block-commit", job_id="commit", device="top", top_node="a", base_node="base")
        self.assertIsNone(self.qmp.wait_job("commit"))
        self.cancel("full")
        self.server.stop()
        os.unlink(self.path("a.qcow2"))
        self.assertIn(base, qemu_img("info", target))
        qemu_io(target, f"read -P 1 0 {MIB}")


if __name__ == "__main__":
    import unittest

    unittest.main()
