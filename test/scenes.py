# SPDX-License-Identifier: LGPL-2.1-or-later
"""The stage of the scenario tests: graphs of real images, the operations of test/data/access-scenarios.json, and what
each image must show when they have come and gone.

A graph's images are made once for a process, from one seed, and copied for each run. Every image has data of its own,
zeroes, and holes through which it shows what lies below.
"""
import glob
import json
import os
import random
import re
import sys
import time

from harness import KIB, MIB, ROOT, SLOWNESS, QmpError, nbd_handle, qemu_img, qemu_io

sys.path.insert(0, os.path.join(ROOT, "schema"))
import language  # noqa: E402

SIZE = 4 * MIB
CLUSTER = 64 * KIB
SLOW = 64 * KIB  # bytes per second: a job needs many seconds for what it has to copy
TOPOLOGIES = {
    "chain": [("base", None), ("a", "base"), ("b", "a"), ("c", "b"), ("top", "c")],
    "fork": [("base", None), ("a", "base"), ("top", "a"), ("s", "base")],
    # Without its join: an overlay over each leg leans on it as the join would.
    "diamond": [("base", None), ("m", "base"), ("l1", "m"), ("l2", "l1"), ("top", "l2"), ("r1", "m"), ("r2", "r1"), ("rtop", "r2")],
}
# The operations of the list: how each is told to the daemon. One that has no command has no scenes either.
COMMANDS = {
    "commit": "block-commit",
    "stream": "block-stream",
    "export-ro": "block-export-add",
    "export-ro-sh": "block-export-add",
    "export-rw": "block-export-add",
    "export-rw-sh": "block-export-add",
    "resize": "block_resize",
    "shrink": "block_resize",
    "cbf": "change-backing-file",
    "mirror": "blockdev-mirror",
    "replace": "blockdev-mirror",
    "backup": "blockdev-backup",
    "snapshot": "blockdev-snapshot",
    "bitmap-add": "block-dirty-bitmap-add",
    "throttle": "block_set_io_throttle",
}
JOBS = {"commit", "stream", "mirror", "replace", "backup"}
AT_ONCE = {"resize", "shrink", "cbf", "bitmap-add", "snapshot"}
TARGETED = {"mirror", "replace", "backup", "snapshot"}  # those that have a node of their own, target_of(NAME)


def commands():
    """The names of all commands of the schema."""
    texts = []
    for path in glob.glob(os.path.join(ROOT, "schema", "*.schema")):
        with open(path, encoding="utf-8") as stream:
            texts.append((path, stream.read()))
    return set(language.load(texts).commands)


PLAYED = {kind for kind, command in COMMANDS.items() if command in commands()}

with open(os.path.join(ROOT, "test", "data", "access-scenarios.json"), encoding="utf-8") as data:
    SCENARIOS = json.load(data)


def parse(operation):
    """'commit a>base' -> ('commit', 'a', 'base'); 'stream c..none' -> ('stream', 'c', None); 'export-rw top'."""
    kind, rest = operation.split(" ")
    nodes = re.split(r">|\.\.", rest)
    return (kind, nodes[0], None if len(nodes) < 2 or nodes[1] == "none" else nodes[1])


def kind_of(operation):
    return parse(operation)[0]


def operations_of(row):
    return [row[key] for key in ("a", "b") if key in row]


def names_the_join(row):
    return row["topology"] == "diamond" and any({"J", "top"} & set(parse(operation)) for operation in operations_of(row))


def is_played(row):
    """Whether there are such operations, and such a graph."""
    return not names_the_join(row) and all(kind_of(operation) in PLAYED for operation in operations_of(row))


def head_of(topology, node):
    """The top of a chain with `node` in it."""
    for name, below in reversed(TOPOLOGIES[topology]):
        if below == node:
            return head_of(topology, name)
    return node


def target_of(name):
    """The node, and the file without its suffix, that an operation called `name` fills or puts over another."""
    return f"{name}-target"


def scene_name(verdict, row):
    """A name for a test method."""
    words = " and ".join(operations_of(row)).replace(">", " to ").replace("..", " above ")
    return re.sub(r"[^a-z0-9]+", "_", f"test_{verdict} {row['topology']} {words}".lower())


