# SPDX-License-Identifier: LGPL-2.1-or-later
"""Dirty bitmaps as users meet them: the commands and NBD contexts beside the peer's, what is kept through restarts, and
chains of increments that restore exactly, with the daemon killed between them.

A bitmap may be lost by a kill: then it is missing or inconsistent, and a full copy takes the increment's place. One that
is there and is wrong is the failure that these tests look for.
"""
import contextlib
import json
import os
import signal
import socket
import struct
import time
import unittest

import harness
from harness import KIB, MIB, PEER, QmpError, TestCase, image_check, nbd_handle, qemu_img, qemu_io, scale

try:
    import nbd
except ImportError:
    nbd = None

BOTH = (None, [PEER])  # ours and the peer's, as TestCase.daemon(command=…)
ADD, REMOVE, CLEAR = (f"block-dirty-bitmap-{verb}" for verb in ("add", "remove", "clear"))
ENABLE, DISABLE, MERGE = (f"block-dirty-bitmap-{verb}" for verb in ("enable", "disable", "merge"))
SHA = "x-debug-block-dirty-bitmap-sha256"
BITMAP = "qemu:dirty-bitmap:"


def bitmaps_of(daemon, node):
    """What query-named-block-nodes shows of a node's bitmaps, by name."""
    for info in daemon.qmp.execute("query-named-block-nodes", {"flat": True}):
        if info["node-name"] == node:
            return {bitmap["name"]: bitmap for bitmap in info.get("dirty-bitmaps", [])}
    raise AssertionError(f"no node {node}")


def without_hint(error):
    """An error's class and sentence. A hint, which ours has behind it, the peer keeps to itself."""
    return f"{error.error_class}: {error.desc.split('; ')[0]}"


def extents(daemon, export, context, size):
    """Block status of a whole export in one context: [(offset, length, flags)], whatever pieces it comes in."""
    result = []
    with nbd_handle(daemon.uri(export), add_meta_context=context) as handle:
        at = 0
        while at < size:
            entries = []
            handle.block_status(size - at, at, lambda name, offset, found, error: entries.extend(found))
            for length, flags in zip(entries[::2], entries[1::2]):
                length = min(length, size - at)
                if result and result[-1][2] == flags:
                    result[-1] = (result[-1][0], result[-1][1] + length, flags)
                else:
                    result.append((at, length, flags))
                at += length
    return result


