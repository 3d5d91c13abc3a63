# SPDX-License-Identifier: LGPL-2.1-or-later
"""The scenarios of test/data/access-scenarios.json with the real daemon and real files, in every order.

Admitted: both operations are under way at the same time while a client writes to the top. Whatever the daemon lets
anybody read meanwhile shows what it should. In the end the daemon is gone, the stale images are deleted, and all others
are opened from disk, by the peer's tools and by a fresh daemon: content, size and backing string are as they must be.

Refused: in both orders, with the name of the one that stands in the way, and nothing at all has changed.
"""
import contextlib
import hashlib
import json
import os
import re
import sys
import time

import scenes
from harness import FULL, IS_PEER, KIB, MIB, SLOWNESS, QmpError, TestCase, image_check, qemu_img
from verifying import Region

WRITER_SIZE = 512 * KIB
NAMES = ("one", "two")


class Scenes(TestCase):
    """One seed for the whole process: the images are made once."""

    builds = ("release",)
    long_builds = ("release", "asan")
    time_limit = 60
    shared_seed = None

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the peer decides otherwise")
        Scenes.shared_seed = Scenes.shared_seed or self.seed
        self.seed = Scenes.shared_seed
        self.random.seed(f"{self.seed} {self.id()}")

    def open_graph(self, topology):
        """A daemon on fresh images."""
        images = scenes.Images(topology, self.directory, self.seed)
        daemon = self.daemon()
        for name, below in scenes.TOPOLOGIES[topology]:
            daemon.add_qcow2(name, images.path(name), below)
        daemon.nbd_server()
        return daemon, images

    @contextlib.contextmanager
    def sub_test(self, row, **more):
        """One of several runs; a failed one leaves no daemon in the way of the next."""
        with self.subTest(topology=row["topology"], operations=" + ".join(scenes.operations_of(row)), **more):
            try:
                yield
            except BaseException:
                for daemon in self.daemons:
                    sys.stderr.write(f"--- stderr of the daemon\n{daemon.stderr()[-3000:]}\n")
                    daemon.kill()
                self.daemons.clear()
                raise

    def close(self, daemon):
        daemon.stop()
        self.daemons.remove(daemon)


