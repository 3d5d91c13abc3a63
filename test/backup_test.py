# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies of a point in time, made while guests write: backups of all kinds, frozen views, and what becomes of bitmaps.

Guests write through two exports, on two I/O threads, and note when; the judge (writer.py) finds any write that a copy
lacks, or has too much. What the peer can do as well is done to both, and must end alike.
"""
import contextlib
import json
import os
import time

from harness import IS_PEER, KIB, MIB, PEER, QmpError, TestCase, image_check, nbd_handle, qemu_img, qemu_io, scale
from writer import BLOCK, Writer, check_cut

SIZE = 4 * MIB + 3 * KIB  # the last cluster is no whole one
GUESTS = 2


class BackupCase(TestCase):
    def raw(self, path):
        """What an image shows, on disk."""
        raw = f"{path}.raw"
        qemu_img("convert", "-U", "-O", "raw", path, raw)
        with open(raw, "rb") as image:
            return image.read()

    def serve(self, names=("base", "top"), *options):
        """A daemon with a chain, the last image of which guests may write to through two exports."""
        self.chain = self.create_chain(names, SIZE)
        self.original = self.raw(self.chain[-1][1])
        objects = [word for i in range(GUESTS) for word in ("--object", f"iothread,id=io{i}")]
        daemon = self.daemon(*objects, *options)
        daemon.add_chain(self.chain)
        daemon.nbd_server()
        for i in range(GUESTS):
            daemon.export(names[-1], name=f"guest{i}", export_id=f"guest{i}", iothread=f"io{i}")
        return daemon

    def start_guests(self, daemon):
        """They write until end_guests()."""
        part = SIZE // BLOCK // GUESTS
        self.guests = [
            Writer(self.directory, daemon.uri(f"guest{i}"), self.random.randrange(1 << 20) * GUESTS + i, i * part, part)
            for i in range(GUESTS)
        ]

    def end_guests(self):
        return [write for guest in self.guests for write in guest.end()]

    def add_target(self, daemon, name, *options, backing=None, size=SIZE):
        path = self.create_image(f"{name}.qcow2", size, *options, backing=backing)
        daemon.add_qcow2(name, path)
        return path

    def start(self, daemon, command="blockdev-backup", **arguments):
        """The moments between which the copy's lies."""
        asked = time.monotonic()
        daemon.qmp.execute(command, arguments)
        return asked, time.monotonic()

    def end_slowly(self, daemon, job, seconds=0.2):
        """Most is copied by the guests' writes."""
        time.sleep(seconds)
        with contextlib.suppress(QmpError):  # the guests have been through everything
            daemon.qmp.execute("block-job-set-speed", device=job, speed=0)
        self.assertIsNone(daemon.qmp.wait_job(job))