class Images:
    """The images of a graph in a directory, made by the peer; `views` is what each shows."""

    templates = {}

    def __init__(self, topology, directory, seed):
        self.topology = topology
        self.directory = directory
        self.below = dict(TOPOLOGIES[topology])
        if (topology, seed) not in self.templates:
            self.templates[topology, seed] = self.make(random.Random(f"{seed} {topology}"))
        self.views = {}
        for name, (image, view) in self.templates[topology, seed].items():
            with open(self.path(name), "wb") as out:
                out.write(image)
            self.views[name] = view

    def path(self, name):
        return os.path.join(self.directory, f"{name}.qcow2")

    def make(self, choose):
        contents = {}
        for position, (name, below) in enumerate(TOPOLOGIES[self.topology]):
            size = SIZE - (MIB if not below and choose.random() < 0.5 else 0)
            backing = ["-b", f"{below}.qcow2", "-F", "qcow2"] if below else []
            qemu_img("create", "-q", "-f", "qcow2", *backing, self.path(name), str(size))
            commands = []
            for number in range(14):
                at = choose.randrange(size // CLUSTER - 2) * CLUSTER
                length = choose.choice([4 * KIB, CLUSTER, CLUSTER, 2 * CLUSTER, 3 * CLUSTER])
                length = min(length, size - at)
                zeroes = number % 7 == 6
                commands.append(f"write -q {'-z' if zeroes else f'-P {16 * position + number + 1}'} {at} {length}")
            qemu_io(self.path(name), *commands)
        for name in self.below:
            with open(self.path(name), "rb") as image:
                contents[name] = (image.read(), self.read(name))
        return contents

    def read(self, name):
        """What an image shows by itself: with what it leans on as its header says, as the peer reads it."""
        raw = os.path.join(self.directory, "view.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", self.path(name), raw)
        with open(raw, "rb") as content:
            view = content.read()
        os.unlink(raw)
        return view


class Prediction:
    """What a graph looks like after operations have ended one by one: the edges, the views, and what is stale."""

    def __init__(self, images):
        self.below = dict(images.below)
        self.views = dict(images.views)
        self.stale = {}  # node -> where its data are
        self.moved = {}  # node -> what its users use instead
        self.ranges = {}
        self.started = {}
        self.written = {"top"}  # nodes that show something of what clients have written to the top

    def chain(self, upper, lower):
        """From `upper` down to, not including, `lower`."""
        found = []
        while upper != lower:
            found.append(upper)
            upper = self.below[upper]
        return found

    def starts(self, operation, name=None):
        kind, node, other = parse(operation)
        if kind == "stream":
            self.ranges[operation] = self.chain(node, other)
        self.started[name] = self.views[node]

    def ends(self, operation, name=None):
        kind, node, other = parse(operation)
        if kind == "commit":
            self.commit_ends(node, other)
        elif kind == "stream":
            bottom = [image for image in self.chain(node, None) if image in self.ranges[operation]][-1]
            self.below[node] = self.below[bottom]
        elif kind == "resize":
            self.views[node] += bytes(SIZE)
        elif kind == "shrink":
            self.views[node] = self.views[node][: SIZE // 2]
        elif kind in TARGETED:
            self.target_ends(kind, self.place(node) if kind in JOBS else node, target_of(name), self.started[name])

    def commit_ends(self, node, other):
        for name in self.chain(node, other):
            self.stale[name] = other
        self.views[other] = self.views[node]
        if node in self.written:
            self.written.add(other)
        self.relink(node, other)

    def relink(self, node, to):
        for name, below in self.below.items():
            if below == node and name not in self.stale:
                self.below[name] = to

    def target_ends(self, kind, node, target, began):
        self.views[target] = began if kind == "backup" else self.views[node]
        if node in self.written:
            self.written.add(target)
        if kind in ("replace", "snapshot"):
            self.relink(node, target)
            self.moved[node] = target
        self.below[target] = node if kind == "snapshot" else None

    def place(self, node):
        """Where those are now who used a node at first."""
        while node in self.stale or node in self.moved:
            node = self.moved.get(node) or self.stale[node]
        return node


def prepare(daemon, operation, name):
    """Makes what an operation fills or puts over its node."""
    kind, node, _ = parse(operation)
    if kind not in TARGETED:
        return
    target = target_of(name)
    path = os.path.join(daemon.directory, f"{target}.qcow2")
    nodes = {info["node-name"]: info for info in daemon.qmp.execute("query-named-block-nodes", flat=True)}
    below = ["-b", f"{node}.qcow2", "-F", "qcow2"] if kind == "snapshot" else []
    qemu_img("create", "-q", "-u", "-f", "qcow2", *below, path, str(nodes[node]["image"]["virtual-size"]))
    file = {"driver": "file", "filename": path}
    daemon.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": target, "file": file, "backing": None})


def start(daemon, operation, name, topology="chain", **more):
    """Starts an operation under the id `name`: a job slowly, and so that it waits for its finalization. What has a
    target is prepared."""
    kind, node, other = parse(operation)
    if kind in JOBS:
        arguments = {"job-id": name, "speed": SLOW, "auto-finalize": False, **more}
    if kind == "commit":
        daemon.qmp.execute("block-commit", {"device": head_of(topology, node), "top-node": node, "base-node": other, **arguments})
    elif kind == "stream":
        base = {"base-node": other} if other else {}
        daemon.qmp.execute("block-stream", {"device": node, **base, **arguments})
    elif kind in ("mirror", "replace"):
        replaces = {"replaces": node} if kind == "replace" else {}
        daemon.qmp.execute("blockdev-mirror", {"device": node, "target": target_of(name), "sync": "full", **replaces, **arguments})
    elif kind == "backup":
        daemon.qmp.execute("blockdev-backup", {"device": node, "target": target_of(name), "sync": "full", **arguments})
    elif kind == "snapshot":
        daemon.qmp.execute("blockdev-snapshot", {"node": node, "overlay": target_of(name)})
    elif kind in ("resize", "shrink"):
        size = SIZE * 2 if kind == "resize" else SIZE // 2
        daemon.qmp.execute("block_resize", {"node-name": node, "size": size})
    elif kind == "cbf":
        below = os.path.join(daemon.directory, f"{dict(TOPOLOGIES[topology])[node]}.qcow2")  # the same by another name
        arguments = {"device": head_of(topology, node), "image-node-name": node, "backing-file": below}
        daemon.qmp.execute("change-backing-file", arguments)
    elif kind == "bitmap-add":
        daemon.qmp.execute("block-dirty-bitmap-add", {"node": node, "name": name})
    else:
        exclusive = {} if kind.endswith("-sh") else {"exclusive": True}
        daemon.export(node, writable="-rw" in kind, name=name, export_id=name, **exclusive)


def status_of(daemon, job):
    return daemon.qmp.jobs().get(job, {"status": "null"})["status"]


def wait_status(daemon, job, *wanted):
    deadline = time.monotonic() + 20 * SLOWNESS
    while (status := status_of(daemon, job)) not in wanted:
        if time.monotonic() > deadline or status == "null":
            raise AssertionError(f"{job} is {status}, not {wanted}: {daemon.qmp.jobs()} {daemon.qmp.drain_events()}")
        time.sleep(0.003)
    return status


def to_the_last_step(daemon, operation, job):
    """At full speed until it waits for its finalization. A mirror that does not replace leaves a copy behind."""
    if status_of(daemon, job) != "pending":
        daemon.qmp.execute("block-job-set-speed", device=job, speed=0)
        if wait_status(daemon, job, "ready", "pending") == "ready":
            if kind_of(operation) == "mirror":
                daemon.qmp.execute("block-job-cancel", device=job)
            else:
                daemon.qmp.execute("job-complete", id=job)
    wait_status(daemon, job, "pending")


def take_the_last_step(daemon, job):
    """Finalizes a job and waits until it is gone; it must not have failed."""
    daemon.qmp.execute("job-finalize", id=job)
    wait_status(daemon, job, "null")
    for event in daemon.qmp.drain_events(0.005):
        if event["event"] == "BLOCK_JOB_COMPLETED" and "error" in event["data"]:
            raise AssertionError(str(event))


def end(daemon, operation, name):
    """Brings an operation to a good end."""
    kind = kind_of(operation)
    if kind in JOBS:
        to_the_last_step(daemon, operation, name)
        take_the_last_step(daemon, name)
    elif kind.startswith("export"):
        remove_export(daemon, name)


def remove_export(daemon, name):
    daemon.qmp.execute("block-export-del", {"id": name, "mode": "hard"})
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id=name)


def read_export(daemon, name):
    with nbd_handle(daemon.uri(name)) as handle:
        return handle.pread(handle.get_size(), 0)


def is_refusal(error):
    return isinstance(error, QmpError) and error.data is not None and error.data.get("conflicts")
