# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for claims, and overriding refusals: on-conflict=wait, access-cancel, override, against the real daemon.

What waits holds nothing and has changed nothing; its turn comes in the order of arrival; every end of waiting is one
event. And every refusal names somebody whom a user knows.
"""
import hashlib
import json
import os
import re
import subprocess
import time

from harness import IS_PEER, MIB, PROGRAM, SLOWNESS, QmpError, TestCase, image_check, qemu_img, qemu_io, scale

SIZE = 4 * MIB
SLOW = 64 * 1024
CHAIN = ("base", "a", "b", "c", "top")
ENDS = ("ACCESS_GRANTED", "ACCESS_WAIT_ENDED")


class WaitCase(TestCase):
    options = ()

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the peer does not wait")
        self.images = self.create_chain(CHAIN, SIZE)
        self.server = self.daemon(*self.options)
        self.qmp = self.server.qmp
        self.open_images()
        self.server.nbd_server()

    def open_images(self):
        self.server.add_chain(self.images)

    def commit(self, job, top, base, qmp=None, speed=SLOW, **more):
        arguments = {"job-id": job, "device": "top", "top-node": top, "base-node": base, "speed": speed}
        (qmp or self.qmp).execute("block-commit", {**arguments, **more})

    def export(self, name, node, qmp=None, **more):
        arguments = {"type": "nbd", "id": name, "name": name, "node-name": node}
        return (qmp or self.qmp).execute("block-export-add", {**arguments, **more})

    def delete(self, name):
        self.qmp.execute("block-export-del", id=name)
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", id=name)

    def speed_up(self, job):
        self.qmp.execute("block-job-set-speed", device=job, speed=0)

    def waiting(self):
        """{id: behind} in the order of the queue."""
        return {entry["id"]: entry["behind"] for entry in self.qmp.execute("query-access")["waiting"]}

    def exports(self):
        return {export["id"] for export in self.qmp.execute("query-block-exports")}

    def wait_end(self, identity, event="ACCESS_GRANTED", qmp=None, **data):
        """The one event that ends the waiting of an operation. A block job that does not begin has its last event too."""
        qmp = qmp or self.qmp
        end = qmp.wait_event(event, id=identity, **data)["data"]
        if event == "ACCESS_WAIT_ENDED" and end["operation"] in ("block-commit", "block-stream"):
            cancelled = end["reason"] == "cancelled"
            last = qmp.wait_event("BLOCK_JOB_CANCELLED" if cancelled else "BLOCK_JOB_COMPLETED", device=identity)["data"]
            self.assertEqual(last["target-state"], "unchanged")
            self.assertEqual(last.get("error"), None if cancelled else end["error"])
        return end

    def state(self):
        """All that an operation which waits, or was refused, must leave as it was; the queue itself left out."""
        access = self.qmp.execute("query-access")
        access.pop("waiting")
        for holder in access["holders"]:
            holder.pop("since")
            holder.pop("progress", None)
        nodes = self.qmp.execute("query-named-block-nodes", {"flat": True})
        for node in nodes:
            node["image"].pop("actual-size", None)
        files = {}
        for name, path in self.images:
            with open(path, "rb") as image:
                files[name] = hashlib.sha256(image.read()).hexdigest()
        return {
            "access": access,
            "nodes": nodes,
            "graph": self.qmp.execute("query-graph"),
            "jobs": sorted(self.qmp.jobs()),
            "exports": self.exports(),
            "files": files,
        }


WAIT = {"on-conflict": "wait"}


class Waiting(WaitCase):
    long_builds = ("release", "asan")

    def test_a_commit_waits_for_an_export_and_begins_when_it_is_gone(self):
        self.export("e", "base")
        self.commit("j", "a", "base", speed=0, **WAIT)
        self.assertEqual(self.waiting(), {"j": ["e"]})
        entry = self.qmp.execute("query-access")["waiting"][0]
        self.assertEqual((entry["kind"], entry["command"]), ("job", "block-commit"))
        self.assertNotIn("timeout", entry)
        self.assertIn("base", {claim["node"] for claim in entry["claims"]})
        self.assertEqual(self.qmp.jobs(), {})
        self.delete("e")
        granted = self.wait_end("j")
        self.assertEqual(granted["operation"], "block-commit")
        self.assertGreaterEqual(granted["waited"], 0)
        self.assertIsNone(self.qmp.wait_job("j"))
        self.assertEqual(self.waiting(), {})
        self.assertEqual([e for e in self.qmp.drain_events() if e["event"] in ENDS], [])

    def test_what_is_granted_at_once_does_not_wait(self):
        self.export("e", "top", **WAIT)
        self.assertIn("e", self.exports())
        self.commit("j", "a", "base", **WAIT)
        self.assertEqual(self.qmp.jobs()["j"]["status"], "running")
        self.assertEqual(self.waiting(), {})
        self.assertEqual([e for e in self.qmp.drain_events() if e["event"] in ENDS], [])

    def test_a_stream_waits_for_a_job_to_end(self):
        self.commit("j", "b", "a")
        self.qmp.execute("block-stream", {"job-id": "s", "device": "b", "base-node": "base", **WAIT})
        self.assertEqual(self.waiting(), {"s": ["j"]})
        self.qmp.execute("job-cancel", id="j")
        self.wait_end("s")
        self.assertIsNone(self.qmp.wait_job("s"))

    def test_first_come_first_served(self):
        self.export("e0", "top", writable=True, exclusive=True)
        for number in (1, 2, 3, 4):
            self.export(f"e{number}", "top", writable=True, exclusive=True, **WAIT)
        self.assertEqual(list(self.waiting()), ["e1", "e2", "e3", "e4"])
        self.assertEqual(set(self.waiting()["e3"]), {"e0", "e1", "e2"})
        for number in (1, 2, 3, 4):
            self.delete(f"e{number - 1}")
            self.wait_end(f"e{number}")
            self.assertEqual(self.exports(), {f"e{number}"})
            self.assertEqual(list(self.waiting()), [f"e{later}" for later in range(number + 1, 5)])

    def test_nobody_overtakes_one_with_whom_it_clashes(self):
        self.export("reader", "base")
        self.commit("j", "a", "base", speed=0, **WAIT)
        before = self.state()
        error = self.assert_refused(r"block-commit j \(waits since \d+ s\)", self.export, "late", "base")
        self.assertEqual({c["holder"]["id"] for c in error.data["conflicts"]}, {"j"})
        self.assertEqual({c["holder"]["state"] for c in error.data["conflicts"]}, {"waiting"})
        self.assertIn("access-cancel", error.data["conflicts"][0]["remedy"])
        self.assertEqual(self.state(), before)
        self.export("polite", "base", **WAIT)
        self.assertEqual(self.waiting(), {"j": ["reader"], "polite": ["j"]})
        self.export("elsewhere", "top", writable=True)  # it has no quarrel with anybody
        self.delete("reader")
        self.wait_end("j")
        self.assertIsNone(self.qmp.wait_job("j"))
        self.wait_end("polite")
        self.assertEqual(self.exports(), {"polite", "elsewhere"})

    def test_an_image_is_not_opened_past_one_that_waits(self):
        self.export("e", "base")
        self.commit("j", "a", "base", **WAIT)
        path = self.create_image("late.qcow2", None, backing=self.path("base.qcow2"))
        self.server.add_file("late-file", path)
        arguments = {"driver": "qcow2", "node-name": "late", "file": "late-file", "backing": "base"}
        error = self.assert_refused(r"block-commit j \(waits", self.qmp.execute, "blockdev-add", arguments)
        self.assertEqual((error.data["operation"], error.data["id"]), ("blockdev-add", "late"))
        self.qmp.execute("access-cancel", id="j")
        self.qmp.execute("blockdev-add", arguments)

    def test_those_who_do_not_clash_do_not_wait_for_each_other(self):
        self.export("e1", "base")
        self.export("e2", "top", writable=True, exclusive=True)
        self.commit("j", "a", "base", speed=0, **WAIT)
        self.export("e3", "top", writable=True, exclusive=True, **WAIT)
        self.assertEqual(self.waiting(), {"j": ["e1"], "e3": ["e2"]})
        self.delete("e2")
        self.wait_end("e3")
        self.assertEqual(self.waiting(), {"j": ["e1"]})

    def test_time_is_up(self):
        self.export("e", "base")
        start = time.monotonic()
        self.commit("j", "a", "base", **WAIT, **{"on-conflict-timeout": 0.3})
        self.assertEqual(self.qmp.execute("query-access")["waiting"][0]["timeout"], 0.3)
        self.export("late", "base", **WAIT)
        end = self.wait_end("j", "ACCESS_WAIT_ENDED", reason="timeout")
        self.assertGreater(time.monotonic() - start, 0.29)
        self.assertEqual(end["operation"], "block-commit")
        self.assertIn("export e", end["error"])
        self.wait_end("late")  # it waited for the commit alone
        self.assertEqual(self.qmp.jobs(), {})
        self.delete("late")
        self.delete("e")
        self.commit("j", "a", "base", speed=0)  # the id is free
        self.assertIsNone(self.qmp.wait_job("j"))

    def test_the_shortest_time_is_not_none(self):
        self.export("e", "base")
        for seconds in (1e-9, 1e-10, 5e-324):
            self.commit("j", "a", "base", **WAIT, **{"on-conflict-timeout": seconds})
            self.wait_end("j", "ACCESS_WAIT_ENDED", reason="timeout")
        self.assertEqual(self.waiting(), {})

    def test_cancel(self):
        self.export("e", "base")
        for verb, key in (("access-cancel", "id"), ("job-cancel", "id"), ("block-job-cancel", "device")):
            self.commit("j", "a", "base", **WAIT)
            self.assertEqual(list(self.waiting()), ["j"])
            self.qmp.execute(verb, {key: "j"})
            end = self.wait_end("j", "ACCESS_WAIT_ENDED", reason="cancelled")
            self.assertEqual(end["operation"], "block-commit")
            self.assertEqual(self.waiting(), {})
        self.delete("e")
        self.assertEqual(self.qmp.jobs(), {})
        self.assert_refused(r"No operation waits under the id 'j'", self.qmp.execute, "access-cancel", id="j")
        self.assert_refused(r"Job 'j' not found", self.qmp.execute, "job-cancel", id="j")

    def test_a_cancelled_export_lets_those_behind_it_go(self):
        self.export("e0", "top", writable=True)
        self.export("e1", "top", writable=True, exclusive=True, **WAIT)
        self.export("e2", "top", writable=True, **WAIT)
        self.assertEqual(self.waiting(), {"e1": ["e0"], "e2": ["e1"]})
        self.assert_refused("not found", self.qmp.execute, "job-cancel", id="e1")  # it is no job
        self.qmp.execute("access-cancel", id="e1")
        self.wait_end("e2")
        self.assertEqual(self.exports(), {"e0", "e2"})

    def test_its_id_is_taken_meanwhile(self):
        self.export("e", "base")
        self.commit("j", "a", "base", **WAIT)
        self.assert_refused("'j' already in use", self.commit, "j", "c", "b")
        self.assert_refused("'j' is already in use", self.export, "j", "top")
        self.export("x", "base", **WAIT)
        self.assert_refused("'x' is already in use", self.export, "x", "top")
        self.assert_refused("'x' already in use", self.commit, "x", "c", "b", **WAIT)
        self.delete("e")
        self.wait_end("j")

    def test_a_command_waits_too(self):
        self.commit("j", "c", "b")
        resize = {"node-name": "c", "size": 2 * SIZE}
        error = self.assert_refused("block-commit j", self.qmp.execute, "block_resize", resize)
        self.assertEqual(error.data["operation"], "block_resize")
        self.qmp.execute("block_resize", {**resize, **WAIT})
        self.qmp.execute("block_resize", {**resize, **WAIT})
        first, second = self.waiting()
        self.assertNotEqual(first, second)
        self.qmp.execute("access-cancel", id=second)
        self.qmp.execute("job-cancel", id="j")
        self.assertEqual(self.wait_end(first)["operation"], "block_resize")
        sizes = {n["node-name"]: n["size"] for n in self.qmp.execute("query-graph")["nodes"]}
        self.assertEqual(sizes["c"], 2 * SIZE)

    def test_names_mean_what_they_mean_when_the_turn_comes(self):
        self.commit("j1", "b", "a")
        self.commit("j2", "b", "base", speed=0, **WAIT)
        self.speed_up("j1")
        end = self.wait_end("j2", "ACCESS_WAIT_ENDED", reason="failed")  # b's data are in a, and nobody's any more
        self.assertRegex(end["error"], r"'b'")
        self.assertIsNone(self.qmp.wait_job("j1"))

    def assert_leans_on(self, name, file):
        info = json.loads(qemu_img("info", "-U", "--output=json", self.path(f"{name}.qcow2")))
        self.assertEqual(os.path.basename(info["backing-filename"]), file)

    def test_a_backing_file_name_is_not_for_what_came_in_the_place_of_its_image(self):
        change = {"device": "top", "image-node-name": "c", "backing-file": "./b.qcow2"}
        self.commit("j", "b", "a")
        self.qmp.execute("change-backing-file", {**change, **WAIT})
        self.speed_up("j")
        end = self.wait_end("change-backing-file-c", "ACCESS_WAIT_ENDED", reason="failed")
        self.assertIn("'a'", end["error"])
        self.assertIsNone(self.qmp.wait_job("j"))
        self.assert_leans_on("c", "a.qcow2")
        self.qmp.execute("change-backing-file", {**change, "backing-file": "./a.qcow2"})

    def test_nor_is_the_one_that_was_given_to_a_commit(self):
        self.qmp.execute("block-stream", {"job-id": "s", "device": "b", "speed": SLOW})
        commit = {"job-id": "j", "device": "top", "top-node": "c", "backing-file": "./base.qcow2"}
        self.qmp.execute("block-commit", {**commit, **WAIT})  # to the end of the chain, which is going to be b
        self.assertEqual(self.waiting(), {"j": ["s"]})
        self.speed_up("s")
        end = self.wait_end("j", "ACCESS_WAIT_ENDED", reason="failed")
        self.assertRegex(end["error"], "'backing-file' was given for node 'base'.*'b'")
        self.assertIsNone(self.qmp.wait_job("s"))
        self.assert_leans_on("top", "c.qcow2")
        self.qmp.execute("block-commit", {**commit, "backing-file": "./b.qcow2"})
        self.assertIsNone(self.qmp.wait_job("j"))
        self.assert_leans_on("top", "b.qcow2")

    def test_nor_is_the_one_that_was_given_to_a_stream(self):
        self.qmp.execute("block-stream", {"job-id": "s", "device": "c", "base-node": "base", "speed": SLOW})
        stream = {"job-id": "j", "device": "top", "bottom": "c", "backing-file": "./b.qcow2"}
        self.qmp.execute("block-stream", {**stream, **WAIT})
        self.assertEqual(self.waiting(), {"j": ["s"]})
        self.speed_up("s")
        end = self.wait_end("j", "ACCESS_WAIT_ENDED", reason="failed")
        self.assertRegex(end["error"], "'backing-file' was given for node 'b'.*'base'")
        self.assertIsNone(self.qmp.wait_job("s"))
        self.assert_leans_on("top", "c.qcow2")

    def test_what_was_to_grow_is_not_cut(self):
        """A growth waits behind a commit, which makes the image longer than that."""
        short = self.create_image("short.qcow2", SIZE)
        over = self.create_image("over.qcow2", 4 * SIZE, backing=short)
        qemu_io(over, f"write -q -P 7 {3 * SIZE} {SIZE}")
        self.server.add_qcow2("short", short)
        self.server.add_qcow2("over", over, "short")
        self.export("e", "short")
        self.qmp.execute("block-commit", {"job-id": "j", "device": "over", **WAIT})
        self.qmp.execute("block_resize", {"node-name": "short", "size": 2 * SIZE, **WAIT})
        self.assertEqual(self.waiting(), {"j": ["e"], "block_resize-short": ["j"]})
        self.delete("e")
        self.qmp.wait_event("BLOCK_JOB_READY", device="j")
        self.qmp.execute("job-complete", id="j")
        end = self.wait_end("block_resize-short", "ACCESS_WAIT_ENDED", reason="failed")
        self.assertIn("longer", end["error"])
        self.assertIsNone(self.qmp.wait_job("j"))
        self.qmp.execute("block_resize", {"node-name": "short", "size": 5 * SIZE})
        self.server.stop()
        image_check(short)
        qemu_io(short, f"read -q -P 7 {3 * SIZE} {SIZE}", f"read -q -P 0 {4 * SIZE} {SIZE}")

    def test_what_stays_in_its_place_keeps_its_name(self):
        self.commit("j1", "a", "base")
        commit = {"job-id": "j2", "device": "top", "top-node": "c", "base-node": "base", "backing-file": "./base.qcow2"}
        self.qmp.execute("block-commit", {**commit, **WAIT})
        self.speed_up("j1")
        self.wait_end("j2")
        self.assertEqual(self.qmp.wait_jobs(("j1", "j2")), {"j1": None, "j2": None})
        self.assert_leans_on("top", "base.qcow2")

    def test_a_node_that_goes_away_ends_the_waiting(self):
        alone = self.create_image("alone.qcow2", SIZE)
        self.server.add_qcow2("alone", alone)
        self.server.add_qcow2("over", self.create_image("over.qcow2", None, backing=alone), "alone")
        self.export("e", "alone")
        self.qmp.execute("block-commit", {"job-id": "j", "device": "over", **WAIT})
        self.assertEqual(self.waiting(), {"j": ["e"]})
        self.qmp.execute("blockdev-del", {"node-name": "over"})  # who waits holds nothing
        end = self.wait_end("j", "ACCESS_WAIT_ENDED", reason="failed")
        self.assertIn("'over' not found", end["error"])

    def test_waiting_for_a_stale_image_is_for_nothing(self):
        self.commit("j", "b", "a", speed=0)
        self.assertIsNone(self.qmp.wait_job("j"))
        self.assert_refused("stale", self.export, "e", "b", **WAIT)
        self.assertEqual(self.waiting(), {})

    def test_other_errors_are_answered_at_once(self):
        self.assert_refused("Cannot find node", self.export, "e", "nobody", **WAIT)
        self.assert_refused("read-only|backing|chain", self.commit, "j", "base", "a", **WAIT)
        self.assertEqual(self.waiting(), {})

    def test_what_waits_has_changed_nothing(self):
        self.commit("j", "b", "a", speed=1)
        self.qmp.wait_event("JOB_STATUS_CHANGE", id="j", status="running")
        self.export("e", "base")
        before = self.state()
        requests = [
            ("block-commit", {"job-id": "w1", "device": "top", "top-node": "b", "base-node": "base"}),
            ("block-commit", {"job-id": "w2", "device": "top"}),
            ("block-commit", {"job-id": "w3", "device": "top", "top-node": "a", "base-node": "base"}),
            ("block-stream", {"job-id": "w4", "device": "b"}),
            ("block-stream", {"job-id": "w5", "device": "b", "base-node": "base"}),
            ("block-export-add", {"type": "nbd", "id": "w6", "node-name": "a", "writable": True}),
            ("block-export-add", {"type": "nbd", "id": "w7", "node-name": "a"}),
            ("block_resize", {"node-name": "b", "size": 2 * SIZE}),
            ("block_resize", {"node-name": "a", "size": SIZE // 2}),
            ("change-backing-file", {"device": "top", "image-node-name": "b", "backing-file": "./a.qcow2"}),
        ]
        for command, arguments in requests:
            with self.subTest(command=command, **{key.replace("-", "_"): value for key, value in arguments.items()}):
                self.assert_refused(".", self.qmp.execute, command, arguments)
                self.assertEqual(self.state(), before, "the refused command left something behind")
                queue = list(self.waiting())
                self.assertEqual(self.qmp.execute(command, {**arguments, **WAIT}), {})
                self.assertEqual(self.state(), before, "the waiting command left something behind")
                identity = [name for name in self.waiting() if name not in queue][0]
                self.qmp.execute("access-cancel", id=identity)
                self.wait_end(identity, "ACCESS_WAIT_ENDED")
                self.assertEqual(self.state(), before, "the cancelled command left something behind")

    def test_it_survives_its_client(self):
        path = self.path("second")
        server = self.daemon("--chardev", f"socket,id=second,path={path},server=on,wait=off", "--monitor", "chardev=second")
        server.add_qcow2("alone", self.create_image("alone.qcow2", SIZE))
        server.nbd_server()
        other = type(server.qmp)(path)
        self.export("e0", "alone", server.qmp, writable=True, exclusive=True)
        self.export("e1", "alone", other, writable=True, exclusive=True, **WAIT)
        other.close()
        other = type(server.qmp)(path)
        server.qmp.execute("block-export-del", id="e0")
        for monitor in (server.qmp, other):
            self.wait_end("e1", qmp=monitor)
        other.close()

    def test_two_monitors_wait_and_neither_is_held_up(self):
        path = self.path("second")
        server = self.daemon("--chardev", f"socket,id=second,path={path},server=on,wait=off", "--monitor", "chardev=second")
        server.add_qcow2("alone", self.create_image("alone.qcow2", SIZE))
        server.nbd_server()
        other = type(server.qmp)(path)
        self.export("e0", "alone", server.qmp, writable=True, exclusive=True)
        for number in range(1, 7):
            self.export(f"e{number}", "alone", (server.qmp, other)[number % 2], writable=True, exclusive=True, **WAIT)
        for monitor in (server.qmp, other):
            start = time.monotonic()
            self.assertEqual(len(monitor.execute("query-access")["waiting"]), 6)
            self.assertLess(time.monotonic() - start, 1 * SLOWNESS)
        for number in range(1, 7):
            (server.qmp, other)[number % 2].execute("block-export-del", id=f"e{number - 1}")
            for monitor in (server.qmp, other):
                self.wait_end(f"e{number}", qmp=monitor)
        other.close()

    def test_many_wait_and_all_get_their_turn(self):
        """Exports that share with nobody, on random nodes; each is removed as soon as it is there."""
        names = [f"x{number}" for number in range(40)]
        for name in names:
            node = self.random.choice(("top", "top", "c"))
            writable = node == "top" and self.random.random() < 0.7
            self.export(name, node, writable=writable, exclusive=writable, **WAIT)
        done = set()
        deadline = time.monotonic() + 30 * SLOWNESS
        while len(done) < len(names):
            self.assertLess(time.monotonic(), deadline, f"seed {self.seed}: {self.waiting()}")
            for name in self.exports() - done:
                done.add(name)
                self.qmp.execute("block-export-del", id=name)
        self.assertEqual(self.waiting(), {})

    def random_operation(self, name):
        """Some operation on some nodes that wants to wait, as a command with its arguments."""
        nodes = self.server.chain_of("top")[::-1]
        kind = self.random.choice(("commit", "commit", "stream", "export", "export", "resize"))
        low, high = sorted(self.random.sample(range(len(nodes)), 2)) if len(nodes) > 1 else (0, 0)
        options = dict(WAIT)
        if self.random.random() < 0.3:
            options["on-conflict-timeout"] = self.random.choice((0.01, 0.1, 1))
        job = {"job-id": name, "speed": self.random.choice((0, 4 * SLOW, MIB)), **options}
        if kind == "commit" and high > low:
            return "block-commit", {"device": "top", "top-node": nodes[high], "base-node": nodes[low], **job}
        if kind == "stream" and high > low:
            return "block-stream", {"device": nodes[high], "base-node": nodes[low], **job}
        node = self.random.choice(nodes)
        if kind == "export":
            return "block-export-add", {
                "type": "nbd", "id": name, "name": name, "node-name": node, "exclusive": self.random.random() < 0.3, **options}
        return "block_resize", {"node-name": node, "size": SIZE + self.random.randrange(4) * MIB, **options}

    def cancel_some(self):
        waiting = list(self.waiting())
        if waiting and self.random.random() < 0.3:
            try:
                self.qmp.execute("access-cancel", id=self.random.choice(waiting))
            except QmpError as error:
                self.assertIn("No operation waits", error.desc)

    def test_whatever_is_asked_for_comes_to_an_end(self):
        """Random operations on one chain, most of them in each other's way; each waits, and none is forgotten."""
        waited = set()
        for number in range(scale(25, 200)):
            operation = self.random_operation(f"o{number}")
            try:
                self.qmp.execute(*operation)
            except QmpError as error:
                self.assertRegex(error.desc, "stale|not in|not below|Cannot find|below|smaller|it is the|not found|wait")
            waited |= set(self.waiting())
            self.cancel_some()
            for name in self.exports():
                if self.random.random() < 0.4:
                    self.qmp.execute("block-export-del", id=name)
        deadline = time.monotonic() + 30 * SLOWNESS
        while self.waiting() or self.qmp.jobs() or self.exports():
            self.assertLess(time.monotonic(), deadline, f"seed {self.seed}: {self.waiting()} {self.qmp.jobs()} {self.exports()}")
            for name, behind in self.waiting().items():
                if all(" -> " in holder for holder in behind):  # an image leans there: that ends when a user wants it
                    try:
                        self.qmp.execute("access-cancel", id=name)
                    except QmpError:
                        pass
            for command, key, names in (
                ("block-export-del", "id", self.exports()), ("block-job-set-speed", "device", self.qmp.jobs())):
                for name in names:
                    try:
                        self.qmp.execute(command, {key: name, **({"speed": 0} if key == "device" else {})})
                    except QmpError:
                        pass  # it has just ended, or is about to
            for job in self.qmp.jobs().values():
                if job["status"] == "ready":
                    try:
                        self.qmp.execute("job-complete", id=job["id"])
                    except QmpError:
                        pass
            time.sleep(0.01)
        ends = [e["data"]["id"] for e in self.qmp.drain_events() if e["event"] in ENDS]
        mine = [end for end in ends if not end.startswith("block_resize-")]  # an id that is made up is used again
        self.assertEqual(len(mine), len(set(mine)), f"seed {self.seed}: one operation, two ends")
        self.assertLessEqual(waited, set(ends))
        holders = self.qmp.execute("query-access")["holders"]
        self.assertEqual({holder["kind"] for holder in holders}, {"edge"})
        chain = self.server.chain_of("top") if "top" in self.live_nodes() else []
        self.server.stop()
        for name in chain:
            image_check(self.path(f"{name}.qcow2"))

    def live_nodes(self):
        return {node["node-name"] for node in self.qmp.execute("query-graph")["nodes"] if "stale" not in node}

    def test_the_queue_has_a_limit(self):
        self.export("e", "top", writable=True, exclusive=True)
        for number in range(256):
            self.export(f"w{number}", "top", writable=True, exclusive=True, **WAIT)
        self.assertEqual(len(self.waiting()), 256)
        self.assert_refused("export e ", self.export, "w256", "top", writable=True, exclusive=True, **WAIT)
        self.qmp.execute("access-cancel", id="w100")
        self.export("w256", "top", writable=True, exclusive=True, **WAIT)

    def test_quit_ends_what_waits(self):
        self.export("e", "base")
        self.commit("j", "a", "base", **WAIT)
        self.export("late", "base", **WAIT)
        self.qmp.execute("quit")
        for name in ("j", "late"):
            self.wait_end(name, "ACCESS_WAIT_ENDED", reason="cancelled")
        self.server.wait()

    def test_bad_options(self):
        def refused(pattern, **options):
            self.assert_refused(pattern, self.export, "e", "top", **{k.replace("_", "-"): v for k, v in options.items()})

        refused("on-conflict", on_conflict="perhaps")
        refused("on-conflict=wait only", on_conflict_timeout=1)
        refused("on-conflict=wait only", on_conflict="fail", on_conflict_timeout=1)
        for seconds in (0, -1, 1e300, "1", 86400 * 366):
            refused("on-conflict-timeout", on_conflict="wait", on_conflict_timeout=seconds)
        refused("--allow-override", override="because")
        refused("in words", override="")
        refused("exclude each other", override="because", on_conflict="wait")
        self.assert_refused(
            "no such parameter", self.qmp.execute, "blockdev-add",
            {"driver": "null-co", "node-name": "n", "on-conflict": "wait"})
        self.assertEqual(self.exports(), set())

    def test_a_dry_run_takes_the_options(self):
        self.export("e", "base")
        arguments = {"job-id": "j", "device": "top", "top-node": "a", "base-node": "base", **WAIT}
        check = self.qmp.execute("access-check", {"command": "block-commit", "arguments": arguments})
        self.assertFalse(check["admitted"])
        self.assertEqual(self.waiting(), {})
        self.qmp.execute("block-commit", arguments)
        check = self.qmp.execute(
            "access-check", {"command": "block-export-add", "arguments": {"type": "nbd", "id": "x", "node-name": "base"}})
        self.assertFalse(check["admitted"])
        self.assertEqual([c["holder"]["id"] for c in check["conflicts"] if c["holder"]["state"] != "waiting"], [])

    def test_the_schema_has_the_options(self):
        schema = self.qmp.execute("query-qmp-schema")
        types = {entry["name"]: entry for entry in schema if entry["meta-type"] not in ("command", "event")}
        takers = set()
        for entry in schema:
            if entry["meta-type"] == "command":
                members = {member["name"] for member in types[entry["arg-type"]]["members"]}
                if "on-conflict" in members:
                    takers.add(entry["name"])
                    self.assertLessEqual({"on-conflict-timeout", "override"}, members)
        self.assertLessEqual(
            {"block-commit", "block-stream", "block-export-add", "block_resize", "change-backing-file"}, takers)
        self.assertNotIn("blockdev-add", takers)
        self.assertIn("variants", types["block-export-add-arguments"])

    def test_at_the_command_line(self):
        self.export("e", "base")
        sub, other = self.path("verbs"), self.path("more")  # a monitor serves one client at a time
        monitors = [("verbs", sub), ("more", other)]
        options = [["--chardev", f"socket,id={name},path={path},server=on,wait=off", "--monitor", name] for name, path in monitors]
        server = self.daemon(*options[0], *options[1])
        server.add_chain(self.create_chain([f"v{name}" for name in CHAIN], SIZE))
        server.nbd_server()
        self.export("e", "vbase", server.qmp)
        command = [PROGRAM, "commit", "va", "--into=vbase", "--queue", "--qmp", sub]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as waiting:
            self.assertEqual(waiting.stdout.readline(), "commit-va waits for e\n")
            shown = subprocess.run([PROGRAM, "access", "--qmp", other], capture_output=True, text=True, check=True).stdout
            self.assertRegex(shown, r"block-commit commit-va waits since \d+ s for e\n")
            server.qmp.execute("block-export-del", id="e")
            text = waiting.communicate(timeout=20 * SLOWNESS)[0]
            self.assertEqual(waiting.returncode, 0, text)
            self.assertIn("commit-va: done", text)
        self.export("e", "vb", server.qmp)
        command = [PROGRAM, "commit", "vc", "--into=vb", "--queue", "--qmp", sub]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as waiting:
            self.assertEqual(waiting.stdout.readline(), "commit-vc waits for e\n")
            server.qmp.execute("access-cancel", id="commit-vc")
            text = waiting.communicate(timeout=20 * SLOWNESS)[0]
            self.assertEqual(waiting.returncode, 1, text)
            self.assertIn("cancelled", text)


