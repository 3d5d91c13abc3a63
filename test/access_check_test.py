# SPDX-License-Identifier: LGPL-2.1-or-later
"""access-check: what it says is what the command then does, and asking changes nothing."""
import hashlib
import json
import os
import re
import time

import scenes
from harness import IS_PEER, MIB, PROGRAM, SLOWNESS, QmpError, TestCase, qemu_img, qemu_io, run

SLOW = 64 * 1024
NAMES = ("base", "a", "b", "c", "top")


def commit(top, base, **more):
    return "block-commit", {"job-id": "asked", "device": "top", "top-node": top, "base-node": base, "speed": SLOW, **more}


def stream(node, base=None, **more):
    below = {"base-node": base} if base else {}
    return "block-stream", {"job-id": "asked", "device": node, "speed": SLOW, **below, **more}


def export(node, **more):
    return "block-export-add", {"type": "nbd", "id": "asked", "name": "asked", "node-name": node, **more}


SIZE = 8 * MIB


def resize(node, size):
    return "block_resize", {"node-name": node, "size": size}


def mirror(node, **more):
    return "blockdev-mirror", {"job-id": "asked", "device": node, "target": "asked-target", "sync": "full", "speed": SLOW, **more}


def backup(node):
    return "blockdev-backup", {"job-id": "asked", "device": node, "target": "asked-target", "sync": "full", "speed": SLOW}


# By the names that the operation matrix has for them.
OPERATIONS = {
    "commit a>base": commit("a", "base"),
    "commit c>a": commit("c", "a"),
    "commit c>b": commit("c", "b"),
    "commit b>base": commit("b", "base"),
    "commit top>b": commit("top", "b"),
    "stream top..b": stream("top", "b"),
    "stream c..a": stream("c", "a"),
    "stream b..none": stream("b"),
    "export-ro-sh b": export("b"),
    "export-ro-sh base": export("base"),
    "export-rw-sh top": export("top", writable=True),
    "export-rw top": export("top", writable=True, exclusive=True),
    "export-rw-sh base": export("base", writable=True),
    "resize a": resize("a", SIZE),
    "resize c": resize("c", SIZE),
    "resize top": resize("top", SIZE),
    "shrink a": resize("a", SIZE // 2),
    "shrink top": resize("top", SIZE // 2),
    "cbf b": ("change-backing-file", {"device": "top", "image-node-name": "b", "backing-file": "a.qcow2"}),
    "cbf top": ("change-backing-file", {"device": "top", "image-node-name": "top", "backing-file": "c.qcow2"}),
}
if "mirror" in scenes.PLAYED:
    OPERATIONS |= {"mirror c": mirror("c")}
if "backup" in scenes.PLAYED:
    OPERATIONS |= {"backup c": backup("c")}
MOMENTARY = ("block_resize", "change-backing-file")  # over when the command returns
# Commands and arguments that access control is never asked about: the answer is the command's own error.
ERRORS = [
    ("block-commit", {}),
    ("block-commit", {"device": "top", "bogus": 1}),
    ("block-commit", {"device": "top", "speed": "fast"}),
    ("block-commit", {"device": "gone"}),
    ("block-commit", {"job-id": "j", "device": "top", "top-node": "base", "base-node": "b"}),
    ("block-commit", {"job-id": "j", "device": "top", "top-node": "c", "base-node": "gone"}),
    ("block-commit", {"job-id": "1", "device": "top", "top-node": "c", "base-node": "a"}),
    ("block-commit", {"job-id": "held", "device": "top", "top-node": "c", "base-node": "a"}),
    ("block-commit", {"job-id": "j", "device": "top", "base-node": "b", "filter-node-name": "top"}),
    ("block-commit", {"job-id": "j", "device": "top", "base-node": "b", "backing-file": "x"}),
    ("block-commit", {"job-id": "j", "device": "top", "on-conflict": "bogus"}),
    ("block-commit", {"job-id": "j", "device": "top", "on-conflict-timeout": 1}),
    ("block-commit", {"job-id": "j", "device": "top", "override": "just so"}),
    ("block-stream", {"job-id": "j", "device": "top", "base-node": "a", "bottom": "b"}),
    ("block-stream", {"job-id": "j", "device": "gone"}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "gone"}),
    ("block-export-add", {"type": "nbd", "id": "/", "node-name": "top"}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "top", "iothread": "gone"}),
    ("block_resize", {"node-name": "gone", "size": 0}),
    ("block_resize", {"size": 0}),
    ("change-backing-file", {"device": "a", "image-node-name": "b", "backing-file": "a.qcow2"}),
    ("change-backing-file", {"device": "a", "image-node-name": "base", "backing-file": "a.qcow2"}),
    ("query-jobs", {"bogus": 1}),
    ("job-pause", {}),
    ("access-check", {}),
    ("qmp_capabilities", {"enable": ["bogus"]}),
]