class Exact(BackupCase):
    """Each copy is what the disk held at one moment."""

    time_limit = 150  # in full: 300 random mixes

    def check(self, path, moments):
        """Called while guests write: judged in the end."""
        self.copies.append((path, moments))

    def judge(self, daemon):
        writes = self.end_guests()
        daemon.stop()
        for path, moments in self.copies:
            image_check(path)
            shown = check_cut([(self.raw(path), self.original, writes)], *moments)
            self.assertGreater(shown, 0)

    def setUp(self):
        super().setUp()
        self.copies = []

    def test_full_compressed_top_and_incremental(self):
        daemon = self.serve()
        slow = {"device": "top", "speed": 4 * MIB}
        self.start_guests(daemon)
        time.sleep(0.1)
        full = self.add_target(daemon, "full")
        daemon.qmp.execute("block-dirty-bitmap-add", node="top", name="since")
        moments = self.start(daemon, **{"job-id": "full", "target": "full", "sync": "full", "bitmap": "since",
                                        "bitmap-mode": "on-success", **slow})
        self.end_slowly(daemon, "full")
        self.check(full, moments)
        packed = self.add_target(daemon, "packed")
        moments = self.start(daemon, **{"job-id": "packed", "target": "packed", "sync": "full", "compress": True, **slow})
        self.end_slowly(daemon, "packed")
        self.check(packed, moments)
        top = self.add_target(daemon, "upper", backing=self.chain[0][1])
        moments = self.start(daemon, **{"job-id": "upper", "target": "upper", "sync": "top", **slow})
        self.end_slowly(daemon, "upper")
        self.check(top, moments)
        below = full
        for i in range(2):
            below = self.add_target(daemon, f"more{i}", backing=below)
            moments = self.start(daemon, **{"job-id": f"more{i}", "target": f"more{i}", "sync": "incremental",
                                            "bitmap": "since", **slow})
            self.end_slowly(daemon, f"more{i}", 0.1)
            self.check(below, moments)
        self.judge(daemon)

    def test_two_at_once_and_one_that_is_cancelled(self):
        """They stack; one that leaves early takes nothing with it."""
        daemon = self.serve()
        self.start_guests(daemon)
        time.sleep(0.1)
        paths = {name: self.add_target(daemon, name, f"cluster_size={size}") for name, size in
                 (("one", "4k"), ("two", "2M"), ("three", "64k"))}
        moments = {}
        for name in paths:
            # The guests may have had everything copied before the cancel comes: it waits for its user then.
            moments[name] = self.start(daemon, **{"job-id": name, "device": "top", "target": name, "sync": "full",
                                                  "speed": 2 * MIB, "auto-finalize": name != "three"})
            time.sleep(0.05)
        daemon.qmp.execute("block-job-cancel", device="three")
        event = daemon.qmp.wait_event("BLOCK_JOB_CANCELLED", device="three")
        self.assertEqual(event["data"]["target-state"], "partial")
        for name in ("one", "two"):
            self.end_slowly(daemon, name, 0.1)
            self.check(paths[name], moments[name])
        self.judge(daemon)

    def test_one_that_grows_meanwhile(self):
        daemon = self.serve()
        self.start_guests(daemon)
        time.sleep(0.1)
        path = self.add_target(daemon, "copy")
        daemon.qmp.execute("block-dirty-bitmap-add", node="top", name="since")
        moments = self.start(daemon, **{"job-id": "j", "device": "top", "target": "copy", "sync": "full", "speed": 2 * MIB,
                                        "bitmap": "since", "bitmap-mode": "on-success"})
        daemon.qmp.execute("block_resize", {"node-name": "top", "size": SIZE + 2 * MIB})
        self.end_slowly(daemon, "j")
        self.check(path, moments)
        nodes = {node["node-name"]: node for node in daemon.qmp.execute("query-named-block-nodes")}
        self.assertEqual(nodes["top"]["image"]["virtual-size"], SIZE + 2 * MIB)
        self.judge(daemon)

    def test_drive_backup(self):
        daemon = self.serve()
        self.start_guests(daemon)
        time.sleep(0.1)
        moments = {}
        for sync in ("full", "top"):
            moments[sync] = self.start(daemon, "drive-backup", **{"job-id": sync, "device": "top", "sync": sync,
                                                                  "target": self.path(f"drive-{sync}.qcow2")})
            self.assertIsNone(daemon.qmp.wait_job(sync))
            self.check(self.path(f"drive-{sync}.qcow2"), moments[sync])
        self.assertEqual({node["drv"] for node in daemon.qmp.execute("query-named-block-nodes")}, {"file", "qcow2"})
        self.assertEqual(len(daemon.qmp.execute("query-named-block-nodes", flat=True)), 4)
        self.judge(daemon)
        names = json.loads(qemu_img("info", "--output=json", self.path("drive-top.qcow2")))
        self.assertEqual(names["backing-filename"], self.chain[0][1])

    def test_frozen_view(self):
        """Read through an export while it is frozen, and copied from there by a job that gives up what it has."""
        daemon = self.serve()
        self.start_guests(daemon)
        time.sleep(0.1)
        self.add_target(daemon, "scratch")
        asked = time.monotonic()
        daemon.qmp.execute("blockdev-add", {"driver": "copy-before-write", "node-name": "cbw", "file": "top",
                                            "target": "scratch"})
        moments = (asked, time.monotonic())
        daemon.qmp.execute("blockdev-add", {"driver": "snapshot-access", "node-name": "frozen", "file": "cbw"})
        daemon.export("frozen", writable=False)
        for name in ("first", "second"):
            time.sleep(0.1)
            qemu_img("convert", "-O", "qcow2", daemon.uri("frozen"), self.path(f"{name}.qcow2"))
            self.check(self.path(f"{name}.qcow2"), moments)
        daemon.qmp.execute("block-export-del", id="export-frozen", mode="hard")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-frozen")
        path = self.add_target(daemon, "copy")
        self.start(daemon, **{"job-id": "j", "device": "frozen", "target": "copy", "sync": "full", "discard-source": True})
        self.assertIsNone(daemon.qmp.wait_job("j"))
        self.check(path, moments)
        with self.assertRaises(QmpError):
            daemon.qmp.execute("blockdev-del", {"node-name": "cbw"})
        for node in ("frozen", "cbw", "scratch"):
            daemon.qmp.execute("blockdev-del", {"node-name": node})
        self.judge(daemon)
        self.assertEqual(self.raw(self.path("first.qcow2")), self.raw(self.path("second.qcow2")))

    def test_several_at_one_moment(self):
        """Two of one disk, and one of another, which the second guest writes to."""
        daemon = self.serve()
        daemon.add_qcow2("other", self.create_image("other.qcow2", SIZE))
        daemon.export("other", iothread="io1")
        blocks = SIZE // BLOCK
        seed = self.random.randrange(1 << 20) * GUESTS
        guests = [Writer(self.directory, daemon.uri(name), seed + i, 0, blocks) for i, name in enumerate(("guest0", "other"))]
        time.sleep(0.1)
        daemon.qmp.execute("block-dirty-bitmap-add", node="top", name="since")
        paths = {name: self.add_target(daemon, name) for name in ("one", "two", "three")}
        backup = {"sync": "full", "speed": 2 * MIB}
        actions = [
            {"type": "block-dirty-bitmap-clear", "data": {"node": "top", "name": "since"}},
            *({"type": "blockdev-backup", "data": {"job-id": job, "device": device, "target": job, **backup}}
              for job, device in (("one", "top"), ("two", "top"), ("three", "other"))),
        ]
        with self.assertRaises(QmpError):
            self.start(daemon, "transaction", actions=[*actions, {"type": "abort", "data": {}}])
        self.assertEqual(daemon.qmp.jobs(), {})
        moments = self.start(daemon, "transaction", actions=actions)
        for job in paths:
            self.end_slowly(daemon, job, 0.05)
        writes = [guest.end() for guest in guests]
        daemon.stop()
        one, two, three = (self.raw(paths[name]) for name in ("one", "two", "three"))
        self.assertEqual(one, two)
        check_cut([(one, self.original, writes[0]), (three, bytes(SIZE), writes[1])], *moments)

    def test_mixes(self):
        """Backups among other jobs, in random order."""
        for _ in range(scale(2, 300)):
            self.mix()

    def mix(self):
        self.copies = []
        self.active = "top"
        daemon = self.serve(("base", "a", "b", "top"))
        self.start_guests(daemon)
        log, jobs, targets = [], {}, {}
        daemon.qmp.execute("block-dirty-bitmap-add", node="top", name="bits")
        for i in range(self.random.randrange(4, 9)):
            job = f"job{i}"
            move = self.random.choice(["backup", "backup", "backup", "commit", "stream", "grow", "snapshot", "mirror", "rest"])
            log.append(move)
            with contextlib.suppress(QmpError):
                getattr(self, f"mix_{move}")(daemon, job, jobs, targets)
        for job in jobs:
            with contextlib.suppress(QmpError):
                daemon.qmp.execute("block-job-set-speed", device=job, speed=0)
        try:
            for job, ready in jobs.items():
                if ready:
                    daemon.qmp.wait_event("BLOCK_JOB_READY", device=job)
                    daemon.qmp.execute("block-job-cancel", device=job)
                error = daemon.qmp.wait_job(job)
                self.assertIsNone(error, f"{job}: {log}")
            writes = self.end_guests()
            daemon.stop()
            for path, moments in targets.values():
                check_cut([(self.raw(path), self.original, writes)], *moments)
        except AssertionError as problem:
            raise AssertionError(f"{log}: {problem}") from problem
        for name in os.listdir(self.directory):
            os.unlink(self.path(name))

    def mix_backup(self, daemon, job, jobs, targets):
        path = self.add_target(daemon, job, f"cluster_size={self.random.choice(['4k', '64k', '512k'])}")
        bitmap = {"bitmap": "bits", "bitmap-mode": "on-success"} if self.active == "top" else {}
        more = self.random.choice([{}, {"compress": True}, bitmap, {"on-cbw-error": "break-snapshot"}])
        targets[job] = (path, self.start(daemon, **{
            "job-id": job, "device": self.active, "target": job, "sync": "full", "speed": self.random.choice([0, MIB, 4 * MIB]),
            **more}))
        jobs[job] = False
        time.sleep(self.random.random() * 0.05)

    def mix_commit(self, daemon, job, jobs, targets):
        top, base = self.random.choice([("a", "base"), ("b", "a"), ("b", "base")])
        daemon.qmp.execute("block-commit", {"job-id": job, "device": self.active, "top-node": top, "base-node": base,
                                            "speed": MIB})
        jobs[job] = False

    def mix_stream(self, daemon, job, jobs, targets):
        daemon.qmp.execute("block-stream", {"job-id": job, "device": self.random.choice([self.active, "b"]), "speed": MIB})
        jobs[job] = False

    def mix_mirror(self, daemon, job, jobs, targets):
        self.add_target(daemon, job)
        daemon.qmp.execute("blockdev-mirror", {"job-id": job, "device": self.active, "target": job, "sync": "full"})
        jobs[job] = True

    def mix_snapshot(self, daemon, job, jobs, targets):
        if self.active == "top" and self.random.random() < 0.5:
            path = self.create_image(f"{job}.qcow2", SIZE)
            daemon.add_qcow2(job, path)
            daemon.qmp.execute("blockdev-snapshot", {"node": "top", "overlay": job})
            self.active = job

    def mix_grow(self, daemon, job, jobs, targets):
        daemon.qmp.execute("block_resize", {"node-name": self.random.choice(["a", "b"]), "size": SIZE + MIB})

    def mix_rest(self, daemon, job, jobs, targets):
        time.sleep(0.1)