class Override(WaitCase):
    options = ("--allow-override",)
    long_builds = ("release", "asan")

    def overridden(self, identity):
        return self.qmp.wait_event("ACCESS_OVERRIDDEN", id=identity)["data"]

    def test_it_is_let_pass_with_an_event_and_a_line_in_the_log(self):
        self.assert_refused("edge a -> base", self.export, "e", "base", writable=True)
        self.export("reader", "base")
        self.assert_refused("export reader", self.commit, "j", "a", "base")
        self.commit("j", "a", "base", speed=0, override="the reader is a broken client")
        event = self.overridden("j")
        self.assertEqual(event["operation"], "block-commit")
        self.assertEqual(event["reason"], "the reader is a broken client")
        self.assertIn("export reader", event["refusal"])
        self.assertIsNone(self.qmp.wait_job("j"))
        self.assertIn("the reader is a broken client", self.server.stderr())

    def test_what_is_admitted_needs_no_override(self):
        self.export("e", "top", override="just in case")
        self.assertEqual([e for e in self.qmp.drain_events() if e["event"] == "ACCESS_OVERRIDDEN"], [])

    def test_it_is_for_one_command_only(self):
        self.export("reader", "base")
        self.commit("j", "a", "base", override="I know what I do")
        self.assert_refused("block-commit j", self.export, "second", "base")
        self.qmp.execute("job-cancel", id="j")
        self.assertIsNone(self.qmp.wait_job("j"))
        self.assert_refused("export reader", self.commit, "j", "a", "base")

    def test_the_overlap_lasts_through_later_changes(self):
        """Other operations begin, change the graph and end beside the overlap; only the two in it are tolerated."""
        self.export("reader", "base")
        self.commit("j", "a", "base", override="I know what I do")
        self.commit("other", "c", "b", speed=0)  # re-derives every claim at its end
        self.assertIsNone(self.qmp.wait_job("other"))
        active = self.create_image("active.qcow2", None, backing=self.images[-1][1])
        self.server.add_qcow2("active", active, "top")  # a new edge: derives again
        self.qmp.execute("block-commit", {"job-id": "live", "device": "active", "base-node": "top"})  # a filter
        self.qmp.wait_event("BLOCK_JOB_READY", device="live")
        self.qmp.execute("job-complete", id="live")
        self.assertIsNone(self.qmp.wait_job("live"))
        holders = {holder["id"] for holder in self.qmp.execute("query-access")["holders"]}
        self.assertLessEqual({"reader", "j"}, holders)
        self.assert_refused("block-commit j", self.export, "second", "base")
        self.speed_up("j")
        self.assertIsNone(self.qmp.wait_job("j"))
        self.delete("reader")

    def test_an_edge_that_moves_keeps_what_is_tolerated(self):
        """A client writes beneath an overlay, on purpose; then the overlay's edge moves."""
        alone = self.create_image("alone.qcow2", SIZE)
        self.server.add_qcow2("alone", alone)
        middle = self.create_image("middle.qcow2", None, backing=alone)
        self.server.add_qcow2("middle", middle, "alone")
        upper = self.create_image("upper.qcow2", None, backing=middle)
        self.server.add_qcow2("upper", upper, "middle")
        self.export("writer", "alone", writable=True, override="repairing the base")
        self.assertIn("middle -> alone", self.overridden("writer")["refusal"])
        self.qmp.execute("block-stream", {"job-id": "s", "device": "upper"})
        self.assertIsNone(self.qmp.wait_job("s"))
        self.qmp.execute("blockdev-del", {"node-name": "upper"})
        self.qmp.execute("blockdev-del", {"node-name": "middle"})
        self.delete("writer")

    def test_two_commits_at_once_are_a_mess_but_end(self):
        """Both want the same edge: its adopter keeps it, and whatever becomes of the data, nothing hangs or crashes."""
        self.commit("one", "b", "a")
        self.commit("two", "b", "base", override="test")
        self.overridden("two")
        self.qmp.execute("job-cancel", id="two")
        self.qmp.wait_job("two")
        self.speed_up("one")
        self.assertIsNone(self.qmp.wait_job("one"))
        self.server.stop()
        image_check(self.path("a.qcow2"))

    def test_both_of_two_commits_run_to_some_end(self):
        self.commit("one", "b", "a")
        self.commit("two", "b", "base", override="test")
        for job in self.random.sample(("one", "two"), 2):
            try:
                self.speed_up(job)
            except QmpError:
                pass
            self.qmp.wait_job(job)
        self.assertEqual(self.qmp.jobs(), {})

    def test_a_last_step_into_a_new_overlap_fails_and_is_undone(self):
        """The writer was let in beside the commit, but not beneath the image that is to lean on base afterwards."""
        self.export("writer", "base", writable=True, override="test")
        self.commit("j", "a", "base", override="test", speed=0)
        self.assertRegex(self.qmp.wait_job("j"), r"block-commit j: .*export writer|export writer")
        self.assertEqual(self.server.chain_of("top"), ["top", "c", "b", "a", "base"])
        self.delete("writer")
        self.commit("j", "a", "base", speed=0)
        self.assertIsNone(self.qmp.wait_job("j"))

    def test_an_active_commit_beside_a_writer_beneath_ends(self):
        for verb in ("job-cancel", "job-complete"):
            self.export("writer", "c", writable=True, override="test")
            self.qmp.execute("block-commit", {"job-id": "j", "device": "top", "base-node": "c", "override": "test"})
            self.qmp.wait_event("BLOCK_JOB_READY", device="j")
            self.qmp.execute(verb, id="j")
            self.assertIsNone(self.qmp.wait_job("j"))
            self.delete("writer")

    def test_it_passes_those_who_wait(self):
        self.export("reader", "base")
        self.commit("j", "a", "base", **WAIT)
        self.export("urgent", "base", override="rescue")
        self.assertIn("block-commit j", self.overridden("urgent")["refusal"])
        self.assertEqual(set(self.waiting()["j"]), {"reader", "urgent"})

    def ask(self, command, arguments):
        """Says whatever happens: what is refused for another reason, or has just ended, is no matter here."""
        try:
            self.qmp.execute(command, arguments)
        except QmpError:
            pass

    def random_override(self, name):
        nodes = self.server.chain_of("top")[::-1]
        low, high = sorted(self.random.sample(range(len(nodes)), 2)) if len(nodes) > 1 else (0, 0)
        job = {"job-id": name, "speed": self.random.choice((0, 4 * SLOW, MIB)), "override": "test"}
        writable, size = self.random.random() < 0.5, SIZE + self.random.randrange(-3, 4) * MIB
        operations = (
            ("block-commit", {"device": "top", "top-node": nodes[high], "base-node": nodes[low], **job}),
            ("block-stream", {"device": nodes[high], "base-node": nodes[low], **job}),
            ("block-export-add", {
                "type": "nbd", "id": name, "name": name, "node-name": nodes[low], "writable": writable, "override": "test"}),
            ("block_resize", {"node-name": nodes[low], "size": size, "override": "test"}),
        )
        self.ask(*self.random.choice(operations))

    def test_whatever_is_overridden_the_daemon_lives(self):
        """The data may be lost, but every overlap ends: nothing asserts that it cannot happen, and nothing stays."""
        for number in range(scale(30, 300)):
            self.random_override(f"o{number}")
            if self.random.random() < 0.3:
                for job in self.qmp.jobs():
                    self.ask("job-cancel", {"id": job})
            for name in self.exports():
                if self.random.random() < 0.3:
                    self.ask("block-export-del", {"id": name})
        deadline = time.monotonic() + 30 * SLOWNESS
        while self.qmp.jobs() or self.exports():
            self.assertLess(time.monotonic(), deadline, f"seed {self.seed}: {self.qmp.jobs()} {self.exports()}")
            for name in self.exports():
                self.ask("block-export-del", {"id": name})
            for job in self.qmp.jobs():
                self.ask("block-job-set-speed", {"device": job, "speed": 0})
                self.ask("job-complete", {"id": job})
            time.sleep(0.01)
        holders = self.qmp.execute("query-access")["holders"]
        self.assertEqual({holder["kind"] for holder in holders}, {"edge"})

    def test_a_stale_image_may_be_read_in_an_emergency(self):
        self.commit("j", "b", "a", speed=0)
        self.assertIsNone(self.qmp.wait_job("j"))
        self.export("e", "b", override="forensics")
        self.assertIn("stale", self.overridden("e")["refusal"])
        self.commit("k", "a", "base", speed=0)  # derives again
        self.assertIsNone(self.qmp.wait_job("k"))


