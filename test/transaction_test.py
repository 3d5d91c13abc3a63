# SPDX-License-Identifier: LGPL-2.1-or-later
"""Transactions: all or nothing, at one point in time over many disks, quickly, and waiting for their turn as one.

The guest of several disks writes a number to each, one disk after the other, and only goes on when the write before has
been answered. So in what a transaction has frozen no later disk may have a number that an earlier one has not: that
would be a point in time that never was.
"""
import hashlib
import json
import os
import struct
import sys
import threading
import time

from harness import IS_PEER, KIB, MIB, PEER, SLOWNESS, QmpError, TestCase, image_check, nbd_handle, qemu_img, scale

DISKS = 8
SIZE = 8 * MIB
HOLD_LIMIT = 0.02 * SLOWNESS  # seconds that writers of all disks are held up


def action(kind, **data):
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


class Writers(threading.Thread):
    """Writes numbers to all disks in turn, and remembers how long the slowest request took since it was last asked."""

    def __init__(self, uris):
        super().__init__(daemon=True)
        self.uris = uris
        self.going = True
        self.number = 0
        self.longest = 0.0
        self.error = None

    def run(self):
        try:
            self.write()
        except Exception as error:  # pylint: disable=broad-except
            self.error = error

    def write(self):
        import nbd  # pylint: disable=import-outside-toplevel

        handles = []
        for uri in self.uris:
            handle = nbd.NBD()
            handle.connect_uri(uri)
            handles.append(handle)
        while self.going:
            self.number += 1
            data = struct.pack("<Q", self.number) * 512
            for handle in handles:
                start = time.monotonic()
                handle.pwrite(data, self.number % 64 * 64 * KIB)
                handle.pwrite(data, 0)
                self.longest = max(self.longest, time.monotonic() - start)
        for handle in handles:
            handle.shutdown()

    def wait(self, more):
        deadline = time.monotonic() + 20 * SLOWNESS
        goal = self.number + more
        while self.number < goal:
            if self.error:
                raise self.error
            if time.monotonic() > deadline:
                raise AssertionError("the guest makes no progress")
            time.sleep(0.001)

    def end(self):
        self.going = False
        self.join(20 * SLOWNESS)
        if self.error:
            raise self.error


class ManyDisks(TestCase):
    """One point in time over many disks."""

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("disks are opened as ours takes them")
        self.server = self.daemon("--object", "iothread,id=io0", "--object", "iothread,id=io1")
        self.server.nbd_server()
        for disk in range(DISKS):
            self.server.add_qcow2(f"d{disk}", self.create_image(f"d{disk}.qcow2", SIZE))
            self.server.export(f"d{disk}", name=f"e{disk}", export_id=f"e{disk}", iothread=f"io{disk % 2}")
        self.writers = Writers([self.server.uri(f"e{disk}") for disk in range(DISKS)])

    def overlays(self, rounds):
        """The names of overlays that are ready to be put over the disks."""
        for number in range(rounds):
            for disk in range(DISKS):
                name = f"o{number}-{disk}"
                self.server.add_qcow2(name, self.create_image(f"{name}.qcow2", SIZE))

    def frozen(self, node):
        """The number that a disk had at that moment."""
        self.server.export(node, writable=False, name="frozen", export_id="frozen")
        with nbd_handle(self.server.uri("frozen")) as handle:
            numbers = set(struct.unpack("<512Q", handle.pread(4096, 0)))
        self.server.qmp.execute("block-export-del", {"id": "frozen", "mode": "hard"})
        self.server.qmp.wait_event("BLOCK_EXPORT_DELETED", id="frozen")
        self.assertEqual(len(numbers), 1, "a torn write")
        return numbers.pop()

    def assert_one_point(self, numbers):
        for earlier, later in zip(numbers, numbers[1:]):
            self.assertGreaterEqual(earlier, later, numbers)
        self.assertLessEqual(numbers[0] - numbers[-1], 1, numbers)

    def snapshot(self, number, below):
        actions = [action("blockdev-snapshot", node=below[disk], overlay=f"o{number}-{disk}") for disk in range(DISKS)]
        if number % 2:
            actions.reverse()
        self.server.qmp.execute("transaction", actions=actions)