def contexts(path, export, option, queries):
    """What the server answers to NBD_OPT_LIST_META_CONTEXT (9) or SET (10): names, and the last reply's number."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        stream = connection.makefile("rwb")

        def send(number, data):
            stream.write(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
            stream.flush()

        def receive():
            _, _, kind, length = struct.unpack(">QIII", stream.read(20))
            return kind, stream.read(length)

        stream.read(18)
        stream.write(struct.pack(">I", 3))
        send(8, b"")
        receive()
        words = [word.encode() for word in (export, *queries)]
        data = [struct.pack(">I", len(word)) + word for word in words]
        send(option, data[0] + struct.pack(">I", len(queries)) + b"".join(data[1:]))
        names = []
        while True:
            kind, data = receive()
            if kind != 4:
                return names, kind
            names.append(data[4:].decode())


class Commands(TestCase):
    """The commands, with the peer beside."""

    def answer(self, daemon, command, arguments):
        try:
            return daemon.qmp.execute(command, arguments)
        except QmpError as error:
            return without_hint(error)

    def shown(self, daemon, nodes):
        return {node: bitmaps_of(daemon, node) for node in nodes}

    def run_both(self, script, nodes, prepare):
        """Gives all commands to ours and to the peer's daemon, on images of their own; everything said is the same."""
        said = []
        for command in BOTH:
            daemon = self.daemon(command=command)
            prepare(daemon, f"{'peer' if command else 'ours'}-")
            answers = [(line, self.answer(daemon, *line), self.shown(daemon, nodes)) for line in script]
            daemon.stop()
            said.append(answers)
        for ours, theirs in zip(*said):
            self.assertEqual(ours, theirs)

    def prepare(self, daemon, prefix):
        image = self.create_image(f"{prefix}a.qcow2", 64 * MIB)
        old = self.create_image(f"{prefix}old.qcow2", 64 * MIB, "compat=0.10")
        small = self.create_image(f"{prefix}small.qcow2", 32 * MIB)
        closed = self.create_image(f"{prefix}closed.qcow2", 64 * MIB)
        lost = self.create_image(f"{prefix}lost.qcow2", 64 * MIB)
        qemu_img("bitmap", "-f", "qcow2", "--add", closed, "kept")
        qemu_img("bitmap", "-f", "qcow2", "--add", lost, "lost")
        with open(lost, "r+b") as file:
            self.mark_in_use(file)
        for name, path in (("a", image), ("old", old), ("small", small), ("lost", lost)):
            daemon.add_qcow2(name, path)
        daemon.add_qcow2("closed", closed, **{"read-only": True})

    @staticmethod
    def mark_in_use(file):
        """Sets the flag of the first entry in the directory of bitmaps."""
        header = file.read(4096)
        at = struct.unpack_from(">I", header, 100)[0]
        while True:
            kind, length = struct.unpack_from(">II", header, at)
            if kind == 0x23852875:
                break
            assert kind, "the image has no bitmaps"
            at += 8 + (length + 7) // 8 * 8
        directory = struct.unpack_from(">Q", header, at + 8 + 16)[0]
        file.seek(directory + 12)
        flags = struct.unpack(">I", file.read(4))[0]
        file.seek(directory + 12)
        file.write(struct.pack(">I", flags | 1))

    def test_the_commands_answer_like_the_peers(self):
        script = [
            (ADD, {"node": "none", "name": "x"}),
            (ADD, {"node": "a", "name": ""}),
            (ADD, {"node": "a", "name": "x" * 1023}),
            (REMOVE, {"node": "a", "name": "x" * 1023}),
            (ADD, {"node": "a", "name": "x", "granularity": 0}),
            (ADD, {"node": "a", "name": "x", "granularity": 256}),
            (ADD, {"node": "a", "name": "x", "granularity": 3000}),
            (ADD, {"node": "a", "name": "x", "granularity": 1 << 31}),
            (ADD, {"node": "a", "name": "x"}),
            (ADD, {"node": "a", "name": "p", "persistent": True}),
            (ADD, {"node": "a", "name": "p", "persistent": True}),
            (ADD, {"node": "a", "name": "d", "disabled": True, "granularity": 512}),
            (ADD, {"node": "old", "name": "p", "persistent": True}),
            (ADD, {"node": "old", "name": "t"}),
            (ADD, {"node": "a-file", "name": "f"}),
            (ADD, {"node": "closed", "name": "t"}),
            *((verb, {"node": "closed", "name": "kept"}) for verb in (CLEAR, DISABLE, ENABLE, REMOVE)),
            *((verb, {"node": "a", "name": "none"}) for verb in (CLEAR, DISABLE, ENABLE, REMOVE, SHA)),
            *((verb, {"node": "none", "name": "none"}) for verb in (CLEAR, DISABLE, ENABLE, REMOVE, SHA)),
            *((verb, {"node": "a", "name": "x"}) for verb in (ENABLE, DISABLE, DISABLE, CLEAR, SHA)),
            (MERGE, {"node": "a", "target": "x", "bitmaps": ["p", "d", "x"]}),
            (MERGE, {"node": "a", "target": "x", "bitmaps": ["none"]}),
            (MERGE, {"node": "a", "target": "none", "bitmaps": ["x"]}),
            (MERGE, {"node": "none", "target": "none", "bitmaps": ["x"]}),
            (MERGE, {"node": "a", "target": "x", "bitmaps": ["p", {"node": "closed", "name": "kept"}]}),
            (MERGE, {"node": "a", "target": "x", "bitmaps": [{"node": "closed", "name": "none"}]}),
            (MERGE, {"node": "a", "target": "x", "bitmaps": [{"node": "none", "name": "kept"}]}),
            (MERGE, {"node": "closed", "target": "kept", "bitmaps": ["t"]}),
            (MERGE, {"node": "closed", "target": "t", "bitmaps": ["kept"]}),
            (ADD, {"node": "small", "name": "s"}),
            (MERGE, {"node": "a", "target": "x", "bitmaps": [{"node": "small", "name": "s"}]}),
            (REMOVE, {"node": "a", "name": "p"}),
            (SHA, {"node": "small", "name": "s"}),
        ]
        self.run_both(script, ["a", "a-file", "old", "small", "closed"], self.prepare)

    def test_an_inconsistent_one_is_shown_and_removed_like_the_peers(self):
        lost = {"node": "lost", "name": "lost"}
        merges = [{"node": "lost", "target": "lost", "bitmaps": ["t"]}, {"node": "lost", "target": "t", "bitmaps": ["lost"]}]
        script = [(CLEAR, lost), (ENABLE, lost), (DISABLE, lost), (ADD, {**lost, "persistent": True}),
                  (ADD, {"node": "lost", "name": "t"}), *((MERGE, merge) for merge in merges), (REMOVE, lost),
                  (ADD, {**lost, "persistent": True})]
        self.run_both(script, ["lost"], self.prepare)

    def test_random_commands_and_writes_leave_the_peers_bits(self):
        """The same writes, commands and transactions (half of which fail at their end) on ours and the peer's, then the same
        digests; mixed granularities."""
        steps = scale(120, 1500)
        size = 4 * MIB + 5 * 512
        random = self.random
        script = []
        names = {}
        for _ in range(steps):
            verb = random.randrange(12)
            if verb >= 10 and len(names) > 3:
                script.append(self.draw_transaction(names))
            elif verb < 5 or not names:
                length = random.choice([1, 512, 4096, 70000, 300000])
                script.append(("write", random.randrange(size - length), length))
            elif verb == 5:
                script.append((random.choice([ENABLE, DISABLE, CLEAR]), random.choice(list(names))))
            elif verb == 6 and len(names) > 2:
                name = random.choice(list(names))
                script.append((REMOVE, name))
                del names[name]
            else:
                sources = random.sample(list(names), min(len(names), random.randrange(1, 4)))
                script.append((MERGE, random.choice(list(names)), sources))
            if len(names) < 5:
                name = f"bitmap{len(script)}"
                names[name] = {"granularity": 512 << random.randrange(9), "persistent": random.random() < 0.5,
                               "disabled": random.random() < 0.3}
                script.append((ADD, name, names[name]))
        digests = [self.play(script, size, command) for command in BOTH]
        self.assertEqual(*digests)

    def draw_transaction(self, names):
        """No bitmap is in it twice: what one action of a transaction shows to the next differs."""
        random = self.random
        first, second, third, fourth = random.sample(list(names), 4)
        actions = [(random.choice([ENABLE, DISABLE]), first), (CLEAR, second), (MERGE, third, [fourth])]
        if random.random() < 0.5:
            actions.append((REMOVE, random.choice([name for name in names if name not in (first, second, third, fourth)] or
                                                  [None])))
        actions = [action for action in actions if action[1]]
        random.shuffle(actions)
        works = random.random() < 0.5
        if works:
            for action in actions:
                if action[0] == REMOVE:
                    del names[action[1]]
        return ("transaction", works, actions)

    @staticmethod
    def arguments(place, verb, first, rest):
        """What a command takes; `place` says which node a bitmap belongs to."""
        if verb == MERGE:
            sources = [{"node": place[source], "name": source} for source in rest[0]]
            return {"node": place[first], "target": first, "bitmaps": sources}
        return {"node": place[first], "name": first, **(rest[0] if rest else {})}

    def transact(self, daemon, place, works, actions):
        sent = [{"type": verb, "data": self.arguments(place, verb, first, rest)} for verb, first, *rest in actions]
        if works:
            daemon.qmp.execute("transaction", {"actions": sent})
            for verb, first, *_ in actions:
                if verb == REMOVE:
                    del place[first]
        else:
            self.assert_refused("abort", daemon.qmp.execute, "transaction", {"actions": [*sent, {"type": "abort", "data": {}}]})

    def play(self, script, size, command):
        prefix = "peer" if command else "ours"
        paths = {node: self.create_image(f"{prefix}-{node}.qcow2", size) for node in ("one", "two")}
        daemon = self.daemon(command=command)
        for node, path in paths.items():
            daemon.add_qcow2(node, path)
        daemon.nbd_server()
        daemon.export("one")
        place = {}  # each bitmap belongs to one of two nodes; only "one" is written
        digests = []
        with nbd_handle(daemon.uri("one")) as handle:
            for number, (verb, first, *rest) in enumerate(script):
                if verb == "write":
                    handle.pwrite(bytes([number % 256]) * rest[0], first)
                    continue
                if verb == "transaction":
                    self.transact(daemon, place, first, *rest)
                else:
                    if verb == ADD:
                        place[first] = "two" if number % 4 == 0 else "one"
                    daemon.qmp.execute(verb, self.arguments(place, verb, first, rest))
                    if verb == REMOVE:
                        del place[first]
                digests.append({node: bitmaps_of(daemon, node) for node in paths})
                for name, node in place.items():
                    digests.append((name, daemon.qmp.execute(SHA, {"node": node, "name": name})["sha256"]))
        daemon.stop()
        for path in paths.values():
            image_check(path)
        return digests


