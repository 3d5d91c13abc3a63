#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""blockdev-reopen: options and children of open nodes change, all or none, under clients and beside jobs."""
import json
import threading
import time
import unittest

from harness import MIB, PEER, QmpError, TestCase, image_check, nbd_handle, qemu_io

SIZE = 8 * MIB


class Reopen(TestCase):
    def setUp(self):
        super().setUp()
        self.images = {}
        for number, (name, below) in enumerate((("base", None), ("mid", "base"), ("top", "mid"), ("other", None))):
            backing = self.path(f"{below}.qcow2") if below else None
            self.images[name] = self.create_image(f"{name}.qcow2", SIZE, backing=backing)
            qemu_io(self.images[name], f"write -q -P {number + 1} {number}M 2M")
        self.start(None)

    def start(self, program):
        self.server = self.daemon(command=program)
        self.qmp = self.server.qmp
        self.server.add_chain([(name, self.images[name]) for name in ("base", "mid", "top")])
        self.server.add_qcow2("other", self.images["other"])

    def options(self, name, **more):
        backing = {"top": "mid", "mid": "base", "base": None, "other": None}[name]
        options = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": backing}
        return {**options, **{key.replace("_", "-"): value for key, value in more.items()}}

    def reopen(self, *entries, **more):
        self.qmp.execute("blockdev-reopen", {"options": list(entries), **more})

    def state(self):
        """What clients can see of all nodes, and how they lean on each other."""
        graph = self.qmp.execute("query-graph")
        nodes = self.qmp.execute("query-named-block-nodes", {"flat": True})
        for node in nodes:
            node["image"].pop("actual-size", None)
        holders = self.qmp.execute("query-access")["holders"]
        for holder in holders:
            holder.pop("since")
        return json.dumps([graph, nodes, sorted(holders, key=json.dumps)], sort_keys=True)

    def refused(self, pattern, *entries):
        """Refused, by a dry run too, and nothing has changed."""
        before = self.state()
        answer = None
        try:
            answer = self.qmp.execute("access-check", {"command": "blockdev-reopen", "arguments": {"options": list(entries)}})
        except QmpError as error:
            self.assertRegex(error.desc, pattern)
        if answer is not None:
            self.assertRegex(json.dumps(answer), pattern)
        self.assert_refused(pattern, self.qmp.execute, "blockdev-reopen", {"options": list(entries)})
        self.assertEqual(self.state(), before)

    def export(self, node, writable=True):
        if not getattr(self, "serving", False):
            self.server.nbd_server()
            self.serving = True
        self.server.export(node, writable=writable)

    def end_export(self, node):
        self.qmp.execute("block-export-del", {"id": f"export-{node}"})
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", id=f"export-{node}")

    # --- what the peer does too ---

    def script(self):
        """Each entry: does it work?"""
        top = self.options("top")
        file = {"driver": "file", "node-name": "top-file", "filename": self.images["top"]}
        self.qmp.execute("blockdev-add", {"driver": "copy-on-read", "node-name": "cor", "file": "mid"})
        results = []
        for entries in (
            [top], [{**top, "node-name": "nobody"}], [{k: v for k, v in top.items() if k != "node-name"}],
            [{"driver": "raw", "node-name": "top", "file": "top-file"}], [{k: v for k, v in top.items() if k != "backing"}],
            [{**top, "backing": "base"}], [{**top, "backing": None}], [{**top, "backing": "top"}],
            [{**top, "backing": "nobody"}], [{**top, "backing": "cor"}], [top],
            [{**top, "backing": {"driver": "qcow2", "file": "mid-file"}}], [{**top, "file": "other-file"}],
            [{**top, "read-only": True}], [top], [{**top, "force-share": True}],
            [{**top, "discard": "unmap", "detect-zeroes": "unmap"}], [{**top, "detect-zeroes": "on"}], [top],
            [{**top, "overlap-check": "all", "pass-discard-request": True}], [{**top, "lazy-refcounts": True}], [top],
            [{**top, "backing": "base"}, {**self.options("mid"), "backing": "nobody"}],
            [{**top, "backing": "base"}, {**self.options("mid"), "backing": None}],
            [self.options("mid"), top], [top, top],
            [file], [{**file, "filename": self.images["other"]}], [{**file, "read-only": True}],
            [{**file, "cache": {"no-flush": True}}], [file],
        ):
            try:
                self.reopen(*entries)
                results.append((entries, "done"))
            except QmpError as error:
                results.append((entries, error.error_class))
        graph = self.qmp.execute("query-named-block-nodes")
        top = next(node["image"] for node in graph if node["node-name"] == "top")
        results.append([top["filename"], top["backing-image"]["filename"]])
        return results

    def test_as_the_peer_does(self):
        ours = self.script()
        self.server.stop()
        self.start([PEER])
        for one, another in zip(ours, self.script()):
            self.assertEqual(one, another)

    # --- under clients and jobs ---

    def test_filters_come_and_go_under_a_writing_client(self):
        self.qmp.execute("blockdev-add", {"driver": "copy-on-read", "node-name": "cor", "file": "mid"})
        self.qmp.execute("blockdev-add", {"driver": "blkdebug", "node-name": "debug", "image": "top-file"})
        self.export("top")
        stop = threading.Event()
        written = {}
        problems = []

        def write():
            number = 0
            try:
                with nbd_handle(self.server.uri("top")) as client:
                    while not stop.is_set():
                        number += 1
                        block = self.random.randrange(SIZE // 65536)
                        data = bytes([number % 251 + 1]) * 65536
                        client.pwrite(data, block * 65536)
                        written[block] = data
                        if client.pread(65536, block * 65536) != data:
                            problems.append(f"block {block}")
            except Exception as problem:  # pylint: disable=broad-except
                problems.append(str(problem))

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(15):
                self.reopen(self.options("top", backing="cor"))
                self.reopen(self.options("top", backing="cor", file="debug"))
                self.reopen(self.options("top", file="debug"))
                self.reopen(self.options("top", discard="unmap"))
                self.reopen(self.options("top"))
        finally:
            stop.set()
            writer.join()
        self.assertEqual(problems, [])
        self.assertGreater(len(written), 5)
        with nbd_handle(self.server.uri("top")) as client:
            for block, data in written.items():
                self.assertEqual(client.pread(65536, block * 65536), data)
        self.server.stop()
        image_check(self.images["top"])

    def test_other_data_under_users_is_refused(self):
        self.export("top")
        self.refused("export-top", self.options("top", backing="base"))
        self.refused("export-top", self.options("top", backing=None))
        self.refused("export-top", self.options("top", read_only=True))
        self.refused("top -> mid", self.options("mid", backing="other"))
        self.refused("top -> mid", self.options("mid", backing=None))
        self.refused("top -> top-file", {"driver": "file", "node-name": "top-file", "filename": self.images["top"], "read-only": True})
        self.reopen(self.options("mid", read_only=True))
        self.end_export("top")
        self.reopen(self.options("top", backing="base"))
        self.reopen(self.options("mid", backing="other"))
        self.reopen(self.options("mid"), self.options("top"))

    def test_beside_a_commit(self):
        self.qmp.execute("blockdev-add", {"driver": "copy-on-read", "node-name": "cor", "file": "mid"})
        self.export("top")
        self.qmp.execute("block-commit", {"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base", "speed": 1})
        self.refused("block-commit j", self.options("mid", backing=None))
        self.refused("block-commit j", self.options("base", backing="other"))
        self.refused("top", self.options("top", backing="base"))
        self.reopen(self.options("top", backing="cor"))  # shows the same: harmless
        self.reopen(self.options("top"))
        self.qmp.execute("block-job-set-speed", device="j", speed=0)
        self.assertIsNone(self.qmp.wait_job("j"))
        self.refused("stale", self.options("top", backing="mid"))
        with nbd_handle(self.server.uri("top")) as client:
            self.assertEqual(client.pread(MIB, 2 * MIB), b"\3" * MIB)
            self.assertEqual(client.pread(MIB, 1 * MIB), b"\2" * MIB)
            self.assertEqual(client.pread(MIB, 0), b"\1" * MIB)

    def test_all_or_none(self):
        self.qmp.execute("blockdev-add", {"driver": "copy-on-read", "node-name": "cor", "file": "mid"})
        first = self.options("top", backing="cor", discard="unmap", detect_zeroes="unmap", overlap_check="all")
        second = self.options("other", read_only=True, backing="base")
        for last, pattern in (
            (self.options("mid", backing="nobody"), "nobody"),
            (self.options("mid", l2_cache_size=MIB), "l2-cache-size"),
            (self.options("base", backing="top"), "cycle"),
            ({"driver": "file", "node-name": "mid-file", "filename": self.images["mid"], "read-only": True}, "mid -> mid-file"),
        ):
            self.refused(pattern, first, second, last)
        self.reopen(first, second)
        nodes = {node["node-name"]: node for node in self.qmp.execute("query-named-block-nodes", {"flat": True})}
        self.assertEqual(nodes["top"]["detect_zeroes"], "unmap")
        self.assertTrue(nodes["other"]["ro"])
        self.reopen(self.options("other"), self.options("top"))
        self.export("other")

    def test_what_cannot_change_says_so(self):
        mid = self.options("mid")
        self.refused("'driver' of node 'mid'", {"driver": "raw", "node-name": "mid", "file": "mid-file"})
        self.refused("'l2-cache-size' of node 'mid'", {**mid, "l2-cache-size": MIB})
        self.refused("cannot have 'other-file' in place of 'mid-file'", {**mid, "file": "other-file"})
        self.refused("discard=unmap", {**mid, "detect-zeroes": "unmap"})
        self.refused("at once|there first|node-name", {**mid, "backing": {"driver": "null-co"}})
        self.refused("cycle", {**mid, "backing": "top"})
        self.reopen()  # nothing

    def test_direct_or_not(self):
        """Where the file system has no direct I/O it fails, and the node goes on as it was."""
        file = {"driver": "file", "node-name": "top-file", "filename": self.images["top"]}
        self.export("top")
        with nbd_handle(self.server.uri("top")) as client:
            for round_ in range(4):
                try:
                    self.reopen({**file, "cache": {"direct": round_ % 2 == 0}})
                except QmpError as error:
                    self.assertRegex(error.desc, "irect|top.qcow2")
                client.pwrite(bytes([65 + round_]) * 1000, 4096 * round_ + 77)
                client.flush()
                self.assertEqual(client.pread(1000, 4096 * round_ + 77), bytes([65 + round_]) * 1000)
        self.server.stop()
        image_check(self.images["top"])

    def test_one_waits_for_the_export(self):
        self.export("top")
        self.reopen(self.options("top", backing="base"), **{"on-conflict": "wait"})
        time.sleep(0.05)
        self.assertEqual(self.server.chain_of("top"), ["top", "mid", "base"])
        self.end_export("top")
        self.qmp.wait_event("ACCESS_GRANTED")
        self.assertEqual(self.server.chain_of("top"), ["top", "base"])


if __name__ == "__main__":
    unittest.main()
