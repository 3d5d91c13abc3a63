# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which operations may run side by side: the scenarios of test/data/access-scenarios.json, each pair in both orders.

What must be admitted runs to its end, with every image checked against what it showed before. What must be refused is
refused with the name of the one that stands in the way, and nothing has changed.
"""
import json
import os
import re
import time

from harness import IS_PEER, MIB, ROOT, SLOWNESS, QmpError, TestCase, image_check, qemu_img, qemu_io

SIZE = 4 * MIB
SLOW = 64 * 1024
TOPOLOGIES = {
    "chain": [("base", None), ("a", "base"), ("b", "a"), ("c", "b"), ("top", "c")],
    "fork": [("base", None), ("a", "base"), ("top", "a"), ("s", "base")],
}

with open(os.path.join(ROOT, "test", "data", "access-scenarios.json"), encoding="utf-8") as data:
    SCENARIOS = json.load(data)
OPERATIONS = {"commit", "stream", "export-ro", "export-ro-sh", "export-rw", "export-rw-sh"}


def parse(operation):
    """'commit a>base' -> ('commit', 'a', 'base'); 'stream c..none' -> ('stream', 'c', None); 'export-rw top'."""
    kind, rest = operation.split(" ")
    nodes = re.split(r">|\.\.", rest)
    return (kind, nodes[0], None if len(nodes) < 2 or nodes[1] == "none" else nodes[1])


class Access(TestCase):
    time_limit = 60
    builds = ("release",)
    long_builds = ("release", "asan")
    templates = {}

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the peer decides otherwise")

    def make_images(self, topology):
        """The images of a graph and what each shows; made once, then copied. The names in their headers are relative."""
        if topology not in self.templates:
            for position, (name, below) in enumerate(TOPOLOGIES[topology]):
                self.create_image(f"{name}.qcow2", SIZE, backing=f"{below}.qcow2" if below else None)
                at = position * 512
                qemu_io(self.image(name), f"write -q -P {position + 1} {at}k 768k", f"write -q -P {position + 101} {3584 - at}k 64k")
            contents = {}
            for name, _ in TOPOLOGIES[topology]:
                with open(self.image(name), "rb") as image:
                    contents[name] = (image.read(), self.view(self.image(name)))
            self.templates[topology] = contents
        for name, (image, _) in self.templates[topology].items():
            with open(self.image(name), "wb") as out:
                out.write(image)
        return {name: view for name, (_, view) in self.templates[topology].items()}

    def open_graph(self, topology):
        """A daemon on fresh images, and what each image shows."""
        views = self.make_images(topology)
        daemon = self.daemon()
        for name, below in TOPOLOGIES[topology]:
            daemon.add_qcow2(name, self.image(name), below)
        daemon.nbd_server()
        return daemon, views

    def image(self, name):
        return self.path(f"{name}.qcow2")

    def view(self, path):
        raw = self.path("view.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        with open(raw, "rb") as content:
            return content.read()

    def start(self, daemon, operation, name, topology):
        """Starts an operation slowly under the id `name`."""
        kind, node, other = parse(operation)
        if kind == "commit":
            head = node if topology == "fork" and node == "s" else "top"
            arguments = {"job-id": name, "device": head, "top-node": node, "base-node": other, "speed": SLOW}
            daemon.qmp.execute("block-commit", arguments)
        elif kind == "stream":
            arguments = {"job-id": name, "device": node, "speed": SLOW}
            daemon.qmp.execute("block-stream", {**arguments, **({"base-node": other} if other else {})})
        else:
            exclusive = {} if kind.endswith("-sh") else {"exclusive": True}
            daemon.export(node, writable="-rw" in kind, name=name, export_id=name, **exclusive)

    def finish(self, daemon, operation, name):
        """Full speed, to the end, without an error."""
        if operation.startswith("export"):
            return
        status = lambda: daemon.qmp.jobs().get(name, {"status": "null"})["status"]
        if status() != "null":
            try:
                daemon.qmp.execute("block-job-set-speed", device=name, speed=0)
            except QmpError:
                self.assertEqual(status(), "null")
        deadline = time.monotonic() + 20 * SLOWNESS
        while status() not in ("null", "ready"):
            self.assertLess(time.monotonic(), deadline, f"{operation} does not end: {daemon.qmp.jobs()}")
            time.sleep(0.005)
        if status() == "ready":
            daemon.qmp.execute("job-complete", id=name)
            while status() != "null":
                self.assertLess(time.monotonic(), deadline, f"{operation} does not end: {daemon.qmp.jobs()}")
                time.sleep(0.005)
        for event in daemon.qmp.drain_events(0.01):
            if event["event"] == "BLOCK_JOB_COMPLETED":
                self.assertNotIn("error", event["data"], f"{operation}: {event}")

    def check_images(self, topology, operations, views):
        """Each image is clean and shows what it did, or what a commit put into it; what a commit emptied is nobody's."""
        expected, stale = dict(views), set()
        below = dict(TOPOLOGIES[topology])
        for kind, node, other in map(parse, operations):
            if kind == "commit":
                expected[other] = views[node]
                while node != other:
                    stale.add(node)
                    node = below[node]
        for name in views:
            image_check(self.image(name))
            if name not in stale:
                self.assertEqual(self.view(self.image(name)), expected[name], f"what {name} shows")

    def admitted(self, row):
        """Both orders of starting, and of ending."""
        for first_to_end in (0, 1):
            for operations in ((row["a"], row["b"]), (row["b"], row["a"])):
                with self.subTest(order=operations, first_to_end=operations[first_to_end]):
                    daemon, views = self.open_graph(row["topology"])
                    for name, operation in zip(("one", "two"), operations):
                        self.start(daemon, operation, name, row["topology"])
                    jobs = daemon.qmp.jobs()
                    for name, operation in zip(("one", "two"), operations):
                        if not operation.startswith("export"):
                            self.assertIn(jobs[name]["status"], ("running", "ready"), "they do not meet")
                    pairs = list(zip(("one", "two"), operations))
                    for name, operation in pairs if first_to_end == 0 else reversed(pairs):
                        self.finish(daemon, operation, name)
                    daemon.stop()
                    self.daemons.remove(daemon)
                    self.check_images(row["topology"], operations, views)

    def state(self, daemon):
        """All that a refused operation must leave as it was."""
        access = daemon.qmp.execute("query-access")
        for holder in access["holders"]:
            holder.pop("since", None)
        nodes = daemon.qmp.execute("query-named-block-nodes", {"flat": True})
        for node in nodes:
            node["image"].pop("actual-size", None)
        return {
            "access": access,
            "nodes": nodes,
            "jobs": [job["id"] for job in daemon.qmp.execute("query-jobs")],
            "exports": daemon.qmp.execute("query-block-exports"),
        }

    def refused(self, row):
        for operations in ((row["a"], row["b"]), (row["b"], row["a"])):
            with self.subTest(order=operations):
                daemon, views = self.open_graph(row["topology"])
                self.start(daemon, operations[0], "holder", row["topology"])
                before = self.state(daemon)
                error = self.assert_refused(r"\bholder\b", self.start, daemon, operations[1], "asker", row["topology"])
                self.assertEqual(self.state(daemon), before, "a refused operation left something behind")
                conflicts = error.data["conflicts"]
                self.assertIn("holder", [conflict["holder"]["id"] for conflict in conflicts])
                for conflict in conflicts:
                    self.assertLessEqual({"node", "action", "direction", "holder"}, set(conflict))
                self.finish(daemon, operations[0], "holder")
                daemon.stop()
                self.daemons.remove(daemon)
                self.check_images(row["topology"], operations[:1], views)

    def refused_alone(self, row):
        daemon, views = self.open_graph(row["topology"])
        before = self.state(daemon)
        _, node, other = parse(row["a"])
        self.assert_refused(rf"\b{other or node}\b", self.start, daemon, row["a"], "asker", row["topology"])
        self.assertEqual(self.state(daemon), before, "a refused operation left something behind")
        daemon.stop()
        self.daemons.remove(daemon)
        self.check_images(row["topology"], [], views)

    def test_a_stale_image_is_refused_with_its_reason(self):
        daemon, _ = self.open_graph("chain")
        daemon.qmp.execute("block-commit", {"job-id": "j", "device": "top", "top-node": "b", "base-node": "base"})
        self.finish(daemon, "commit b>base", "j")
        for node in ("a", "b"):
            error = self.assert_refused(r"stale", daemon.export, node, False)
            self.assertIn("base", error.desc)

    def test_holders_and_their_claims_are_listed(self):
        daemon, _ = self.open_graph("chain")
        self.start(daemon, "commit b>a", "one", "chain")
        daemon.export("top")
        access = daemon.qmp.execute("query-access")
        holders = {holder["id"]: holder for holder in access["holders"]}
        self.assertEqual(holders["one"]["command"], "block-commit")
        self.assertEqual({claim["node"] for claim in holders["one"]["claims"]}, {"a", "b", "c"})
        for holder in holders.values():
            for claim in holder["claims"]:
                self.assertTrue(claim["path"], holder)

    def test_two_clients_of_one_node_may_both_write(self):
        daemon, _ = self.open_graph("chain")
        for number in range(4):
            daemon.export("top", name=f"v{number}", export_id=f"v{number}")
        for number in range(4):
            qemu_io(daemon.uri(f"v{number}"), f"write -P {number + 50} {number * 256}k 256k", "flush", image_format="raw")
        for number in range(4):
            qemu_io(daemon.uri("v0"), f"read -P {number + 50} {number * 256}k 256k", image_format="raw")

    def test_a_locked_image_is_refused_with_its_path(self):
        """Between processes: the peer's tools and ours refuse each other."""
        daemon, _ = self.open_graph("chain")
        daemon.export("top")
        with self.assertRaises(AssertionError) as caught:
            qemu_io(self.image("top"), "write 0 4k")
        self.assertIn("lock", str(caught.exception))
        other = self.daemon()
        error = self.assert_refused(r"lock", self.open_and_export, other, self.image("top"))
        self.assertIn(self.image("top"), error.desc)

    def open_and_export(self, daemon, path):
        daemon.add_qcow2("top", path)
        daemon.nbd_server()
        daemon.export("top")


def add_scenarios():
    functions = {"admit": Access.admitted, "refuse": Access.refused, "alone": Access.refused_alone}
    rows = [{"verdict": verdict, **row} for verdict in functions for row in SCENARIOS[verdict]]
    for row in rows:
        if row["topology"] not in TOPOLOGIES or not {row[key].split(" ")[0] for key in ("a", "b") if key in row} <= OPERATIONS:
            continue  # TOPOLOGIES and OPERATIONS are what there is
        words = " and ".join(row[key] for key in ("a", "b") if key in row)
        words = words.replace(">", " to ").replace("..", " above ")
        name = f"test_{row['verdict']} {row['topology']} {words}"
        function = functions[row["verdict"]]
        setattr(Access, re.sub(r"[^a-z0-9]+", "_", name.lower()), lambda self, r=row, f=function: f(self, r))


add_scenarios()