class Run:
    """Two operations at the same time, once: in one order of starting, one of ending, and one way of overlapping."""

    def __init__(self, test, row, first_to_start, first_to_end, both_wait):
        self.test = test
        self.topology = row["topology"]
        operations = scenes.operations_of(row)
        self.operations = dict(zip(NAMES, operations if first_to_start == 0 else operations[::-1]))
        self.end_order = NAMES if first_to_end == 0 else NAMES[::-1]
        self.both_wait = both_wait  # both take their last steps when both have copied everything
        self.daemon, self.images = test.open_graph(self.topology)
        self.prediction = scenes.Prediction(self.images)
        self.clients = []  # (region, client, export)
        self.original = os.path.join(test.directory, "original.raw")
        with open(self.original, "wb") as out:
            out.write(self.images.views["top"])
        self.probes = 0
        self.log = []

    def kind(self, name):
        return scenes.kind_of(self.operations[name])

    # Writers.

    def writers_exports(self):
        """Where clients write: through the exports that the scenario has itself, or else through one of our own."""
        own = [name for name in NAMES if self.operations[name] in ("export-rw top", "export-rw-sh top")]
        return own or ["writer"]

    def start_writer(self, export):
        number = len(self.clients)
        ledger = f"{export}-{self.daemon.pid}"
        place = ((number * 2 + 1) * MIB, WRITER_SIZE)
        region = Region(self.test.directory, ledger, self.test.seed, *place, original=self.original)
        client = region.start(self.daemon.nbd_path, export, "--depth", "4", "--reads", "50")
        self.clients.append((region, client, export))

    def stop_writer(self, export):
        for position, (region, client, name) in enumerate(self.clients):
            if name == export and client:
                client.stop()
                self.clients[position] = (region, None, name)

    def check_writers(self):
        for _, client, _ in self.clients:
            if client:
                client.wait_progress(5)

    def same(self, view, node):
        """A view against what it should be; where clients write, the clients know better."""
        expected = self.prediction.views[node]
        if len(view) != len(expected):
            return False
        if node not in self.prediction.written:
            return view == expected
        position = 0
        for number in range(len(self.clients)):
            begin = (number * 2 + 1) * MIB
            if view[position:begin] != expected[position:begin]:
                return False
            position = begin + WRITER_SIZE
        return view[position:] == expected[position:]

    def top_is_in(self, node):
        return self.prediction.place("top") == node

    # What may be read.

    def probe(self):
        """Whatever may be read shows what it should, at any moment."""
        readable = []
        for node in self.prediction.views:
            try:
                self.daemon.export(node, writable=False, name="probe", export_id="probe")
            except QmpError as refusal:
                self.test.assertTrue(scenes.is_refusal(refusal), str(refusal))
                if node in self.prediction.stale:
                    self.test.assertIn("stale", refusal.desc)
                continue
            self.test.assertNotIn(node, self.prediction.stale, "a stale node may not be read")
            view = scenes.read_export(self.daemon, "probe")
            scenes.remove_export(self.daemon, "probe")
            self.test.assertTrue(self.same(view, node), f"what '{node}' shows after {self.log}")
            readable.append(node)
        self.test.assertIn(self.prediction.place("top"), readable)
        self.check_exports()
        self.check_writers()

    def check_exports(self):
        """Each export is where its node's data are, and shows what it did."""
        exports = {info["id"]: info["node-name"] for info in self.daemon.qmp.execute("query-block-exports")}
        for name, operation in self.operations.items():
            if name in exports:
                node = scenes.parse(operation)[1]
                self.test.assertEqual(exports[name], self.prediction.place(node), f"where export '{name}' is")
                view = scenes.read_export(self.daemon, name)
                self.test.assertTrue(self.same(view, self.prediction.place(node)), f"what export '{name}' shows")

    def check_holders(self):
        """The ledger has every operation that is under way."""
        holders = {holder["id"] for holder in self.daemon.qmp.execute("query-access")["holders"]}
        for name in NAMES:
            if self.kind(name) not in scenes.AT_ONCE:
                self.test.assertIn(name, holders)

    # The run.

    def start(self, name):
        operation = self.operations[name]
        self.log.append(f"start {operation}")
        self.prediction.starts(operation, name)
        scenes.prepare(self.daemon, operation, name)
        scenes.start(self.daemon, operation, name, self.topology)
        if self.kind(name) in scenes.AT_ONCE:
            self.prediction.ends(operation, name)
        if name in self.writers_exports():
            self.start_writer(name)

    def go_on(self, name):
        """A little of what it has to copy; not all, if the machine is not very slow."""
        if self.kind(name) in scenes.JOBS:
            with contextlib.suppress(QmpError):  # pending by now
                self.daemon.qmp.execute("block-job-set-speed", device=name, speed=2 * MIB)
                time.sleep(0.05)
                self.daemon.qmp.execute("block-job-set-speed", device=name, speed=scenes.SLOW)

    def end(self, name):
        operation = self.operations[name]
        kind = self.kind(name)
        self.log.append(f"end {operation}")
        if kind in scenes.AT_ONCE:
            return
        if kind.startswith("export"):
            self.stop_writer(name)
        scenes.end(self.daemon, operation, name)
        self.prediction.ends(operation, name)

    def play(self):
        own_writer = self.writers_exports() == ["writer"]
        early = self.kind("one") == "snapshot" or self.test.random.random() < 0.5  # what an overlay leans on is not written
        if own_writer and early:
            self.daemon.export("top", name="writer", export_id="writer")
        self.start("one")
        if own_writer and not early:
            self.daemon.export("top", name="writer", export_id="writer")
        if own_writer:
            self.start_writer("writer")
        self.start("two")
        self.check_holders()
        for name in NAMES:
            self.go_on(name)
        jobs = self.daemon.qmp.jobs()
        for name in NAMES:
            if self.kind(name) in scenes.JOBS:
                self.test.assertIn(jobs[name]["status"], ("running", "ready", "pending"), "they do not meet")
        self.probe()
        if self.both_wait:
            for name in NAMES:
                if self.kind(name) in scenes.JOBS:
                    scenes.to_the_last_step(self.daemon, self.operations[name], name)
            self.probe()
        for name in self.end_order:
            self.end(name)
            self.probe()
        self.finish()

    def finish(self):
        """The clients go, and everything is read once more through the export."""
        for region, client, export in self.clients:
            if client:
                client.stop()
            if export not in NAMES:  # else gone with its operation
                region.verify(self.daemon.nbd_path, export)
        self.test.close(self.daemon)
        self.check_disk()

    # What is on disk.

    def check_disk(self):
        for name in self.prediction.stale:
            os.unlink(self.images.path(name))
        left = [name for name in self.prediction.below if name not in self.prediction.stale]
        self.check_strings(left)
        for name in left:
            image_check(self.images.path(name))
            self.check_view(self.images.read(name), name, "as the peer reads it")
        self.check_with_a_fresh_daemon(left)

    def check_strings(self, left):
        for name in left:
            info = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", self.images.path(name)))
            below = self.prediction.below[name]
            string = info.get("backing-filename")
            found = string and os.path.normpath(os.path.join(self.test.directory, re.sub("^file:", "", string)))
            self.test.assertEqual(found, self.images.path(below) if below else None, f"the backing string of '{name}'")
            if below:
                self.test.assertEqual(info["backing-filename-format"], "qcow2", f"the backing format of '{name}'")

    def check_view(self, view, name, how):
        self.test.assertEqual(len(view), len(self.prediction.views[name]), f"the size of '{name}', {how}")
        self.test.assertTrue(self.same(view, name), f"what '{name}' shows, {how}, after {self.log}")
        if self.top_is_in(name):
            raw = os.path.join(self.test.directory, "top.raw")
            with open(raw, "wb") as out:
                out.write(view)
            for region, _, _ in self.clients:
                region.verify_file(raw)

    def check_with_a_fresh_daemon(self, left):
        daemon = self.test.daemon()
        daemon.nbd_server()
        for name in left:
            file = {"driver": "file", "filename": self.images.path(name)}
            arguments = {"driver": "qcow2", "node-name": name, "file": file, "read-only": True}
            daemon.qmp.execute("blockdev-add", arguments)
            daemon.export(name, writable=False)
            self.check_view(scenes.read_export(daemon, name), name, "as a fresh daemon reads it")
        self.test.close(daemon)