@unittest.skipUnless(nbd, "python3-libnbd is not installed")
class Contexts(TestCase):
    """What NBD clients see of bitmaps and of the backing chain, with the peer beside."""

    SIZE = 64 * MIB

    def serve(self, command, templates):
        """Ours and the peer's serve copies of the same images."""
        daemon = self.daemon(command=command)
        paths = []
        for template in templates:
            path = self.path(f"{'peer' if command else 'ours'}-{os.path.basename(template)}")
            with open(template, "rb") as source, open(path, "wb") as copy:
                copy.write(source.read())
            paths.append(path)
        daemon.add_qcow2("base", paths[0])
        daemon.add_qcow2("top", paths[1], "base")
        for name, more in (("w", {}), ("w:x", {}), ("fine", {"granularity": 512}), ("off", {"disabled": True})):
            daemon.qmp.execute(ADD, {"node": "top", "name": name, **more})
        daemon.nbd_server()
        bitmaps = ["w", "w:x", "fine", {"node": "base", "name": "kept"}]
        daemon.qmp.execute("block-export-add", {"type": "nbd", "id": "n", "name": "n", "node-name": "top", "writable": True,
                                                "bitmaps": bitmaps, "allocation-depth": True})
        daemon.export("top", name="plain")
        return daemon

    def templates(self):
        """A short base under a longer top, with data, zeroes, and places that were discarded."""
        base = self.create_image("base.qcow2", self.SIZE // 4)
        qemu_img("bitmap", "-f", "qcow2", "--add", base, "kept")
        qemu_io(base, "write -q 0 1M", "write -q 10M 64k", "write -q -z 4M 1M")
        top = self.create_image("top.qcow2", self.SIZE, backing=base)
        qemu_io(top, "write -q 512k 1M", "write -q 20M 64k", "discard -q 600k 64k", "write -q -z 6M 1M")
        return base, top

    def test_contexts_are_named_like_the_peers(self):
        queries = [[], ["base:"], ["base:allocation"], ["base:allo"], ["qemu:"], [BITMAP], [BITMAP[:-1]], [f"{BITMAP}w"],
                   [f"{BITMAP}none"], ["qemu:allocation-depth"], ["qemu:allocation-depth:"], ["qemu"], [":"], [""], ["x:y"],
                   [f"{BITMAP}w:x", "base:allocation", "qemu:allocation-depth", f"{BITMAP}w"], [f"{BITMAP}w"] * 3,
                   [f"{BITMAP}w", "qemu:"], ["base:" + "q" * 300]]
        said = []
        templates = self.templates()
        for command in BOTH:
            daemon = self.serve(command, templates)
            said.append([
                (export, option, query, contexts(daemon.nbd_path, export, option, query))
                for export in ("n", "plain") for option in (9, 10) for query in queries
            ])
            daemon.stop()
        for ours, theirs in zip(*said):
            self.assertEqual(ours, theirs)

    def test_extents_are_the_peers(self):
        said = []
        templates = self.templates()
        writes = [(self.random.randrange(self.SIZE - 300000), self.random.choice([1, 512, 5000, 70000, 300000]))
                  for _ in range(scale(30, 300))]
        names = ["base:allocation", "qemu:allocation-depth", f"{BITMAP}w", f"{BITMAP}fine", f"{BITMAP}kept"]
        asked = [(0, self.SIZE), (5100, 100), (4096, 8192), (self.SIZE - 1, 1), (15 * MIB, 2 * MIB)]
        asked += [(offset, length) for offset, length in writes[:10]]
        for command in BOTH:
            daemon = self.serve(command, templates)
            answers = []
            with nbd_handle(daemon.uri("n")) as handle:
                for number, (offset, length) in enumerate(writes):
                    if number % 7 == 3:
                        # Whole clusters: of others the two make zeroes in different ways.
                        handle.zero(3 * 64 * KIB, offset // (64 * KIB) * 64 * KIB)
                    else:
                        handle.pwrite(b"x" * length, offset)
            handle = nbd.NBD()
            for name in names:
                handle.add_meta_context(name)
            handle.connect_uri(daemon.uri("n"))
            for offset, length in asked:
                for flags in (0, nbd.CMD_FLAG_REQ_ONE):
                    found = {}
                    handle.block_status(
                        length, offset, lambda name, at, entries, error: found.update({name: (at, entries)}) and 0, flags
                    )
                    answers.append((offset, length, flags, found))
            handle.shutdown()
            server = f"driver=nbd,server.type=unix,server.path={daemon.nbd_path},export=n"
            for name in names[1:]:
                answers.append(json.loads(qemu_img("map", "--output=json", "--image-opts", f"{server},x-dirty-bitmap={name}")))
                answers.append(harness.run("nbdinfo", f"--map={name}", daemon.uri("n")).stdout)
            daemon.stop()
            said.append(answers)
        for ours, theirs in zip(*said):
            self.assertEqual(ours, theirs)

    def test_an_exported_bitmap_is_busy_like_the_peers(self):
        said = []
        templates = self.templates()
        for command in BOTH:
            daemon = self.serve(command, templates)
            answers = [bitmaps_of(daemon, "top"), bitmaps_of(daemon, "base")]
            refused = [(verb, {"node": "top", "name": "w"}) for verb in (CLEAR, DISABLE, ENABLE, REMOVE)]
            refused += [(MERGE, {"node": "top", "target": "w", "bitmaps": ["off"]}),
                        (MERGE, {"node": "top", "target": "off", "bitmaps": ["w"]})]
            for number, (bitmaps, writable) in enumerate([
                (["w"], True), (["none"], True), ([{"node": "none", "name": "w"}], True),
                ([{"node": "top", "name": "none"}], True), (["off", "w"], False), (["off", "off"], False), (["off"], False),
            ]):
                refused.append(("block-export-add", {"type": "nbd", "id": f"x{number}", "name": f"x{number}",
                                                     "node-name": "top", "writable": writable, "bitmaps": bitmaps}))
            for verb, arguments in refused:
                try:
                    answers.append(daemon.qmp.execute(verb, arguments))
                except QmpError as error:
                    answers.append(without_hint(error))
            daemon.qmp.execute("block-export-del", {"id": "n", "mode": "hard"})
            daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="n")
            answers += [daemon.qmp.execute(verb, {"node": "top", "name": "w"}) for verb in (CLEAR, DISABLE, ENABLE, REMOVE)]
            answers.append(bitmaps_of(daemon, "top"))
            daemon.stop()
            said.append(answers)
        for ours, theirs in zip(*said):
            self.assertEqual(ours, theirs)

    def test_what_the_peer_does_not_refuse(self):
        daemon = self.serve(None, self.templates())
        export = {"type": "nbd", "id": "x", "name": "x", "node-name": "top"}
        daemon.qmp.execute(ADD, {"node": "base", "name": "off"})
        twins = ["off", {"node": "base", "name": "off"}]
        self.assert_refused("two bitmaps named 'off'", daemon.qmp.execute, "block-export-add", {**export, "bitmaps": twins})
        self.assert_refused("Enabled bitmap 'kept2' incompatible", self.export_enabled, daemon, export)
        many = [{"node": "top", "name": f"many{number}"} for number in range(127)]
        for bitmap in many:
            daemon.qmp.execute(ADD, {**bitmap, "disabled": True})
        self.assert_refused("more than 126", daemon.qmp.execute, "block-export-add", {**export, "bitmaps": many})
        check = daemon.qmp.execute("access-check", {"command": "block-export-add",
                                                    "arguments": {**export, "bitmaps": many[:126]}})
        self.assertTrue(check["admitted"])
        self.assertFalse(any(bitmap["busy"] for name, bitmap in bitmaps_of(daemon, "top").items() if "many" in name))
        daemon.qmp.execute("block-export-add", {**export, "bitmaps": many[:126], "allocation-depth": True})
        with nbd_handle(daemon.uri("n")) as writer:
            writer.pwrite(b"x" * MIB, 3 * MIB)
        handle = nbd.NBD()
        for name in ["base:allocation", *(f"{BITMAP}many{number}" for number in range(126))]:
            handle.add_meta_context(name)
        handle.connect_uri(daemon.uri("x"))
        found = {}
        handle.block_status(self.SIZE, 0, lambda name, at, entries, error: found.update({name: entries}) and 0)
        self.assertEqual(len(found), 127)
        self.assertEqual(found[f"{BITMAP}many125"], [self.SIZE, 0])
        self.assertLessEqual(len(found["base:allocation"]), 2 * 16)
        handle.shutdown()
        self.assert_refused("in use", daemon.qmp.execute, "block_resize", {"node-name": "top", "size": 2 * self.SIZE})

    def export_enabled(self, daemon, export):
        daemon.qmp.execute(ADD, {"node": "top", "name": "kept2"})
        daemon.qmp.execute("block-export-add", {**export, "bitmaps": ["kept2"]})

    def test_old_clients_are_served_as_before(self):
        daemon = self.serve(None, self.templates())
        with nbd_handle(daemon.uri("n"), set_request_structured_replies=False) as handle:
            handle.pwrite(b"y" * 100000, MIB)
            self.assertEqual(handle.pread(100000, MIB), b"y" * 100000)
        self.assertEqual(extents(daemon, "n", f"{BITMAP}w", self.SIZE), [
            (0, MIB, 0), (MIB, 128 * KIB, 1), (MIB + 128 * KIB, self.SIZE - MIB - 128 * KIB, 0)])


class Persistence(TestCase):
    """What becomes of a bitmap when its node closes, or the daemon."""

    SIZE = 8 * MIB

    def setUp(self):
        super().setUp()
        self.image = self.create_image("a.qcow2", self.SIZE)

    def write(self, daemon, node, *places):
        daemon.export(node, name="w")
        with nbd_handle(daemon.uri("w")) as handle:
            for place in places:
                handle.pwrite(b"x" * 4096, place)
        daemon.qmp.execute("block-export-del", {"id": "export-w", "mode": "hard"})
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="export-w")

    def start(self, **more):
        daemon = self.daemon()
        daemon.nbd_server()
        daemon.add_qcow2("a", self.image, **more)
        return daemon

    def dirty(self, daemon, node, name):
        digest = daemon.qmp.execute(SHA, {"node": node, "name": name})["sha256"]
        return digest, bitmaps_of(daemon, node)[name]

    def test_bitmaps_stay_through_quit_and_blockdev_del(self):
        daemon = self.start()
        for name, more in (("p", {}), ("off", {"disabled": True}), ("fine", {"granularity": 512})):
            daemon.qmp.execute(ADD, {"node": "a", "name": name, "persistent": True, **more})
        daemon.qmp.execute(ADD, {"node": "a", "name": "temporary"})
        self.write(daemon, "a", 0, MIB, 5 * MIB)
        daemon.qmp.execute(MERGE, {"node": "a", "target": "off", "bitmaps": ["p"]})
        before = {name: self.dirty(daemon, "a", name) for name in ("p", "off", "fine")}
        for leave in ("blockdev-del", "quit", "read-only", "peer"):
            if leave == "blockdev-del":
                for node in ("a", "a-file"):
                    daemon.qmp.execute("blockdev-del", node_name=node)
                daemon.add_qcow2("a", self.image)
            else:
                daemon.stop()
                image_check(self.image)
                if leave == "peer":
                    daemon = self.daemon(command=[PEER])
                    daemon.add_qcow2("a", self.image)
                else:
                    daemon = self.start(**({"read-only": True} if leave == "read-only" else {}))
            self.assertEqual({name: self.dirty(daemon, "a", name) for name in bitmaps_of(daemon, "a")}, before, leave)

    def test_sigterm_stores_bitmaps_that_are_in_use(self):
        """One is exported, by the other a backup goes that is cancelled: both have everything."""
        daemon = self.start()
        daemon.add_qcow2("target", self.create_image("target.qcow2", self.SIZE))
        for name in ("exported", "copied"):
            daemon.qmp.execute(ADD, {"node": "a", "name": name, "persistent": True})
        daemon.export("a", name="w", bitmaps=["exported"])
        with nbd_handle(daemon.uri("w")) as handle:
            handle.pwrite(b"x" * MIB, 0)
            daemon.qmp.execute("blockdev-backup", {"job-id": "j", "device": "a", "target": "target", "speed": 1,
                                                   "sync": "incremental", "bitmap": "copied"})
            handle.pwrite(b"y" * MIB, 2 * MIB)
        self.assertTrue(all(bitmap["busy"] for bitmap in bitmaps_of(daemon, "a").values()))
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait()
        image_check(self.image)
        daemon = self.start()
        kept = {name: (bitmap["count"], bitmap["busy"]) for name, bitmap in bitmaps_of(daemon, "a").items()}
        self.assertEqual(kept, {"exported": (2 * MIB, False), "copied": (2 * MIB, False)})

    def test_a_read_only_image_keeps_its_bitmaps(self):
        daemon = self.start()
        daemon.qmp.execute(ADD, {"node": "a", "name": "p", "persistent": True})
        self.write(daemon, "a", 0)
        daemon.stop()
        with open(self.image, "rb") as file:
            before = file.read()
        daemon = self.start(**{"read-only": True})
        self.assert_refused("node 'a' is read-only", daemon.qmp.execute, ADD, {"node": "a", "name": "q", "persistent": True})
        daemon.qmp.execute(DISABLE, {"node": "a", "name": "p"})
        self.assertFalse(bitmaps_of(daemon, "a")["p"]["recording"])
        daemon.stop()
        with open(self.image, "rb") as file:
            self.assertEqual(file.read(), before)

    def test_a_snapshot_leaves_bitmaps_with_their_node(self):
        """The image keeps what it has recorded; what is written to the overlay is not written to it. As at the peer."""
        shown = []
        for command in BOTH:
            prefix = "peer" if command else "ours"
            image = self.create_image(f"{prefix}.qcow2", self.SIZE)
            overlay = self.create_image(f"{prefix}-overlay.qcow2", self.SIZE)
            daemon = self.daemon(command=command)
            daemon.nbd_server()
            daemon.add_qcow2("a", image)
            daemon.add_qcow2("overlay", overlay)
            daemon.qmp.execute(ADD, {"node": "a", "name": "p", "persistent": True})
            daemon.qmp.execute(ADD, {"node": "a", "name": "t"})
            daemon.export("a", name="guest")
            with nbd_handle(daemon.uri("guest")) as handle:
                handle.pwrite(b"x" * 4096, MIB)
                daemon.qmp.execute("blockdev-snapshot", {"node": "a", "overlay": "overlay"})
                handle.pwrite(b"y" * 4096, 3 * MIB)
            shown.append({node: bitmaps_of(daemon, node) for node in ("a", "overlay")})
            daemon.stop()
            daemon = self.daemon()
            daemon.add_qcow2("a", image)
            shown[-1]["again"] = bitmaps_of(daemon, "a")
        self.assertEqual(*shown)
        self.assertEqual({name: bitmap["count"] for name, bitmap in shown[0]["a"].items()}, {"p": 64 * KIB, "t": 64 * KIB})
        self.assertEqual(list(shown[0]["again"]), ["p"])

    def start_over_read_only_base(self):
        """The base is read-only until a commit needs it. Its bitmap "p" records, and "q" since it was told to."""
        top = self.create_image("top.qcow2", self.SIZE, backing=self.image)
        qemu_img("bitmap", "-f", "qcow2", "--add", self.image, "p")
        qemu_img("bitmap", "-f", "qcow2", "--add", "--disable", self.image, "q")
        qemu_img("bitmap", "-f", "qcow2", "--add", self.image, "r")
        qemu_io(top, "write -q 1M 64k", "write -q 6M 64k")
        daemon = self.daemon()
        daemon.qmp.execute("blockdev-add", {
            "driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": top},
            "backing": {"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": self.image}}})
        daemon.qmp.execute(ENABLE, {"node": "base", "name": "q"})
        daemon.qmp.execute(DISABLE, {"node": "base", "name": "r"})
        return daemon

    def test_a_job_that_writes_to_the_image_below_is_recorded_there(self):
        daemon = self.start_over_read_only_base()
        daemon.qmp.execute("block-commit", job_id="j", device="top", top_node="top", base_node="base")
        daemon.qmp.wait_event("BLOCK_JOB_READY", device="j")
        daemon.qmp.execute("job-complete", id="j")
        self.assertIsNone(daemon.qmp.wait_job("j"))
        counts = {name: bitmap["count"] for name, bitmap in bitmaps_of(daemon, "base").items()}
        self.assertEqual(counts, {"p": 128 * KIB, "q": 128 * KIB, "r": 0})
        daemon.stop()
        image_check(self.image)
        daemon = self.start()
        kept = {name: (bitmap["count"], bitmap["recording"]) for name, bitmap in bitmaps_of(daemon, "a").items()}
        self.assertEqual(kept, {"p": (128 * KIB, True), "q": (128 * KIB, True), "r": (0, False)})

    def test_a_kill_while_a_job_writes_to_the_image_below(self):
        daemon = self.start_over_read_only_base()
        daemon.qmp.execute("block-commit", job_id="j", device="top", top_node="top", base_node="base", speed=1)
        while not daemon.qmp.jobs()["j"]["current-progress"]:
            time.sleep(0.01)
        daemon.kill()
        daemon = self.start()
        shown = {name: bitmap.get("inconsistent", False) for name, bitmap in bitmaps_of(daemon, "a").items()}
        # The image says of "r" still that it records.
        self.assertEqual(shown, {"p": True, "q": True, "r": True})

    def test_a_killed_daemon_leaves_no_bitmap_that_looks_right(self):
        daemon = self.start()
        for name in ("p", "cleared", "off"):
            daemon.qmp.execute(ADD, {"node": "a", "name": name, "persistent": True, "disabled": name != "p"})
        self.write(daemon, "a", 0)
        daemon.qmp.execute(MERGE, {"node": "a", "target": "off", "bitmaps": ["p"]})
        daemon.qmp.execute(MERGE, {"node": "a", "target": "cleared", "bitmaps": ["p"]})
        daemon.stop()
        daemon = self.start()
        self.write(daemon, "a", MIB)
        daemon.qmp.execute(CLEAR, {"node": "a", "name": "cleared"})
        daemon.qmp.execute(ADD, {"node": "a", "name": "new", "persistent": True})
        daemon.kill()
        daemon = self.start()
        shown = bitmaps_of(daemon, "a")
        # "off" does not record and was not touched: it is what it was.
        self.assertEqual({name: bitmap.get("inconsistent", False) for name, bitmap in shown.items()},
                         {"p": True, "cleared": True, "off": False})
        self.assertEqual(shown["off"]["count"], 64 * KIB)
        self.assert_refused("inconsistent", daemon.qmp.execute, ENABLE, {"node": "a", "name": "p"})
        self.write(daemon, "a", 2 * MIB)
        for name in ("p", "cleared"):
            daemon.qmp.execute(REMOVE, {"node": "a", "name": name})
        daemon.qmp.execute(ADD, {"node": "a", "name": "p", "persistent": True})
        self.write(daemon, "a", 3 * MIB)
        daemon.stop()
        image_check(self.image, leaks_allowed=True)
        daemon = self.start()
        self.assertEqual(bitmaps_of(daemon, "a")["p"]["count"], 64 * KIB)


