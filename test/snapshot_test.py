# SPDX-License-Identifier: LGPL-2.1-or-later
"""Snapshots of nodes under a guest that writes and verifies: overlays, one after the other and beside jobs, and
snapshots inside an image. What was frozen stays as it was, and the guest notices nothing."""
import json
import os

from harness import IS_PEER, KIB, MIB, PEER, QmpError, TestCase, image_check, image_compare, qemu_img, scale
from verifying import Region

SIZE = 16 * MIB
SLOW = 256 * KIB


class Snapshots(TestCase):
    time_limit = 120

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("it is compared with the peer in one test")
        self.server = self.daemon("--object", "iothread,id=io0")
        self.qmp = self.server.qmp
        self.server.nbd_server()
        self.images = self.create_chain(["base", "mid", "top"], SIZE)
        self.server.add_chain(self.images)
        self.server.export("top", name="guest", export_id="guest", iothread="io0")
        self.original = self.path("original.raw")
        qemu_img("convert", "-U", "-O", "raw", self.path("top.qcow2"), self.original)
        self.region = Region(self.directory, "guest", self.seed, 0, SIZE, original=self.original)

    def start_guest(self):
        self.client = self.region.start(self.server.nbd_path, "guest", "--depth", "8")
        self.client.wait_progress(100)

    def overlay(self, name):
        self.server.add_qcow2(name, self.create_image(f"{name}.qcow2", SIZE))
        return name

    def place(self):
        return self.qmp.execute("query-block-exports")[0]["node-name"]

    def content(self, name, to):
        """What the image shows by itself, on disk: a copy of it as the peer reads it."""
        qemu_img("convert", "-U", "-O", "raw", self.path(f"{name}.qcow2"), self.path(to))
        return self.path(to)

    def finish(self, top):
        self.client.stop()
        self.region.verify(self.server.nbd_path, "guest")
        self.assertEqual(self.place(), top)
        self.server.stop()
        image_check(self.path(f"{top}.qcow2"))
        self.region.verify_file(self.content(top, "end.raw"))

    def test_one_after_the_other(self):
        self.start_guest()
        top, frozen = "top", []
        for number in range(scale(6, 60)):
            over = f"o{number}"
            if number % 3 == 2:
                self.qmp.execute("blockdev-snapshot-sync", {
                    "node-name": top, "snapshot-file": self.path(f"{over}.qcow2"), "snapshot-node-name": over})
            else:
                self.qmp.execute("blockdev-snapshot", {"node": top, "overlay": self.overlay(over)})
            self.assertEqual(self.place(), over)
            frozen.append((top, self.content(top, f"{top}.frozen")))
            self.client.wait_progress(100)
            top = over
        chain = self.server.chain_of(top)
        self.finish(top)
        self.assertEqual(chain[-3:], ["top", "mid", "base"])
        for name, before in frozen:
            image_compare(self.content(name, "now.raw"), before, "raw", "raw")
            image_check(self.path(f"{name}.qcow2"))

    def test_of_a_node_in_the_middle(self):
        self.start_guest()
        self.qmp.execute("blockdev-snapshot", {"node": "mid", "overlay": self.overlay("between")})
        self.assertEqual(self.server.chain_of("top"), ["top", "between", "mid", "base"])
        self.client.wait_progress(100)
        self.finish("top")
        info = json.loads(qemu_img("info", "--output=json", self.path("top.qcow2")))
        self.assertEqual(os.path.basename(info["backing-filename"]), "between.qcow2")

    def test_during_an_active_commit(self):
        """The commit goes on with the node that it was asked for; the overlay leans on its base afterwards."""
        self.start_guest()
        commit = {"job-id": "j", "device": "top", "base-node": "mid", "speed": SLOW}
        self.qmp.execute("block-commit", commit)
        self.client.wait_progress(50)
        self.qmp.execute("blockdev-snapshot", {"node": "top", "overlay": self.overlay("over")})
        frozen = self.content("top", "frozen.raw")
        self.assertEqual(self.place(), "over")
        self.client.wait_progress(100)
        self.qmp.execute("block-job-set-speed", device="j", speed=0)
        self.qmp.wait_event("BLOCK_JOB_READY", device="j")
        self.qmp.execute("job-complete", id="j")
        self.assertIsNone(self.qmp.wait_job("j"))
        self.assertEqual(self.server.chain_of("over"), ["over", "mid", "base"])
        self.client.wait_progress(100)
        self.finish("over")
        image_compare(self.content("mid", "now.raw"), frozen, "raw", "raw")

    def test_during_a_backup(self):
        """The backup is of the moment when it began, whatever comes over its node."""
        self.start_guest()
        self.server.add_qcow2("target", self.create_image("target.qcow2", SIZE))
        self.qmp.execute("transaction", actions=[
            {"type": "blockdev-snapshot", "data": {"node": "top", "overlay": self.overlay("first")}},
            {"type": "blockdev-backup", "data": {"job-id": "j", "device": "first", "target": "target", "sync": "full", "speed": SLOW}}])
        frozen = self.content("top", "frozen.raw")  # the same moment
        self.client.wait_progress(100)
        self.qmp.execute("blockdev-snapshot", {"node": "first", "overlay": self.overlay("second")})
        self.client.wait_progress(100)
        self.qmp.execute("block-job-set-speed", device="j", speed=0)
        self.assertIsNone(self.qmp.wait_job("j"))
        self.assertEqual(self.server.chain_of("second"), ["second", "first", "top", "mid", "base"])
        self.finish("second")
        image_compare(self.content("target", "now.raw"), frozen, "raw", "raw")

    def test_inside_the_image(self):
        self.start_guest()
        names = [f"s{number}" for number in range(scale(4, 30))]
        for name in names:
            self.qmp.execute("blockdev-snapshot-internal-sync", {"device": "top", "name": name})
            self.client.wait_progress(50)
        nodes = {node["node-name"]: node for node in self.qmp.execute("query-named-block-nodes", flat=True)}
        self.assertEqual([info["name"] for info in nodes["top"]["image"]["snapshots"]], names)
        gone = self.qmp.execute("blockdev-snapshot-delete-internal-sync", {"device": "top", "name": names[1]})
        self.assertEqual((gone["name"], gone["id"]), (names[1], "2"))
        self.client.wait_progress(50)
        self.finish("top")
        info = json.loads(qemu_img("info", "--output=json", self.path("top.qcow2")))
        self.assertEqual([entry["name"] for entry in info["snapshots"]], names[:1] + names[2:])

    def test_the_frozen_image_may_be_read_by_others(self):
        """It is not open for writing any more: the peer's tools take it without being forced."""
        self.overlay("alone")
        self.server.export("alone", name="alone", export_id="alone")
        with self.assertRaisesRegex(AssertionError, "lock"):
            image_check(self.path("alone.qcow2"))
        self.qmp.execute("blockdev-snapshot", {"node": "alone", "overlay": self.overlay("over")})
        image_check(self.path("alone.qcow2"))