class Admitted(Scenes):
    """What must be admitted, with a client that writes; a slice takes each value of each choice at least once."""

    def play(self, row):
        picked = range(8)
        if not FULL:
            one = self.random.randrange(4)
            picked = (one, 7 - one)
        for number in picked:
            order = {"first_to_start": number & 1, "first_to_end": number >> 1 & 1, "both_wait": number >> 2 & 1}
            with self.sub_test(row, **order):
                Run(self, row, **order).play()


class Refused(Scenes):
    """What must be refused."""

    def state(self, daemon, images):
        """All that a refused operation must leave as it was. Ages go by, and that is all."""
        access = daemon.qmp.execute("query-access")
        for holder in access["holders"]:
            holder.pop("since", None)
        queries = ("query-jobs", "query-block-jobs", "query-block-exports", "query-graph", "query-named-block-nodes")
        files = {}
        for entry in os.scandir(self.directory):
            if entry.name.endswith((".stderr", ".qmp", ".nbd")):
                files[entry.name] = None
            else:
                with open(entry.path, "rb") as content:
                    files[entry.name] = hashlib.sha256(content.read()).hexdigest()
        return {"access": access, "files": files, **{query: daemon.qmp.execute(query) for query in queries}}

    def explained(self, error, pattern, kind, images):
        """A refusal says, in words and as data, who stands in the way and where."""
        self.assertRegex(error.desc, pattern)
        conflicts = error.data["conflicts"]
        named = [conflict for conflict in conflicts if re.search(pattern, conflict.get("holder", {}).get("id", ""))]
        self.assertTrue(named, f"the data do not name {pattern}: {error.data}")
        for conflict in conflicts:
            self.assertLessEqual({"node", "action", "direction", "holder", "remedy"}, set(conflict))
            nodes = {*images.below, *map(scenes.target_of, ("holder", "asker"))}
            self.assertIn(conflict["node"], nodes, f"a node that nobody knows: {conflict}")
            self.assertNotIn("#", conflict["holder"]["id"])
        for conflict in named:
            self.assertEqual(conflict["holder"]["kind"], kind)
        self.assertTrue(any(conflict["node"] in error.desc for conflict in named))

    def refused(self, row):
        operations = scenes.operations_of(row)
        for holder, asker in (operations, operations[::-1]):
            with self.sub_test(row, holder=holder):
                if scenes.kind_of(holder) in scenes.AT_ONCE:
                    self.one_after_the_other(row["topology"], holder, asker)
                else:
                    self.refused_beside(row["topology"], holder, asker)

    def refused_beside(self, topology, holder, asker):
        daemon, images = self.open_graph(topology)
        prediction = scenes.Prediction(images)
        prediction.starts(holder, "holder")
        for operation, name in ((holder, "holder"), (asker, "asker")):
            scenes.prepare(daemon, operation, name)
        scenes.start(daemon, holder, "holder", topology)
        is_job = scenes.kind_of(holder) in scenes.JOBS
        if is_job:
            daemon.qmp.execute("job-pause", id="holder")
            scenes.wait_status(daemon, "holder", "paused", "standby")
        before = self.state(daemon, images)
        error = self.assert_refused(r"\bholder\b", scenes.start, daemon, asker, "asker", topology)
        self.assertEqual(self.state(daemon, images), before, "a refused operation left something behind")
        self.explained(error, r"^holder$|\bholder\b", "job" if is_job else "export", images)
        self.assertEqual([event["event"] for event in daemon.qmp.drain_events(0.01) if "asker" in json.dumps(event)], [])
        if is_job:
            daemon.qmp.execute("job-resume", id="holder")
        scenes.end(daemon, holder, "holder")
        prediction.ends(holder, "holder")
        self.close(daemon)
        self.check_disk(images, prediction)

    def one_after_the_other(self, topology, done, operation):
        """What is over holds nothing: an operation that ends at once stands in nobody's way."""
        daemon, images = self.open_graph(topology)
        scenes.prepare(daemon, done, "done")
        scenes.start(daemon, done, "done", topology)
        scenes.prepare(daemon, operation, "operation")
        scenes.start(daemon, operation, "operation", topology)
        scenes.end(daemon, operation, "operation")
        self.close(daemon)

    def alone(self, row):
        """Another image leans on what the operation would change, though nobody uses that image."""
        operation = row["a"]
        kind, node, other = scenes.parse(operation)
        below = dict(scenes.TOPOLOGIES[row["topology"]])
        changed = other or node
        overlays = [name for name in below if below[name] == changed]
        if kind == "commit":  # those on the way to it are its own
            way = scenes.Prediction(scenes.Images(row["topology"], self.directory, self.seed)).chain(node, other)
            overlays = [name for name in overlays if name not in way]
        daemon, images = self.open_graph(row["topology"])
        before = self.state(daemon, images)
        pattern = "|".join(rf"\b{name} -> {changed}\b" for name in overlays)
        error = self.assert_refused(pattern, scenes.start, daemon, operation, "asker", row["topology"])
        self.assertEqual(self.state(daemon, images), before, "a refused operation left something behind")
        self.explained(error, pattern, "edge", images)
        self.close(daemon)
        self.check_disk(images, scenes.Prediction(images))

    def check_disk(self, images, prediction):
        for name, view in prediction.views.items():
            if name not in prediction.stale:
                image_check(images.path(name))
                self.assertTrue(images.read(name) == view, f"what '{name}' shows")


