# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations side by side on one chain, for real: a daemon, files, and a guest that writes and verifies all the time.

These are the pairs that must be admitted (test/data/access-scenarios.json) and that people wait for most. Each goes to
its end here, with everything under way at once, and then:

- the guest has found what it wrote, always, and once more at the end, through the export;
- a backup shows what the disk showed at its start: a frozen copy, taken then, is compared with it byte for byte; two
  that were begun in one transaction are the same while the guest writes;
- the daemon is gone, what is stale or out of the chain is deleted, and the peer checks every image and reads the disk.
"""
import contextlib
import os
import time

from harness import FULL, IS_PEER, KIB, MIB, SANITIZED, QmpError, TestCase, image_check, image_compare, nbd_handle, qemu_img
from harness import qemu_io
from verifying import Region

SIZE = 16 * MIB
GUEST = (2 * MIB, 6 * MIB)  # where the guest writes: offset, length
SLOW = 6 * MIB  # bytes per second: the jobs overlap
NAMES = ("base", "a", "b", "c", "top")
ROUNDS = 60 if FULL else 1


class Together(TestCase):
    time_limit = 60
    long_builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the peer refuses most of it")
        self.guest = None

    # The stage.

    def open_chain(self):
        """A chain of five under a guest; the jobs are slow until told to hurry."""
        self.log = []
        self.targets = []
        below = None
        for number, name in enumerate(NAMES):
            path = self.create_image(f"{name}.qcow2", SIZE, backing=below)
            commands = [f"write -q -P {16 * number + 1} {number}M {7 * MIB}", f"write -q -z {13 + number % 3}M 300k"]
            for mark in range(6):
                place = self.random.randrange(SIZE // (64 * KIB) - 4) * 64 * KIB
                commands.append(f"write -q -P {16 * number + mark + 2} {place} {self.random.choice([4, 64, 200])}k")
            qemu_io(path, *commands)
            below = path
        original = self.path("original.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", below, original)
        self.live = self.daemon("--object", "iothread,id=io0")
        self.live.add_chain([(name, self.path(f"{name}.qcow2")) for name in NAMES], discard="unmap")
        self.live.nbd_server()
        self.live.export("top", name="disk", iothread="io0")
        for ledger in os.listdir(self.directory):
            if ledger.startswith("guest"):
                os.unlink(self.path(ledger))
        self.region = Region(self.directory, "guest", self.seed, *GUEST, 4096, original)
        self.write()

    def write(self):
        self.guest = self.region.start(self.live.nbd_path, "disk", "--depth", "8", "--reads", "30")
        self.guest.wait_progress(20)

    def rest(self):
        self.guest.stop()
        self.guest = None

    def frozen(self, name):
        """What the disk shows now, while the guest rests."""
        path = self.path(f"{name}.raw")
        with nbd_handle(self.live.uri("disk")) as handle, open(path, "wb") as out:
            for offset in range(0, SIZE, MIB):
                out.write(handle.pread(MIB, offset))
        return path

    def target(self, name, backing=None):
        """An empty image with a node of its own."""
        path = self.path(f"{name}.qcow2")
        below = ["-b", f"{backing}.qcow2", "-F", "qcow2"] if backing else []
        qemu_img("create", "-q", "-u", "-f", "qcow2", *below, path, str(SIZE))
        self.live.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": name, "backing": None,
                                               "file": {"driver": "file", "filename": path}})
        self.targets.append(name)
        return name

    # Jobs.

    def begin(self, command, job, **arguments):
        self.log.append(f"{command} {job}")
        self.live.qmp.execute(command, {"job-id": job, "speed": SLOW, "auto-finalize": False}, **arguments)

    def commit(self, job, top, base):
        self.begin("block-commit", job, device="top", top_node=top, base_node=base)

    def mirror(self, job, node, target, **more):
        self.begin("blockdev-mirror", job, device=node, target=self.target(target), sync="full", **more)

    def backup(self, job, node, target):
        self.begin("blockdev-backup", job, device=node, target=self.target(target), sync="full")

    def two_backups_at_once(self, jobs, node, targets):
        actions = []
        for job, target in zip(jobs, targets):
            data = {"job-id": job, "device": node, "target": self.target(target), "sync": "full", "speed": SLOW,
                    "auto-finalize": False}
            actions.append({"type": "blockdev-backup", "data": data})
        self.live.qmp.execute("transaction", {"actions": actions})

    def overlap(self, *jobs):
        """All are under way, and the guest is not held up."""
        states = self.live.qmp.jobs()
        for job in jobs:
            self.assertIn(states[job]["status"], ("running", "ready"), f"they do not meet: {states}")
        self.guest.wait_progress(20)
        for job in jobs:
            with contextlib.suppress(QmpError):  # pending by now
                self.live.qmp.execute("block-job-set-speed", device=job, speed=0)

    def status(self, job):
        return self.live.qmp.jobs()[job]["status"]

    def await_status(self, job, *wanted):
        deadline = time.monotonic() + 30
        while (status := self.status(job)) not in wanted:
            self.assertLess(time.monotonic(), deadline, f"{job} is {status}")
            time.sleep(0.005)
        return status

    def end(self, job, complete=True):
        """The last step, in which a mirror's target takes its place or stays behind; it must go well."""
        if self.await_status(job, "ready", "pending") == "ready":
            if complete:
                self.live.qmp.execute("job-complete", id=job)
            else:
                self.live.qmp.execute("block-job-cancel", device=job)
            self.await_status(job, "pending")
        self.live.qmp.execute("job-finalize", id=job)
        self.assertIsNone(self.live.qmp.wait_job(job), f"{job} after {self.log}")
        self.log.append(f"end {job}")

    # What must be true at the end.

    def close(self, disk, *gone):
        """The guest has its disk; the daemon goes, and then what is `gone`. The peer reads the rest: `disk` is the
        image that the guest has by then."""
        if self.guest:
            self.guest.wait_progress(20)
            self.rest()
        self.region.verify(self.live.nbd_path, "disk")
        end = self.frozen("end")
        self.live.stop()
        self.daemons.remove(self.live)
        for name in gone:
            os.unlink(self.path(f"{name}.qcow2"))
        for name in (*NAMES, *self.targets):
            if name not in gone:
                image_check(self.path(f"{name}.qcow2"))
                qemu_img("info", "--backing-chain", "-f", "qcow2", self.path(f"{name}.qcow2"))
        image_compare(self.path(f"{disk}.qcow2"), end, second_format="raw")
        self.region.verify_file(end)

    def check_copy(self, target, frozen):
        image_compare(self.path(f"{target}.qcow2"), frozen, second_format="raw")

    def check_chain(self, *names):
        self.assertEqual(self.live.chain_of(names[0]), list(names), str(self.log))

    def rounds(self, body):
        for number in range(ROUNDS // (4 if SANITIZED else 1) or 1):
            self.random.seed(f"{self.seed} {self.id()} {number}")
            with self.subTest(round=number):
                self.open_chain()
                body()
            for daemon in list(self.daemons):  # of a round that failed
                daemon.kill()
            self.daemons.clear()

    # The tests.

    def test_two_commits_in_disjoint_segments(self):
        self.rounds(self.two_commits)

    def two_commits(self):
        orders = [("lower", "upper"), ("upper", "lower")]
        for job in self.random.choice(orders):
            self.commit(job, *(("a", "base") if job == "lower" else ("c", "b")))
        self.overlap("lower", "upper")
        for job in self.random.choice(orders):
            self.end(job)
            self.guest.wait_progress(10)
        self.check_chain("top", "b", "base")
        self.close("top", "a", "c")

    def test_backup_and_mirror_of_the_top_during_a_commit_below(self):
        self.rounds(self.copies_above_a_commit)

    def copies_above_a_commit(self):
        starts = [lambda: self.commit("commit", "c", "a"), lambda: self.mirror("mirror", "top", "copy"), self.frozen_backup]
        self.random.shuffle(starts)
        for start in starts:
            start()
        self.overlap("commit", "mirror", "backup")
        ends = ["commit", "backup"]
        self.random.shuffle(ends)
        for job in ends:
            self.end(job)
        self.await_status("mirror", "ready")
        self.rest()
        self.end("mirror", complete=False)
        self.check_chain("top", "a", "base")
        copy = self.frozen("copy")
        self.write()
        self.close("top", "b", "c")
        self.check_copy("backup-target", self.path("before.raw"))
        self.check_copy("copy", copy)

    def frozen_backup(self):
        """With a frozen copy of the moment at which it begins: the guest rests, and goes on at once afterwards."""
        self.rest()
        self.frozen("before")
        self.backup("backup", "top", "backup-target")
        self.write()

    def test_two_backups_and_a_mirror_of_one_node_at_once(self):
        self.rounds(self.three_copies)

    def three_copies(self):
        self.mirror("mirror", "top", "copy")
        self.two_backups_at_once(("one", "two"), "top", ("first", "second"))
        self.overlap("mirror", "one", "two")
        self.end("two")
        self.end("one")
        self.end("mirror")  # the guest is on the copy from here on
        self.guest.wait_progress(20)
        self.close("copy")
        image_compare(self.path("first.qcow2"), self.path("second.qcow2"))

    def test_mirror_of_a_middle_node_with_replace_while_the_guest_writes_at_the_top(self):
        self.rounds(self.replace_in_the_middle)

    def replace_in_the_middle(self):
        self.mirror("mirror", "b", "new-b", replaces="b")
        self.overlap("mirror")
        self.end("mirror")
        self.check_chain("top", "c", "new-b")
        self.live.qmp.execute("blockdev-del", node_name="b")
        self.guest.wait_progress(20)
        self.close("top", "b", "a", "base")

    def test_snapshot_of_the_top_during_a_backup(self):
        self.rounds(self.snapshot_during_a_backup)

    def snapshot_during_a_backup(self):
        self.frozen_backup()
        self.target("overlay", backing="top")
        self.overlap("backup")
        self.live.qmp.execute("blockdev-snapshot", node="top", overlay="overlay")
        self.check_chain("overlay", *reversed(NAMES))
        self.guest.wait_progress(20)
        self.end("backup")
        self.close("overlay")
        self.check_copy("backup-target", self.path("before.raw"))

    def test_commit_of_the_image_at_which_a_stream_ends_during_its_backup(self):
        self.rounds(self.commit_under_a_stream)

    def commit_under_a_stream(self):
        """The backup's filter stays between the stream and what the commit leaves."""
        qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", self.path("a.qcow2"), self.path("a.raw"))
        self.begin("block-stream", "stream", device="top", base_node="base")
        self.backup("backup", "a", "backup-target")
        self.commit("commit", "a", "base")
        self.overlap("stream", "backup", "commit")
        ends = ["commit", "backup"]
        self.random.shuffle(ends)
        ends.insert(self.random.randrange(1, 3), "stream")
        for job in ends:
            self.end(job)
            self.guest.wait_progress(10)
        self.check_chain("top", "base")
        self.close("top", "a", "b", "c")
        self.check_copy("backup-target", self.path("a.raw"))

    def test_everything_at_once(self):
        self.rounds(self.everything)

    def everything(self):
        """Six operations on one chain: a commit at the bottom, a stream at the top's foot, a backup, a mirror of a
        middle image that takes its place, a mirror of the top, and a snapshot in between."""
        starts = [
            lambda: self.commit("commit", "a", "base"),
            self.frozen_backup,
            lambda: self.mirror("middle", "c", "new-c", replaces="c"),
            lambda: self.mirror("copy", "top", "copy-target"),
        ]
        self.random.shuffle(starts)
        for start in starts:
            start()
        self.target("overlay", backing="top")
        self.overlap("commit", "backup", "middle", "copy")
        self.live.qmp.execute("blockdev-snapshot", node="top", overlay="overlay")
        self.guest.wait_progress(20)
        ends = ["commit", "backup", "middle"]
        self.random.shuffle(ends)
        for job in ends:
            self.end(job)
        self.end("copy", complete=False)
        self.check_chain("overlay", "top", "new-c")
        self.close("overlay", "a", "b", "c", "base")
        self.check_copy("backup-target", self.path("before.raw"))
        image_compare(self.path("copy-target.qcow2"), self.path("top.qcow2"))  # the mirror stayed with its node