class Failing(BackupCase):
    """A target that fails, and who suffers for it."""

    def serve_failing(self, *rules):
        daemon = self.serve()
        path = self.create_image("target.qcow2", SIZE)
        daemon.add_file("target-raw", path)
        daemon.qmp.execute("blockdev-add", {"driver": "blkdebug", "node-name": "target-file", "image": "target-raw",
                                            "inject-error": list(rules)})
        daemon.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "target", "file": "target-file"})
        return daemon, path

    def place(self):
        """A cluster that holds more than zeroes."""
        at = next(i for i, byte in enumerate(self.original) if byte)
        return at // (64 * KIB) * 64 * KIB

    def write(self, daemon):
        with nbd_handle(daemon.uri("guest0")) as handle:
            handle.pwrite(b"n" * 4 * KIB, self.place())

    def test_the_guest_suffers(self):
        import nbd  # pylint: disable=import-outside-toplevel

        daemon, path = self.serve_failing({"event": "write_aio", "errno": 28, "once": True})
        self.start(daemon, **{"job-id": "j", "device": "top", "target": "target", "sync": "none"})
        with self.assertRaises(nbd.Error):
            self.write(daemon)
        self.write(daemon)  # the fault is over
        daemon.qmp.execute("block-job-cancel", device="j")
        daemon.qmp.wait_event("BLOCK_JOB_CANCELLED", device="j")
        daemon.stop()
        start = self.place()
        self.assertEqual(self.raw(path)[start : start + 64 * KIB], self.original[start : start + 64 * KIB])

    def test_the_copy_suffers(self):
        daemon, _ = self.serve_failing({"event": "write_aio", "errno": 28, "once": True})
        self.start(daemon, **{"job-id": "j", "device": "top", "target": "target", "sync": "none",
                              "on-cbw-error": "break-snapshot"})
        self.write(daemon)
        event = daemon.qmp.wait_event("BLOCK_JOB_COMPLETED", device="j")
        self.assertIn("No space left", event["data"]["error"])
        self.assertEqual(event["data"]["target-state"], "partial")

    def test_the_job_waits_for_room(self):
        daemon, path = self.serve_failing({"event": "write_aio", "errno": 28, "once": True})
        moments = self.start(daemon, **{"job-id": "j", "device": "top", "target": "target", "sync": "full",
                                        "on-target-error": "enospc"})
        event = daemon.qmp.wait_event("BLOCK_JOB_ERROR", device="j")
        self.assertEqual(event["data"], {"device": "j", "operation": "write", "action": "stop"})
        self.start_guests(daemon)
        time.sleep(0.2)
        daemon.qmp.execute("block-job-resume", device="j")
        self.assertIsNone(daemon.qmp.wait_job("j"))
        writes = self.end_guests()
        daemon.stop()
        check_cut([(self.raw(path), self.original, writes)], *moments)