@unittest.skipUnless(nbd, "python3-libnbd is not installed")
class Increments(TestCase):
    """A disk that is written, copied in increments, and killed."""

    time_limit = 120
    builds = ("release",)
    long_builds = ("release", "asan")
    SIZE = 3 * MIB + 4096

    def setUp(self):
        super().setUp()
        self.lives = self.kills = self.lost = self.pushes = 0

    # ---- the daemon and its disk

    def open(self):
        self.server = self.daemon()
        self.server.nbd_server()
        self.server.add_qcow2("disk", self.image, discard="unmap")

    def leave(self, kind):
        """Ends the daemon, or the node, in one of the ways in which they end; and comes back."""
        if kind == "blockdev-del":
            for node in ("disk", "disk-file"):
                self.server.qmp.execute("blockdev-del", node_name=node)
            self.server.add_qcow2("disk", self.image, discard="unmap")
            return
        if kind == "quit":
            self.server.stop()
        else:
            if kind == "kill while it ends":
                with contextlib.suppress(OSError):
                    self.server.qmp.send_raw(b'{"execute": "quit"}\n')
                time.sleep(self.random.random() * 0.01)
            self.server.kill()
            self.may_be_lost = True
        self.daemons.remove(self.server)
        self.kills += kind != "quit"
        image_check(self.image, leaks_allowed=self.kills > 0)
        self.open()
        if kind != "quit":
            self.content = bytearray(self.read_all())

    def read_all(self):
        self.server.export("disk", writable=False, name="look")
        with nbd_handle(self.server.uri("look")) as handle:
            data = handle.pread(self.SIZE, 0)
        self.unexport("look")
        return data

    def unexport(self, name):
        self.server.qmp.execute("block-export-del", {"id": f"export-{name}", "mode": "hard"})
        self.server.qmp.wait_event("BLOCK_EXPORT_DELETED", id=f"export-{name}")

    def write(self):
        """What a guest does; self.content follows."""
        self.server.export("disk", name="guest")
        with nbd_handle(self.server.uri("guest")) as handle:
            for _ in range(self.random.randrange(0, 12)):
                length = self.random.choice([1, 512, 4096, 40000, 200000])
                offset = self.random.randrange(self.SIZE - length)
                verb = self.random.randrange(8)
                if verb == 0:
                    handle.zero(length, offset)
                    self.content[offset:offset + length] = bytes(length)
                elif verb == 1:
                    handle.flush()
                elif verb == 2:
                    handle.trim(length, offset)
                    self.content[offset:offset + length] = handle.pread(length, offset)
                else:
                    data = self.random.randbytes(1) * length
                    handle.pwrite(data, offset)
                    self.content[offset:offset + length] = data
        self.unexport("guest")

    # ---- copies

    def bitmap_add(self, name, **more):
        self.server.qmp.execute(ADD, {"node": "disk", "name": name, "persistent": True,
                                      "granularity": 512 << self.random.randrange(9), **more})

    def begin_pull(self):
        """A full copy, and a bitmap from then on."""
        self.point = bytes(self.content)
        self.copy = bytearray(self.content)
        self.number = 0
        self.bitmap = "increment0"
        self.bitmap_add(self.bitmap)
        self.may_be_lost = False

    def usable(self):
        """May the next copy be an increment? A bitmap that is lost says so; and none is lost but by a kill."""
        shown = bitmaps_of(self.server, "disk")
        for name, bitmap in shown.items():
            self.assertFalse(bitmap.get("inconsistent") and not self.may_be_lost, (name, bitmap))
            if bitmap.get("inconsistent"):
                self.server.qmp.execute(REMOVE, {"node": "disk", "name": name})
        found = shown.get(self.bitmap)
        self.assertTrue(found or self.may_be_lost, "the bitmap is gone, and nobody was killed")
        return found and not found.get("inconsistent")

    def pull(self, bitmap):
        """The increment as a client pulls it: a read-only export that shows the bitmap."""
        self.server.export("disk", writable=False, name="pull", bitmaps=[bitmap])
        with nbd_handle(self.server.uri("pull")) as handle:
            for offset, length, flags in extents(self.server, "pull", BITMAP + bitmap, self.SIZE):
                if flags:
                    self.copy[offset:offset + length] = handle.pread(length, offset)
        self.unexport("pull")

    def next_bitmap(self):
        """From here on another bitmap records; the old one is disabled."""
        old = self.bitmap
        self.number += 1
        self.bitmap = f"increment{self.number}"
        new = {"node": "disk", "name": self.bitmap, "persistent": True, "granularity": 512 << self.random.randrange(9)}
        self.server.qmp.execute("transaction", {"actions": [
            {"type": ADD, "data": new}, {"type": DISABLE, "data": {"node": "disk", "name": old}}]})
        return old

    def by_turns(self):
        old = self.next_bitmap()
        self.pull(old)
        self.server.qmp.execute(REMOVE, {"node": "disk", "name": old})

    def by_merge(self):
        """One bitmap for ever: what it has goes to a temporary one, and it is cleared."""
        self.server.qmp.execute(ADD, {"node": "disk", "name": "temporary", "disabled": True,
                                      "granularity": 512 << self.random.randrange(9)})
        self.server.qmp.execute(MERGE, {"node": "disk", "target": "temporary", "bitmaps": [self.bitmap]})
        self.server.qmp.execute(CLEAR, {"node": "disk", "name": self.bitmap})
        self.pull("temporary")
        self.server.qmp.execute(REMOVE, {"node": "disk", "name": "temporary"})

    def copy_again(self):
        """An increment, or a full copy instead of one. True: it is there, and what it should be was self.point."""
        if not self.usable():
            self.lost += 1
            with contextlib.suppress(QmpError):
                self.server.qmp.execute(REMOVE, {"node": "disk", "name": self.bitmap})
            self.begin()
            return True
        self.may_be_lost = False
        self.point = bytes(self.content)
        return self.random.choice(self.styles)() is not False

    def check_copy(self):
        if self.copy != self.point:
            at = next(at for at in range(self.SIZE) if self.copy[at] != self.point[at])
            self.fail(f"seed {self.seed}: the copies do not have what was written at {at}: {bitmaps_of(self.server, 'disk')}")

    # ---- the same by jobs: images, each over the one before it

    def begin_push(self):
        """The bitmap is there before the full copy begins, and no write comes between."""
        self.number = 0
        self.bitmap = "pushed"
        self.bitmap_add(self.bitmap)
        self.may_be_lost = False
        self.point = bytes(self.content)
        self.images = []
        while not self.push_one(sync="full"):
            if not self.usable():
                with contextlib.suppress(QmpError):
                    self.server.qmp.execute(REMOVE, {"node": "disk", "name": self.bitmap})
                self.bitmap_add(self.bitmap)
                self.may_be_lost = False
            self.server.qmp.execute(CLEAR, {"node": "disk", "name": self.bitmap})
            self.point = bytes(self.content)

    def by_push(self):
        """The guest writes on while the increment is copied; that is the next one's."""
        more = self.random.choice([
            {"sync": "incremental"}, {"sync": "bitmap", "bitmap-mode": "on-success"},
            {"sync": "bitmap", "bitmap-mode": "always"}, {"sync": "bitmap", "bitmap-mode": "never"},
        ])
        return self.push_one(bitmap=self.bitmap, **more)

    def push_one(self, **more):
        self.pushes += 1
        below = self.images[-1] if self.images else None
        image = self.create_image(f"push{self.pushes}.qcow2", self.SIZE, backing=below)
        self.server.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "target",
                                                 "file": {"driver": "file", "filename": image}})
        end = self.random.choice(self.ends)
        speed = self.random.choice([0, 16 * MIB]) if end == "end" else 2 * MIB
        arguments = {"job-id": "push", "device": "disk", "target": "target", "speed": speed, **more}
        self.server.qmp.execute("blockdev-backup", arguments)
        self.write()
        if end == "kill":
            self.leave("kill")
            return False
        if end == "cancel":
            with contextlib.suppress(QmpError):  # it may have ended already
                self.server.qmp.execute("block-job-cancel", {"device": "push"})
        names = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
        while not any(event["event"] in names for event in self.server.qmp.events):
            message = self.server.qmp.receive()
            if "event" in message:
                self.server.qmp.events.append(message)
        event = next(event for event in self.server.qmp.events if event["event"] in names)
        self.assertNotIn("error", event["data"])
        done = event["event"] == names[0]
        self.server.qmp.events = []
        while self.server.qmp.jobs():
            time.sleep(0.001)
        self.server.qmp.execute("blockdev-del", node_name="target")
        if done or more.get("bitmap-mode") == "always":
            self.images.append(image)  # what a cancelled one of that mode has copied is not in the bitmap any more
        if done:
            raw = self.path("restored.raw")
            qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
            with open(raw, "rb") as file:
                self.copy = bytearray(file.read())
        return done

    # ---- chains

    def one_chain(self, increments, ways, push=False):
        self.lives += 1
        self.kills = 0
        cluster = self.random.choice([512, 4096, 65536])
        self.image = self.create_image(f"disk{self.lives}.qcow2", self.SIZE, f"cluster_size={cluster}")
        self.content = bytearray(self.SIZE)
        self.ends = ["end"] * 4 + ["cancel"] + ["kill"] * ("kill" in ways)
        self.styles = [self.by_push] if push else [self.by_turns, self.by_merge]
        self.begin = self.begin_push if push else self.begin_pull
        self.open()
        self.write()
        self.begin()
        self.check_copy()
        for _ in range(increments):
            for _ in range(self.random.randrange(1, 3)):
                self.write()
                if self.random.random() < 0.6:
                    self.leave(self.random.choice(ways))
                    if self.random.random() < 0.5:
                        self.write()
            if self.copy_again():
                self.check_copy()
        self.assertEqual(self.read_all(), self.content)
        self.server.stop()
        image_check(self.image, leaks_allowed=self.kills > 0)

    def test_ten_increments_restore_exactly(self):
        for _ in range(scale(1, 40)):
            self.one_chain(10, ["quit", "blockdev-del"])
            self.one_chain(10, ["quit", "blockdev-del"], push=True)
        self.assertEqual(self.lost, 0)

    def test_ten_increments_with_kills_restore_exactly(self):
        for _ in range(scale(2, 100)):
            self.one_chain(10, ["quit", "kill", "kill", "kill while it ends"])
            self.one_chain(10, ["quit", "kill", "kill", "kill while it ends"], push=True)
        self.assertGreater(self.lost, 0)