def without_age(value):
    """A refusal without what differs from second to second."""
    if isinstance(value, dict):
        return {key: without_age(inner) for key, inner in value.items() if key not in ("since", "progress")}
    if isinstance(value, list):
        return [without_age(inner) for inner in value]
    return re.sub(r"since \d+ s(, \d+ %)?", "since", value) if isinstance(value, str) else value


class AccessCheck(TestCase):
    time_limit = 60
    builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the peer has no access-check")
        below = None
        for position, name in enumerate(NAMES):
            image = self.create_image(f"{name}.qcow2", SIZE, backing=below)
            qemu_io(image, f"write -q -P {position + 1} {position}M 2M")
            below = image
        self.server = self.daemon()
        self.server.add_chain([(name, self.path(f"{name}.qcow2")) for name in NAMES])
        for target in ("asked-target", "held-target"):
            self.server.add_qcow2(target, self.create_image(f"{target}.qcow2", SIZE))

    def check(self, command, arguments):
        return self.server.qmp.execute("access-check", {"command": command, "arguments": arguments})

    def state(self):
        """All that asking must leave as it was, the bytes of the images included."""
        def digest(name):
            with open(self.path(f"{name}.qcow2"), "rb") as image:
                return hashlib.sha256(image.read()).hexdigest()

        execute = self.server.qmp.execute
        return {
            "access": without_age(execute("query-access")),
            "graph": execute("query-graph"),
            "nodes": execute("query-named-block-nodes", {"flat": True}),
            "jobs": execute("query-jobs"),
            "exports": execute("query-block-exports"),
            "files": {name: digest(name) for name in NAMES},
        }

    def begin(self, operation, name):
        """Starts an operation of the table under another name and holds it where it is."""
        command, arguments = OPERATIONS[operation]
        key = "id" if command == "block-export-add" else "job-id"
        more = {"name": name} if command == "block-export-add" else {}
        more |= {"target": f"{name}-target"} if "target" in arguments else {}
        self.server.qmp.execute(command, {**arguments, **more, key: name})
        if command != "block-export-add":
            self.server.qmp.execute("job-pause", {"id": name})
            self.wait_for(lambda: self.server.qmp.jobs()[name]["status"] in ("paused", "standby"))

    def end(self, operation, name):
        if OPERATIONS[operation][0] in MOMENTARY:
            if operation.startswith("shrink"):
                self.server.qmp.execute("block_resize", {**OPERATIONS[operation][1], "size": SIZE})
        elif OPERATIONS[operation][0] == "block-export-add":
            self.server.qmp.execute("block-export-del", {"id": name})
            self.wait_for(lambda: not [e for e in self.server.qmp.execute("query-block-exports") if e["id"] == name])
        else:
            self.server.qmp.execute("job-cancel", {"id": name})
            self.wait_for(lambda: name not in self.server.qmp.jobs())

    def wait_for(self, condition):
        deadline = time.monotonic() + 10 * SLOWNESS
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.002)

    def ask_and_do(self, operation):
        """Is it admitted? Both the check and the command say so, or neither does."""
        before = self.state()
        check = self.check(*OPERATIONS[operation])
        self.assertEqual(self.state(), before, "asking has changed something")
        self.assertTrue(check["claims"])
        try:
            self.server.qmp.execute(*OPERATIONS[operation])
        except QmpError as error:
            self.assertFalse(check["admitted"], error)
            self.assertEqual(without_age(check["sentence"]), without_age(error.desc))
            self.assertEqual(without_age(check["conflicts"]), without_age(error.data["conflicts"]))
            self.assertEqual(self.state(), before, "a refused command has changed something")
            return False
        self.assertTrue(check["admitted"], check)
        self.assertEqual(check["conflicts"], [])
        self.end(operation, "asked")
        return True

    def verdicts(self, held):
        """Each operation beside `held` (None: alone)."""
        if held:
            self.begin(held, "held")
        verdicts = {}
        for operation in OPERATIONS:
            with self.subTest(held=held, asked=operation):
                verdicts[operation] = self.ask_and_do(operation)
        if held:
            self.end(held, "held")
        return verdicts

    def test_the_verdict_is_what_the_command_does_in_both_orders(self):
        self.server.nbd_server()
        alone = self.alone = self.verdicts(None)
        self.assertFalse(alone["export-rw-sh base"])
        self.assertFalse(alone["shrink a"])
        possible = [name for name, admitted in alone.items() if admitted and OPERATIONS[name][0] not in MOMENTARY]
        beside = {held: self.verdicts(held) for held in possible}
        for one in possible:
            for other in possible:
                self.assertEqual(beside[one][other], beside[other][one], f"{one} and {other}: the order decides")
        self.compare_with_the_matrix(beside)

    def compare_with_the_matrix(self, beside):
        matrix = json.loads(run(PROGRAM, "access", "matrix", "--json").stdout)
        compared = set()
        for row in matrix["pairs"]:
            for instance in row["instances"]:
                for held, asked in (("first", "second"), ("second", "first")):
                    held, asked = instance[held], instance[asked]
                    if instance["graph"] == "chain" and held in beside and asked in OPERATIONS:
                        self.assertEqual(beside[held][asked], row["admitted"], f"{held} beside {asked}")
                        compared.add((held, asked, row["admitted"]))
        self.assertEqual({admitted for _, _, admitted in compared}, {True, False})
        self.assertEqual(len(compared), len(beside) * sum(self.alone.values()))

    def test_an_error_is_the_commands_own(self):
        self.server.nbd_server()
        self.begin("stream b..none", "held")
        before = self.state()
        for command, arguments in ERRORS:
            with self.subTest(command=command, arguments=arguments):
                with self.assertRaises(QmpError) as asked:
                    self.check(command, arguments)
                if command not in ("access-check", "qmp_capabilities"):
                    with self.assertRaises(QmpError) as done:
                        self.server.qmp.execute(command, arguments)
                    self.assertEqual((asked.exception.error_class, asked.exception.desc),
                                     (done.exception.error_class, done.exception.desc))
                self.assertIsNone(asked.exception.data)
        self.assert_refused("no command", self.check, "gone", {}, error_class="CommandNotFound")
        self.assert_refused("object", self.check, "query-jobs", [])
        self.assertEqual(self.state(), before)
        self.end("stream b..none", "held")

    def test_who_waits_is_not_overtaken(self):
        """Also the one who asks sees those that wait, and no other. The options of waiting are no arguments."""
        self.server.nbd_server()
        self.begin("export-ro-sh base", "held")
        command, arguments = commit("c", "base")
        self.assertFalse(self.check(command, {**arguments, "on-conflict": "wait"})["admitted"])
        self.server.qmp.execute(command, {**arguments, "job-id": "waiter", "on-conflict": "wait"})
        before = self.state()
        for operation in ("stream b..none", "commit top>b", "export-rw-sh top"):
            with self.subTest(asked=operation):
                check = self.check(*OPERATIONS[operation])
                blocked = operation != "export-rw-sh top"
                self.assertEqual(check["admitted"], not blocked)
                self.assertEqual([conflict["holder"]["id"] for conflict in check["conflicts"][:1]], ["waiter"] * blocked)
        self.assertEqual(self.state(), before)
        self.server.qmp.execute("access-cancel", {"id": "waiter"})
        self.assertTrue(self.check(*OPERATIONS["commit top>b"])["admitted"])
        self.end("export-ro-sh base", "held")

    def test_without_a_server_there_is_no_export(self):
        self.assert_refused("not running", self.check, *OPERATIONS["export-ro-sh b"])

    def test_what_claims_nothing_is_admitted_with_the_reason(self):
        for command, arguments in (("query-jobs", {}), ("blockdev-del", {"node-name": "gone"}), ("quit", {})):
            check = self.check(command, arguments)
            self.assertTrue(check["admitted"])
            self.assertEqual((check["claims"], check["conflicts"]), ([], []))
            self.assertGreater(len(check["reason"].split()), 2)
        self.assertTrue(self.server.is_alive())

    def assert_commit_finds_it_read_only(self):
        command, arguments = commit("a", "base")
        with self.assertRaises(QmpError) as asked:
            self.check(command, arguments)
        with self.assertRaises(QmpError) as done:
            self.server.qmp.execute(command, arguments)
        self.assertEqual(asked.exception.desc, done.exception.desc)
        self.assertIn("read-only", asked.exception.desc)

    def test_an_image_that_was_opened_read_only_is_no_base(self):
        self.server.stop()
        self.daemons.remove(self.server)
        self.server = self.daemon()
        self.server.add_qcow2("base", self.path("base.qcow2"), None, **{"read-only": True})
        self.server.add_qcow2("a", self.path("a.qcow2"), "base")
        self.server.add_qcow2("top", self.path("top.qcow2"), "a")
        self.assert_commit_finds_it_read_only()

    def test_nor_can_its_overlay_be_linked_anew(self):
        self.server.stop()
        self.daemons.remove(self.server)
        self.server = self.daemon()
        self.server.add_qcow2("base", self.path("base.qcow2"), None)
        self.server.add_qcow2("a", self.path("a.qcow2"), "base")
        self.server.add_qcow2("top", self.path("top.qcow2"), "a", **{"read-only": True})
        self.assert_commit_finds_it_read_only()

    def test_a_file_name_may_hold_any_bytes(self):
        self.server.nbd_server()
        folder = os.fsencode(self.directory)
        name = b"odd\xff\xfe.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", os.fsdecode(folder + b"/" + name), str(SIZE))
        over = self.path("over.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", os.fsdecode(name), "-F", "qcow2", over)
        self.server.qmp.execute(
            "blockdev-add", {"driver": "qcow2", "node-name": "over", "file": {"driver": "file", "filename": over}})
        self.server.export("#over.backing", writable=False, name="odd")
        arguments = {"job-id": "asked", "device": "over"}
        error = self.assert_refused("odd\ufffd\ufffd.qcow2", self.server.qmp.execute, "block-commit", arguments)
        check = self.check("block-commit", arguments)
        for conflict in [*check["conflicts"], *error.data["conflicts"]]:
            self.assertIn("odd\ufffd\ufffd.qcow2", conflict["sentence"])

    def test_a_container_that_somebody_reads_is_no_base(self):
        """The file below an image: its format would have it for itself once it writes to it."""
        self.server.stop()
        self.daemons.remove(self.server)
        self.server = self.daemon()
        self.server.nbd_server()
        self.server.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "a", "file": {
            "driver": "file", "filename": self.path("a.qcow2")}})
        base = next(edge["child"] for edge in self.server.qmp.execute("query-graph")["edges"]
                    if edge["parent"] == "a" and edge["role"] == "backing")
        file = next(edge["child"] for edge in self.server.qmp.execute("query-graph")["edges"]
                    if edge["parent"] == base and edge["role"] == "file")
        self.server.export(file, writable=False, name="file")
        arguments = {"job-id": "asked", "device": "a"}
        check = self.check("block-commit", arguments)
        error = self.assert_refused("export-file", self.server.qmp.execute, "block-commit", arguments)
        self.assertFalse(check["admitted"])
        self.assertEqual(without_age(check["sentence"]), without_age(error.desc))

    def test_the_images_are_untouched(self):
        """A check and nothing else, on a daemon that is then ended: the files are what they were."""
        self.server.nbd_server()
        before = self.state()["files"]
        for operation in OPERATIONS.values():
            self.check(*operation)
        self.server.stop()
        self.daemons.remove(self.server)
        for name, digest in before.items():
            with open(self.path(f"{name}.qcow2"), "rb") as image:
                self.assertEqual(hashlib.sha256(image.read()).hexdigest(), digest)
        qemu_img("check", self.path("top.qcow2"))