class Alike(BackupCase):
    """What the peer answers and leaves."""

    def both(self, function):
        """The results of one and the same on two daemons."""
        results = []
        for command in (None, [PEER]):
            if command and IS_PEER:
                continue
            daemon = self.daemon(command=command)
            results.append(function(daemon, len(results)))
            daemon.stop()
        return results

    def add_two(self, daemon, number):
        for name in ("s", "t"):
            path = self.create_image(f"{name}{number}.qcow2", MIB)
            daemon.add_qcow2(name, path)
        daemon.add_qcow2("large", self.create_image(f"large{number}.qcow2", 2 * MIB))

    def test_refusals(self):
        """Word for word."""
        rows = [
            {"device": "gone"}, {"target": "gone"}, {"target": "s"}, {"target": "large"}, {"speed": -1},
            {"sync": "incremental"}, {"sync": "bitmap"}, {"sync": "bitmap", "bitmap": "gone"}, {"bitmap": "b"},
            {"bitmap-mode": "never"}, {"x-perf": {"max-workers": 0}}, {"x-perf": {"max-chunk": -1}},
            {"x-perf": {"max-chunk": 1000}},
            *({"sync": sync, "bitmap": "b", "bitmap-mode": mode}
              for sync, mode in (("none", "never"), ("none", "always"), ("full", "never"), ("top", "never"),
                                 ("incremental", "never"), ("incremental", "always"))),
        ]

        def ask(daemon, number):
            self.add_two(daemon, number)
            daemon.qmp.execute("block-dirty-bitmap-add", node="s", name="b")
            answers = []
            for row in rows:
                try:
                    daemon.qmp.execute("blockdev-backup", {"job-id": "j", "device": "s", "target": "t", "sync": "full", **row})
                    answers.append((row, None))
                except QmpError as error:
                    answers.append((row, error.desc.split(";")[0]))
            return answers

        own, *peers = self.both(ask)
        self.assertTrue(all(answer for _, answer in own), own)
        for peer in peers:
            self.assertEqual(own, peer)

    def bitmap_end(self, daemon, sync, mode, end):
        """Bytes in the bitmap after a job that ended well, or was cancelled when a guest had written more."""
        with nbd_handle(daemon.uri("s")) as handle:
            handle.pwrite(b"1" * 128 * KIB, 0)
            daemon.qmp.events.clear()  # a job that was cancelled may have been pending
            arguments = {"sync": sync, "bitmap": "b", **({"bitmap-mode": mode} if mode else {})}
            daemon.qmp.execute("blockdev-backup", {"job-id": "j", "device": "s", "target": "t", "speed": 1,
                                                   "auto-finalize": False, **arguments})
            handle.pwrite(b"2" * 64 * KIB, 512 * KIB)
        if end == "cancel":
            daemon.qmp.execute("block-job-cancel", device="j")
            daemon.qmp.wait_event("BLOCK_JOB_CANCELLED", device="j")
        else:
            with contextlib.suppress(QmpError):  # it may be pending already
                daemon.qmp.execute("block-job-set-speed", device="j", speed=0)
            daemon.qmp.wait_event("BLOCK_JOB_PENDING", id="j")
            daemon.qmp.execute("job-finalize", id="j")
            daemon.qmp.wait_event("BLOCK_JOB_COMPLETED", device="j")
        nodes = {node["node-name"]: node for node in daemon.qmp.execute("query-named-block-nodes")}
        (bitmap,) = nodes["s"]["dirty-bitmaps"]
        self.assertFalse(bitmap["busy"])
        return bitmap["count"]

    def test_ends_of_bitmaps(self):
        rows = [("incremental", None, "success"), ("incremental", None, "cancel"), ("bitmap", "never", "success"),
                ("bitmap", "never", "cancel"), ("bitmap", "always", "success"), ("bitmap", "on-success", "success"),
                ("bitmap", "on-success", "cancel"), ("full", "on-success", "success"), ("full", "on-success", "cancel"),
                ("full", "always", "success")]

        def ask(daemon, number):
            self.add_two(daemon, number)
            daemon.nbd_server()
            daemon.export("s")
            counts = []
            for row in rows:
                daemon.qmp.execute("block-dirty-bitmap-add", node="s", name="b")
                counts.append((row, self.bitmap_end(daemon, *row)))
                daemon.qmp.execute("block-dirty-bitmap-remove", node="s", name="b")
            return counts

        own, *peers = self.both(ask)
        self.assertEqual(dict(own)["incremental", None, "success"], 64 * KIB)
        self.assertEqual(dict(own)["incremental", None, "cancel"], 192 * KIB)
        for peer in peers:
            self.assertEqual(own, peer)