class BesideThePeer(TestCase):
    SAME = [
        ("blockdev-snapshot", {"node": "none", "overlay": "o"}),
        ("blockdev-snapshot", {"node": "a", "overlay": "none"}),
        ("blockdev-snapshot", {"node": "a", "overlay": "a"}),
        ("blockdev-snapshot", {"node": "a", "overlay": "r"}),
        ("blockdev-snapshot-sync", {"snapshot-file": "x.qcow2"}),
        ("blockdev-snapshot-sync", {"node-name": "none", "snapshot-file": "x.qcow2"}),
        ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-file": "x.qcow2"}),
        ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-file": "x.qcow2", "snapshot-node-name": "o"}),
        ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-file": "x.qcow2", "snapshot-node-name": "x", "format": "bad"}),
        ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-file": "x.qcow2", "snapshot-node-name": "x", "format": "raw"}),
        ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-file": "x.qcow2", "snapshot-node-name": "x", "mode": "existing"}),
        ("blockdev-snapshot-internal-sync", {"device": "none", "name": "s"}),
        ("blockdev-snapshot-internal-sync", {"device": "r", "name": "s"}),
        ("blockdev-snapshot-internal-sync", {"device": "a", "name": ""}),
        ("blockdev-snapshot-internal-sync", {"device": "a", "name": "s"}),
        ("blockdev-snapshot-internal-sync", {"device": "a", "name": "s"}),
        ("blockdev-snapshot-internal-sync", {"device": "a", "name": "1"}),
        ("blockdev-snapshot-delete-internal-sync", {"device": "none", "name": "s"}),
        ("blockdev-snapshot-delete-internal-sync", {"device": "a"}),
        ("blockdev-snapshot-delete-internal-sync", {"device": "a", "id": "7"}),
        ("blockdev-snapshot-delete-internal-sync", {"device": "a", "id": "1", "name": "1"}),
        ("blockdev-snapshot-delete-internal-sync", {"device": "a", "id": "1", "name": "s"}),
        ("blockdev-snapshot-delete-internal-sync", {"device": "a", "name": "1"}),
        ("blockdev-snapshot-sync", {"node-name": "e", "snapshot-file": "x.qcow2", "snapshot-node-name": "x"}),
        ("blockdev-snapshot", {"node": "a", "overlay": "o"}),
        ("query-block-exports", {}),
    ]

    def answers(self, command):
        for name in "aoe":
            self.create_image(f"{name}.qcow2", SIZE)
        qemu_img("create", "-q", "-f", "raw", self.path("r.raw"), "1M")
        daemon = self.daemon(command=command)
        for name in "aoe":
            daemon.add_qcow2(name, self.path(f"{name}.qcow2"))
        daemon.qmp.execute("blockdev-add", {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": self.path("r.raw")}})
        daemon.nbd_server()
        daemon.export("e")
        answers = []
        for command_name, arguments in self.SAME:
            try:
                answer = daemon.qmp.execute(command_name, arguments)
            except QmpError as error:
                answer = [error.error_class, error.desc.split(":")[0] if "overlay does" in error.desc else error.desc]
            if "date-sec" in answer:
                answer = {key: answer[key] for key in ("id", "name", "vm-state-size")}
            answers.append((command_name, arguments, answer))
        answers.append([event["event"] for event in daemon.qmp.drain_events(0.05)])
        answers += [daemon.chain_of("o"), daemon.chain_of("x")]
        daemon.stop()
        info = json.loads(qemu_img("info", "--output=json", self.path("x.qcow2")))
        answers.append((os.path.basename(info["backing-filename"]), info["backing-filename-format"], info["virtual-size"]))
        os.unlink(self.path("x.qcow2"))
        return answers

    def test_the_same_answers(self):
        ours, peers = self.answers(None), self.answers([PEER])
        for our, peer in zip(ours, peers):
            self.assertEqual(our, peer)
