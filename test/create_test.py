#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images made and amended by a running daemon: blockdev-create and x-blockdev-amend, beside the peer's."""
import json
import os
import unittest

from harness import MIB, PEER, TestCase, image_check, image_compare, nbd_handle, qemu_img, qemu_io, run

SECRETS = [word for name in ("old", "new") for word in ("--object", f"secret,id={name},data={name}-swordfish")]


class Create(TestCase):
    def setUp(self):
        super().setUp()
        self.start(None)

    def start(self, program):
        self.server = self.daemon(*SECRETS, command=program)
        self.qmp = self.server.qmp
        return self.qmp

    def end_of(self, job):
        """How a job ended that stays concluded: its statuses in order, and its error; then it is dismissed."""
        statuses = []
        while "concluded" not in statuses:
            statuses.append(self.qmp.wait_event("JOB_STATUS_CHANGE", id=job)["data"]["status"])
        info = next(info for info in self.qmp.execute("query-jobs") if info["id"] == job)
        self.assertEqual(self.qmp.execute("query-block-jobs"), [])
        self.assertEqual(info["current-progress"], info["total-progress"])
        self.qmp.execute("job-dismiss", id=job)
        self.assertEqual(self.qmp.wait_event("JOB_STATUS_CHANGE", id=job)["data"]["status"], "null")
        return statuses, info["type"], info.get("error")

    def create(self, options, job="c"):
        self.qmp.execute("blockdev-create", {"job-id": job, "options": options})
        return self.end_of(job)

    def amend(self, options, **more):
        self.qmp.execute("x-blockdev-amend", {"job-id": "a", "node-name": "disk", "options": options, **more})
        return self.end_of("a")

    WELL = ["created", "running", "waiting", "pending", "concluded"]
    BADLY = ["created", "running", "aborting", "concluded"]

    def make_file(self, name):
        path = self.path(name)
        self.assertEqual(self.create({"driver": "file", "filename": path, "size": 0}), (self.WELL, "create", None))
        return path

    def everything(self):
        """A script that both daemons run: what each step came to."""
        results = []
        file, data = self.make_file("disk.qcow2"), self.make_file("disk.data")
        self.qmp.execute("blockdev-add", {"driver": "file", "node-name": "f", "filename": file})
        self.qmp.execute("blockdev-add", {"driver": "file", "node-name": "d", "filename": data})
        plain = {"driver": "qcow2", "file": "f", "size": 8 * MIB}
        for options in (
            plain,
            {**plain, "version": "v2", "cluster-size": 4096},
            {**plain, "extended-l2": True, "compression-type": "zstd", "preallocation": "metadata"},
            {**plain, "data-file": "d", "data-file-raw": True},
            {**plain, "backing-file": "base.qcow2", "backing-fmt": "qcow2", "refcount-bits": 1},
            {**plain, "file": {"driver": "file", "filename": self.path("other.qcow2")}},
            {"driver": "file", "filename": self.path("other.qcow2"), "size": MIB, "preallocation": "falloc"},
            {**plain, "encrypt": {"format": "luks", "key-secret": "old", "iter-time": 10}},
        ):
            results.append(self.create(options))
            if options["driver"] == "qcow2" and options.get("file") == "f" and results[-1][2] is None:
                info = json.loads(qemu_img("info", "-U", "--output=json", file))
                results.append({k: v for k, v in info.items() if k in ("format", "virtual-size", "cluster-size", "encrypted")})
                specific = info["format-specific"]["data"]
                specific.pop("encrypt", None)
                results.append(specific)
        for options in (
            {**plain, "file": "nobody"},
            {**plain, "cluster-size": 77},
            {**plain, "refcount-bits": 3},
            {"driver": "file", "filename": self.path("nowhere/x"), "size": 1},
        ):
            statuses, kind, error = self.create(options)
            results.append((statuses, kind, error is not None))
        disk = {"driver": "qcow2", "node-name": "disk", "file": "f", "encrypt": {"format": "luks", "key-secret": "old"}}
        self.qmp.execute("blockdev-add", disk)
        add = {"format": "luks", "state": "active", "new-secret": "new", "iter-time": 10}
        results.append(self.amend({"driver": "qcow2"}))
        results.append(self.amend({"driver": "qcow2", "encrypt": add}))
        results.append(self.amend({"driver": "qcow2", "encrypt": {"format": "luks", "state": "inactive", "old-secret": "old"}}))
        statuses, kind, error = self.amend({"driver": "qcow2", "encrypt": {"format": "luks", "state": "inactive", "old-secret": "new"}})
        results.append((statuses, kind, error is not None))
        self.qmp.execute("blockdev-del", {"node-name": "disk"})
        with self.assertRaises(Exception):
            self.qmp.execute("blockdev-add", disk)
        disk["encrypt"]["key-secret"] = "new"
        self.qmp.execute("blockdev-add", disk)
        self.qmp.execute("blockdev-del", {"node-name": "disk"})
        return results

    def test_as_the_peer_does(self):
        ours = self.everything()
        for name in ("disk.qcow2", "disk.data", "other.qcow2"):
            os.unlink(self.path(name))
        self.start([PEER])
        self.assertEqual(ours, self.everything())

    def test_a_new_overlay_is_used_at_once(self):
        base = self.create_image("base.qcow2", 4 * MIB)
        qemu_io(base, "write -q -P 7 0 2M")
        path = self.make_file("top.qcow2")
        self.qmp.execute("blockdev-add", {"driver": "file", "node-name": "f", "filename": path})
        options = {"driver": "qcow2", "file": "f", "size": 4 * MIB, "backing-file": "base.qcow2", "backing-fmt": "qcow2"}
        self.assertEqual(self.create(options)[2], None)
        self.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "top", "file": "f"})
        self.assertEqual(len(self.qmp.execute("query-named-block-nodes", {"flat": True})), 4)
        self.server.stop()
        image_check(path)
        image_compare(path, base)

    def refused(self, pattern, command, arguments):
        """A dry run says the same."""
        for name, more in ((command, arguments), ("access-check", {"command": command, "arguments": arguments})):
            try:
                answer = self.qmp.execute(name, more)
            except Exception as error:
                self.assertRegex(str(error), pattern)
            else:
                self.assertEqual(name, "access-check")
                self.assertRegex(json.dumps(answer), pattern)

    def test_what_is_refused_at_once(self):
        image = self.create_image("used.qcow2", 4 * MIB)
        self.server.add_qcow2("disk", image)
        create = {"job-id": "c", "options": {"driver": "qcow2", "file": "disk-file", "size": MIB}}
        self.refused("disk-file.*disk -> disk-file", "blockdev-create", create)
        self.refused("Invalid job ID", "blockdev-create", {**create, "job-id": "9"})
        self.refused("does not support blockdev-create", "blockdev-create", {**create, "options": {"driver": "raw"}})
        amend = {"job-id": "a", "node-name": "disk", "options": {"driver": "qcow2"}}
        self.refused("node-name='nobody'", "x-blockdev-amend", {**amend, "node-name": "nobody"})
        self.refused("does not support x-blockdev-amend", "x-blockdev-amend", {**amend, "node-name": "disk-file"})
        luks = {"driver": "luks", "state": "inactive", "keyslot": 0}
        self.refused("changing the block driver", "x-blockdev-amend", {**amend, "options": luks})
        self.assertEqual(self.qmp.execute("query-jobs"), [])
        self.server.stop()
        image_check(image)

    def test_one_waits_until_the_place_is_free(self):
        image = self.create_image("used.qcow2", 4 * MIB)
        self.server.add_qcow2("disk", image)
        options = {"driver": "qcow2", "file": "disk-file", "size": MIB}
        self.qmp.execute("blockdev-create", {"job-id": "c", "options": options, "on-conflict": "wait"})
        self.assertEqual(self.qmp.execute("query-jobs"), [])
        self.qmp.execute("blockdev-del", {"node-name": "disk"})
        self.qmp.wait_event("ACCESS_GRANTED", id="c")
        self.assertEqual(self.end_of("c"), (self.WELL, "create", None))
        self.qmp.execute("blockdev-create", {"job-id": "c", "options": options})
        self.qmp.wait_event("JOB_STATUS_CHANGE", id="c", status="concluded")
        for verb in ("job-cancel", "job-pause", "job-finalize", "job-complete"):
            with self.assertRaisesRegex(Exception, "Job 'c' in state 'concluded' cannot accept command verb"):
                self.qmp.execute(verb, id="c")
        with self.assertRaisesRegex(Exception, "DeviceNotActive"):
            self.qmp.execute("block-job-dismiss", id="c")
        with self.assertRaisesRegex(Exception, "already in use"):
            self.qmp.execute("blockdev-create", {"job-id": "c", "options": options})
        self.qmp.execute("job-dismiss", id="c")
        self.server.stop()
        self.assertEqual(json.loads(qemu_img("info", "--output=json", image))["virtual-size"], MIB)

    def test_keys_change_under_a_client(self):
        path = self.path("crypt.qcow2")
        luks = "encrypt.format=luks,encrypt.key-secret=old,encrypt.iter-time=10"
        qemu_img("create", "-q", "-f", "qcow2", *SECRETS[:2], "-o", luks, path, "4M")
        self.qmp.execute("blockdev-add", {
            "driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": path},
            "encrypt": {"format": "luks", "key-secret": "old"}})
        self.server.nbd_server()
        self.server.export("disk")
        add = {"format": "luks", "state": "active", "new-secret": "new", "iter-time": 10}
        erase = {"driver": "qcow2", "encrypt": {"format": "luks", "state": "inactive", "keyslot": 0}}
        with nbd_handle(self.server.uri("disk")) as client:
            client.pwrite(b"a" * MIB, 0)
            self.assertEqual(self.amend({"driver": "qcow2", "encrypt": add}), (self.WELL, "amend", None))
            client.pwrite(b"b" * MIB, MIB)
            self.assertEqual(self.amend(erase)[2], None)
            self.assertIn("last active", self.amend({**erase, "encrypt": {**erase["encrypt"], "keyslot": 1}})[2])
            self.assertEqual(client.pread(2 * MIB, 0), b"a" * MIB + b"b" * MIB)
        self.server.stop()
        options = f"driver=qcow2,file.filename={path},encrypt.key-secret=new"
        output = self.run_io(options)
        self.assertNotIn("failed", output)

    def run_io(self, options):
        return run("qemu-io", *SECRETS, "--image-opts", options, "-c", "read -P 97 0 1M", "-c", "read -P 98 1M 1M").stdout


if __name__ == "__main__":
    unittest.main()