class Names(WaitCase):
    """Everybody who can stand in a refusal has a name that a user knows."""

    KNOWN = re.compile(r"^(top|f|#top(\.(backing|file))+)$")

    def open_images(self):
        self.server.add_file("f", self.images[-1][1])
        self.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "top", "file": "f"})  # the rest by headers

    def check_holder(self, holder):
        if holder["kind"] == "edge":
            parent, child = re.match(r"(.*) -> (\S+) \((?:file|backing|filtered|target)\)$", holder["id"]).groups()
            if parent.startswith("the "):
                self.assertRegex(parent, r"^the filter of block-commit \w+$")
            else:
                self.assertRegex(parent, self.KNOWN)
            self.assertRegex(child, self.KNOWN)
        else:
            self.assertIn(holder["id"], ("j", "s", "e"))

    def check_all(self):
        access = self.qmp.execute("query-access")
        for holder in access["holders"]:
            self.check_holder(holder)
            for claim in holder["claims"]:
                self.assertRegex(claim["node"], self.KNOWN)
        graph = self.qmp.execute("query-graph")
        for node in graph["nodes"]:
            if node["node-name"].startswith("#"):
                self.assertRegex(node["opened-for"], r"^(backing|file) of |^filter of block-commit j$")
        for user in graph["users"]:
            self.assertRegex(user["owner"], r"^(block-commit|block-stream|export) \w$")

    def test_images_that_headers_name(self):
        self.check_all()
        self.qmp.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "#top.backing"})
        error = self.assert_refused(
            r"block-commit j needs write-data on node '#top\.backing' \(backing of top, \S*c\.qcow2\), "
            r"which export e \(since \d+ s\) does not allow.*; delete export 'e' first, or pass on-conflict=wait",
            self.qmp.execute, "block-commit", {"job-id": "j", "device": "top", "base-node": "#top.backing"})
        self.assertEqual((error.data["operation"], error.data["id"]), ("block-commit", "j"))
        self.check_all()

    def test_the_filter_of_an_active_commit(self):
        for name in (None, "mine"):
            arguments = {"job-id": "j", "device": "top", "base-node": "#top.backing"}
            self.qmp.execute("block-commit", {**arguments, **({"filter-node-name": name} if name else {})})
            self.qmp.wait_event("BLOCK_JOB_READY", device="j")
            self.check_all()
            ids = [holder["id"] for holder in self.qmp.execute("query-access")["holders"]]
            self.assertIn("the filter of block-commit j -> top (filtered)", ids)
            self.assert_refused(
                "filter of block-commit j", self.qmp.execute, "blockdev-del", {"node-name": name or "#commit-j"})
            self.assert_refused("filter of block-commit j", self.qmp.execute, "blockdev-del", {"node-name": "top"})
            self.qmp.execute("job-cancel", id="j")
            self.qmp.wait_job("j")

    def test_an_adopted_edge_names_its_adopter(self):
        base, middle = "#top.backing.backing.backing.backing", "#top.backing.backing.backing"
        arguments = {"job-id": "j", "device": "top", "top-node": middle, "base-node": base, "speed": SLOW}
        self.qmp.execute("block-commit", arguments)
        holders = {holder["id"]: holder for holder in self.qmp.execute("query-access")["holders"]}
        edge = holders[f"{middle} -> {base} (backing)"]
        self.assertEqual((edge["state"], edge["adopted-by"]), ("adopted", "j"))
        error = self.assert_refused(
            "block-commit j", self.qmp.execute, "block_resize", {"node-name": base, "size": SIZE // 2})
        adopted = [c["holder"] for c in error.data["conflicts"] if c["holder"]["kind"] == "edge"]
        self.assertEqual([holder["adopted-by"] for holder in adopted], ["j"])
        self.assertIn("in the hands of block-commit j (running since", json.dumps(error.data))
        self.check_all()

    def test_every_refusal_has_all_that_the_manual_promises(self):
        self.qmp.execute("block-commit", {"job-id": "j", "device": "top", "base-node": "#top.backing", "speed": 1})
        requests = [
            ("block-stream", {"job-id": "s", "device": "top"}, "s"),
            ("block-commit", {"job-id": "s", "device": "top"}, "s"),
            ("block-export-add", {"type": "nbd", "id": "e", "node-name": "#top.backing"}, "e"),
            ("block_resize", {"node-name": "#top.backing", "size": SIZE // 2}, "#top.backing"),
        ]
        for command, arguments, identity in requests:
            error = self.assert_refused(r"block-commit j \(running since \d+ s", self.qmp.execute, command, arguments)
            self.assertEqual((error.data["operation"], error.data["id"]), (command, identity))
            for conflict in error.data["conflicts"]:
                self.assertLessEqual({"node", "action", "direction", "path", "holder", "remedy"}, set(conflict))
                self.assertLessEqual({"id", "kind", "command", "since"}, set(conflict["holder"]))
                self.check_holder(conflict["holder"])


del WaitCase