class Missing(Scenes):
    """The scenarios whose operations do not exist yet: listed, never dropped in silence."""

    def test_scenarios_of_operations_that_are_not_there_yet(self):
        daemon = self.daemon()
        known = {command["name"] for command in daemon.qmp.execute("query-commands")}
        missing = []
        for verdict in ("admit", "refuse", "alone"):
            for row in scenes.SCENARIOS[verdict]:
                if scenes.is_played(row):
                    continue
                lacking = [kind for kind in map(scenes.kind_of, scenes.operations_of(row)) if kind not in scenes.PLAYED]
                lacking = [*lacking, *(["join"] if scenes.names_the_join(row) else [])]
                there = [kind for kind in lacking if scenes.COMMANDS.get(kind) in known]
                self.assertNotEqual(sorted(there), sorted(lacking), f"{row} can be played now: add it to scenes.PLAYED")
                missing.append(f"{verdict} {row['topology']} {' + '.join(scenes.operations_of(row))}")
        if missing:
            self.skipTest(f"operation not there yet in {len(missing)} scenarios: {'; '.join(missing)}")


def add_scenarios():
    functions = {"admit": (Admitted, Admitted.play), "refuse": (Refused, Refused.refused), "alone": (Refused, Refused.alone)}
    for verdict, (owner, function) in functions.items():
        for row in scenes.SCENARIOS[verdict]:
            if scenes.is_played(row):
                setattr(owner, scenes.scene_name(verdict, row), lambda self, r=row, f=function: f(self, r))


add_scenarios()