class OnePointInTime(ManyDisks):
    time_limit = 120

    def test_snapshots_over_all_disks_are_one_point_in_time(self):
        rounds = scale(6, 60)
        self.overlays(rounds)
        self.writers.start()
        below = [f"d{disk}" for disk in range(DISKS)]
        seen = []
        for number in range(rounds):
            self.writers.wait(5)
            self.snapshot(number, below)
            seen.append(below)
            below = [f"o{number}-{disk}" for disk in range(DISKS)]
        self.writers.wait(5)
        self.writers.end()
        places = [info["node-name"] for info in self.server.qmp.execute("query-block-exports")]
        self.assertEqual(places, below)
        last = 0
        for nodes in seen:
            numbers = [self.frozen(node) for node in nodes]
            self.assert_one_point(numbers)
            self.assertGreater(numbers[0], last, "the guest went on between")
            last = numbers[0]
        self.server.stop()
        for disk in range(DISKS):
            image_check(self.path(f"o{rounds - 1}-{disk}.qcow2"))


class HoldUp(ManyDisks):
    exclusive = True

    def test_writers_of_all_disks_are_held_up_for_a_moment_only(self):
        rounds = scale(10, 30)
        self.overlays(rounds)
        self.writers.start()
        below = [f"d{disk}" for disk in range(DISKS)]
        longest = []
        for number in range(rounds):
            self.writers.wait(50)
            self.writers.longest = 0.0
            self.snapshot(number, below)
            below = [f"o{number}-{disk}" for disk in range(DISKS)]
            self.writers.wait(2)
            longest.append(self.writers.longest)
        self.writers.end()
        # Noise of the machine makes one slow now and then; a wait that adds up makes every one slow.
        self.assertLess(sorted(longest)[len(longest) // 2], HOLD_LIMIT, longest)


class AllOrNothing(TestCase):
    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("it is compared with the peer in one test")
        self.server = self.daemon()
        self.qmp = self.server.qmp
        self.images = self.create_chain(["base", "mid", "top"], SIZE)
        self.server.add_chain(self.images)
        for name in ("over", "over2"):
            self.server.add_qcow2(name, self.create_image(f"{name}.qcow2", SIZE))
        self.server.nbd_server()
        self.server.export("top", name="e", export_id="e")

    def transaction(self, *actions, **more):
        return self.qmp.execute("transaction", {"actions": list(actions), **more})

    def state(self):
        access = self.qmp.execute("query-access")
        holders = []
        for holder in access["holders"]:
            holder.pop("since")
            holders.append(json.dumps(holder, sort_keys=True))
        nodes = self.qmp.execute("query-named-block-nodes", flat=True)
        graph = self.qmp.execute("query-graph")
        files = {}
        for entry in os.scandir(self.directory):
            if entry.name.endswith(".qcow2"):
                info = json.loads(qemu_img("info", "-U", "--output=json", entry.path))
                with open(entry.path, "rb") as content:
                    content.seek(64 * KIB)  # a header may say the same in other words
                    files[entry.name] = (hashlib.sha256(content.read()).hexdigest(), info.get("backing-filename"))
        return {
            "holders": sorted(holders),
            "waiting": access["waiting"],
            "nodes": nodes,
            "edges": sorted(json.dumps(edge, sort_keys=True) for edge in graph["edges"]),
            "jobs": self.qmp.jobs(),
            "exports": self.qmp.execute("query-block-exports"),
            "files": files,
        }

    def test_what_is_refused_has_changed_nothing(self):
        parts = [
            action("block-dirty-bitmap-add", node="top", name="b0"),
            action("blockdev-snapshot", node="mid", overlay="over"),
            action("blockdev-snapshot", node="top", overlay="over2"),
            action("block-dirty-bitmap-add", node="over2", name="b1"),
        ]
        ends = [
            (action("abort"), "aborted using Abort action"),
            (action("blockdev-snapshot", node="base", overlay="over"), "already in use"),
            (action("block-dirty-bitmap-remove", node="top", name="none"), "not found"),
        ]
        before = self.state()
        for count in range(len(parts) + 1):
            for end, sentence in ends:
                if "already" in sentence and count < 2:
                    continue
                with self.subTest(count=count, end=end):
                    self.assert_refused(sentence, self.transaction, *parts[:count], end)
                    self.assertEqual(self.state(), before)
        self.transaction(*parts)
        self.assertEqual(self.server.chain_of("over2"), ["over2", "top", "over", "mid", "base"])
        self.server.stop()
        for name in ("over2", "top", "over", "mid"):
            image_check(self.path(f"{name}.qcow2"))
        info = json.loads(qemu_img("info", "--output=json", self.path("top.qcow2")))
        self.assertEqual(os.path.basename(info["backing-filename"]), "over.qcow2")

    def test_a_snapshot_inside_is_taken_back_too(self):
        parts = [action("blockdev-snapshot-internal-sync", device=name, name="s") for name in ("top", "over", "over2")]
        self.assert_refused("aborted", self.transaction, *parts, action("abort"))
        nodes = self.qmp.execute("query-named-block-nodes", flat=True)
        self.assertFalse(any(node["image"].get("snapshots") for node in nodes))
        self.transaction(*parts)
        nodes = {node["node-name"]: node for node in self.qmp.execute("query-named-block-nodes", flat=True)}
        for name in ("top", "over", "over2"):
            self.assertEqual([info["name"] for info in nodes[name]["image"]["snapshots"]], ["s"])

    def test_a_dry_run_says_what_all_would_claim(self):
        before = self.state()
        arguments = {"actions": [action("blockdev-snapshot", node="top", overlay="over"),
                                 action("blockdev-snapshot", node="mid", overlay="over2")]}
        check = self.qmp.execute("access-check", {"command": "transaction", "arguments": arguments})
        self.assertTrue(check["admitted"])
        self.assertEqual({claim["node"] for claim in check["claims"]}, {"top", "over", "mid", "over2"})
        self.assertEqual(self.state(), before)

    def test_exports_and_jobs_begin_with_the_others_or_not(self):
        qemu_img("create", "-q", "-f", "raw", self.path("copy.raw"), str(SIZE))
        file = {"driver": "file", "filename": self.path("copy.raw")}
        self.qmp.execute("blockdev-add", {"driver": "raw", "node-name": "copy", "file": file})
        parts = [
            action("block-export-add", type="nbd", id="old", name="old", node_name="top"),
            action("blockdev-backup", device="top", target="copy", sync="full", job_id="b", speed=64 * KIB),
            action("block-commit", device="top", top_node="mid", base_node="base", job_id="c", speed=64 * KIB),
            action("block-stream", device="over2", job_id="s"),
            action("blockdev-snapshot", node="top", overlay="over"),
            action("block-export-del", id="e"),
        ]
        self.qmp.drain_events(0.05)
        before = self.state()
        for count in range(len(parts) + 1):
            self.assert_refused("aborted", self.transaction, *parts[:count], action("abort"))
            deadline = time.monotonic() + 5 * SLOWNESS
            while self.state() != before and time.monotonic() < deadline:
                time.sleep(0.01)  # the id of an export is free when its clients are gone
            self.assertEqual(self.state(), before)
        self.assertEqual(self.qmp.drain_events(0.05), [], "of what has never been nobody hears")
        self.transaction(*parts)
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", id="e")
        exports = {info["id"]: info["node-name"] for info in self.qmp.execute("query-block-exports")}
        self.assertEqual(exports, {"old": "over"})
        self.assertLessEqual({"b", "c"}, set(self.qmp.jobs()))
        for job in ("b", "c"):
            self.qmp.execute("job-cancel", id=job)
            self.qmp.wait_job(job)

    def test_grouped_jobs_end_together(self):
        for name in ("one", "two"):
            qemu_img("create", "-q", "-f", "raw", self.path(f"{name}.raw"), str(SIZE))
            file = {"driver": "file", "filename": self.path(f"{name}.raw")}
            self.qmp.execute("blockdev-add", {"driver": "raw", "node-name": name, "file": file})
        parts = [action("blockdev-backup", device="top", target="one", sync="full", job_id="b1"),
                 action("blockdev-backup", device="mid", target="two", sync="full", job_id="b2", speed=64 * KIB)]
        self.assert_refused("aborted|grouped", self.transaction, *parts, action("abort"), properties={"completion-mode": "grouped"})
        self.transaction(*parts, properties={"completion-mode": "grouped"})
        deadline = time.monotonic() + 20 * SLOWNESS
        while self.qmp.jobs()["b1"]["status"] != "waiting":
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)
        self.qmp.execute("job-cancel", id="b2")
        for job in ("b1", "b2"):
            self.qmp.wait_event("BLOCK_JOB_CANCELLED", device=job)

    def test_every_action_of_the_schema_is_there(self):
        """One without a row in the table would end the daemon."""
        entries = {entry["name"]: entry for entry in self.qmp.execute("query-qmp-schema")}
        argument = entries[entries["transaction"]["arg-type"]]
        actions = entries[[member["type"] for member in argument["members"] if member["name"] == "actions"][0]]
        kinds = [variant["case"] for variant in entries[actions["element-type"]]["variants"]]
        self.assertLessEqual({"abort", "blockdev-backup", "drive-mirror", "block-export-del"}, set(kinds))
        names = {"node": "none", "name": "none", "target": "none", "bitmaps": [], "overlay": "none", "device": "none", "id": "x",
                 "snapshot-file": "x", "sync": "full", "job-id": "x", "node-name": "none", "type": "nbd"}
        for kind in kinds:
            wrapper = [v["type"] for v in entries[actions["element-type"]]["variants"] if v["case"] == kind][0]
            data = entries[[member["type"] for member in entries[wrapper]["members"] if member["name"] == "data"][0]]
            needed = [member["name"] for member in data.get("members", []) if "default" not in member]
            arguments = {name: names[name] for name in needed if name in names}
            if kind == "blockdev-reopen":
                arguments = {"options": [{"driver": "qcow2", "node-name": "none", "file": "none"}]}
            if kind == "block-stream" or kind == "block-commit":
                arguments["job-id"] = "x"
            with self.subTest(kind=kind):
                self.assertRaises(QmpError, self.transaction, {"type": kind, "data": arguments})
        self.assertEqual(self.qmp.jobs(), {})

    # Waiting.

    def held_up(self, **more):
        """A transaction whose second part has to wait for a commit."""
        commit = {"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base", "speed": 64 * KIB}
        self.qmp.execute("block-commit", commit)
        self.parts = [action("blockdev-snapshot", node="top", overlay="over"),
                      action("blockdev-snapshot", node="base", overlay="over2")]
        before = self.state()
        error = self.assert_refused("'base'.*block-commit j|block-commit j", self.transaction, *self.parts)
        self.assertEqual(error.data["conflicts"][0]["node"], "base")
        self.transaction(*self.parts, **{"on-conflict": "wait", **more})
        after = self.state()
        waiting = after.pop("waiting")
        before.pop("waiting")
        for state in (before, after):
            for job in state["jobs"].values():
                job.pop("current-progress")
            state["holders"] = [holder for holder in state["holders"] if '"id": "j"' not in holder]
            state["files"] = None  # the commit goes on
            state["nodes"] = None
        self.assertEqual(after, before, "who waits has changed nothing")
        self.assertEqual([entry["behind"] for entry in waiting], [["j"]])
        return waiting[0]["id"]

    def processor_time(self):
        with open(f"/proc/{self.server.pid}/stat", encoding="ascii") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def test_it_waits_as_one(self):
        identity = self.held_up()
        busy = self.processor_time()
        time.sleep(0.4)
        self.assertLess(self.processor_time() - busy, 0.2 * SLOWNESS, "it tries in a circle")
        self.assertEqual(self.qmp.execute("query-access")["waiting"][0]["command"], "blockdev-snapshot")
        self.qmp.execute("job-cancel", id="j")
        granted = self.qmp.wait_event("ACCESS_GRANTED", id=identity)["data"]
        self.assertEqual(granted["operation"], "transaction")
        self.assertEqual(self.server.chain_of("over"), ["over", "top", "mid", "over2", "base"])
        self.assertEqual(self.qmp.execute("query-access")["waiting"], [])

    def test_waiting_is_cancelled_as_one(self):
        identity = self.held_up()
        before = self.state()["edges"]
        self.qmp.execute("access-cancel", id=identity)
        self.qmp.wait_event("ACCESS_WAIT_ENDED", id=identity, reason="cancelled")
        self.qmp.execute("job-cancel", id="j")
        self.assertIsNone(self.qmp.wait_job("j"))
        self.assertEqual(self.server.chain_of("top"), ["top", "mid", "base"])
        self.assertTrue(before)

    def test_its_time_is_up(self):
        identity = self.held_up(**{"on-conflict-timeout": 0.2})
        self.qmp.wait_event("ACCESS_WAIT_ENDED", id=identity, reason="timeout")
        self.assertEqual(self.server.chain_of("top"), ["top", "mid", "base"])


class BesideThePeer(TestCase):
    """The same answers to the same commands."""

    SAME = [
        [],
        [action("abort")],
        [action("block-dirty-bitmap-add", node="a", name="b0"), action("abort")],
        [action("block-dirty-bitmap-add", node="a", name="b0"), action("block-dirty-bitmap-clear", node="a", name="b0")],
        [action("block-dirty-bitmap-add", node="a", name="b0")],
        [action("block-dirty-bitmap-clear", node="a", name="none")],
        [action("blockdev-snapshot-internal-sync", device="a", name="s"), action("abort")],
        [action("blockdev-snapshot-internal-sync", device="a", name="s")],
        [action("blockdev-snapshot-internal-sync", device="a", name="s")],
        [action("blockdev-snapshot", node="none", overlay="o")],
        [action("blockdev-snapshot", node="a", overlay="a")],
        [action("blockdev-snapshot", node="a", overlay="o"), action("blockdev-snapshot", node="c", overlay="o")],
        [action("blockdev-snapshot", node="a", overlay="o"), action("blockdev-snapshot", node="c", overlay="p")],
    ]

    def answers(self, command):
        for name in "acop":
            self.create_image(f"{name}.qcow2", SIZE)
        daemon = self.daemon(command=command)
        for name in "acop":
            daemon.add_qcow2(name, self.path(f"{name}.qcow2"))
        answers = []
        for actions in self.SAME:
            for more in ({}, {"properties": {"completion-mode": "grouped"}}):
                try:
                    answer = daemon.qmp.execute("transaction", {"actions": actions, **more}) if actions or not more else {}
                except QmpError as error:
                    answer = [error.error_class, error.desc.split(":")[0] if "overlay" in error.desc else error.desc]
                answers.append((actions, more, answer))
        answers.append(daemon.chain_of("o"))
        answers.append(daemon.chain_of("p"))
        daemon.stop()
        return answers

    def test_the_same_answers(self):
        ours, peers = self.answers(None), self.answers([PEER])
        for our, peer in zip(ours, peers):
            self.assertEqual(our, peer)


if __name__ == "__main__":
    sys.exit("run by test/run.py")
