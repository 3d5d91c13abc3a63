#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Injected errors of jobs: each kind of job, each side, each kind of request, each policy. A job pauses, tries again,
reports or stops as it was told, says so in its events, and in the end its result is exact and nothing is lost.

In short form a slice of the matrix; `./dev long` runs all of it, with faults at more steps."""
import errno
import itertools
import json
import os
import shutil
import unittest

from harness import FULL, MIB, TestCase, image_check, image_compare, nbd_handle, qemu_img, qemu_io

SIZE = 4 * MIB
POLICIES = ("report", "ignore", "enospc", "auto", "stop")

# Where the data of each job come from and go to; what it is told besides its policy.
JOBS = {
    "commit": {"source": "mid", "target": "base"},
    "active": {"source": "top", "target": "mid"},
    "stream": {"source": "mid", "target": "top"},
    "mirror": {"source": "mid", "target": "copy"},
    "backup": {"source": "mid", "target": "copy"},
}
ONE_POLICY = ("commit", "active", "stream")  # `on-error` for both sides

# What fails: a request of this kind, after this event in the driver above (`none`: from the start).
READ = {"event": "none", "iotype": "read"}
WRITES = [{"event": "write_aio", "iotype": "write"}] + (
    [{"event": event, "iotype": "write"} for event in ("l2_update", "l2_alloc_write", "refblock_update", "cluster_alloc", "cow_write")]
    if FULL
    else []
)
FLUSH = {"event": "none", "iotype": "flush"}


def cases():
    """(job, side, rule, errno, policy), the whole matrix or a slice in which every pair of values occurs."""
    rules = [("source", READ), *[("target", write) for write in WRITES], ("target", FLUSH)]
    everything = list(itertools.product(JOBS, rules, (errno.EIO, errno.ENOSPC), POLICIES))
    if FULL:
        return everything
    jobs, sides = list(JOBS), [("source", READ), ("target", WRITES[0]), ("target", FLUSH)]
    return [
        (job, sides[(i + j) % 3], (errno.EIO, errno.ENOSPC)[(i + j + j // 2) % 2], policy)
        for i, job in enumerate(jobs)
        for j, policy in enumerate(POLICIES)
    ]


class JobErrors(TestCase):
    time_limit = 120
    long_builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        self.image = {name: self.path(f"{name}.qcow2") for name in ("base", "mid", "top", "copy")}
        below = None
        for name, patterns in (("base", ["-P 1 0 4M"]), ("mid", ["-P 2 1M 2M"]), ("top", ["-P 3 2M 512k", "-z 3M 256k"])):
            self.create_image(f"{name}.qcow2", SIZE, backing=below)
            qemu_io(self.image[name], *[f"write -q {pattern}" for pattern in patterns])
            below = self.image[name]
        self.create_image("copy.qcow2", SIZE)
        self.golden = self.path("golden.raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", self.image["top"], self.golden)
        self.sector = {name: self.data_sector(name) for name in ("base", "mid", "top")}
        for path in self.image.values():
            shutil.copy(path, path + ".fresh")

    def make_images(self):
        for path in self.image.values():
            shutil.copy(path + ".fresh", path)

    def data_sector(self, name):
        """Of the first data that the image has of its own and that are seen from the top."""
        for extent in json.loads(qemu_img("map", "-U", "--output=json", "-f", "qcow2", self.image[name])):
            if extent["data"] and extent["depth"] == 0:
                return extent["offset"] // 512
        self.fail(f"{name} has no data")
        return None

    def open(self, faulty, rule, number, times=2):
        """The chain and the copy; requests to the file of the image `faulty` fail by the rule."""
        self.server = self.daemon()
        self.qmp = self.server.qmp
        self.serving = False
        below = None
        for name in ("base", "mid", "top", "copy"):
            self.server.add_file(f"{name}-file", self.image[name])
            file = f"{name}-file"
            if name == faulty:
                inject = {**rule, "errno": number, "once": True}
                if rule is READ:
                    inject["sector"] = self.sector[name]
                # Twice: a copy from file to file that fails is tried again through memory, and nobody hears of it.
                faults = {"driver": "blkdebug", "node-name": "faulty", "image": file, "inject-error": [inject] * times}
                self.qmp.execute("blockdev-add", faults)
                file = "faulty"
            backing = None if name == "copy" else below
            self.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": name, "file": file, "backing": backing})
            below = name

    def start(self, job, side=None, policy="report"):
        other = "target" if side == "source" else "source"
        if job in ONE_POLICY:
            policies = {"on-error": policy}
        else:  # the other side's policy is not asked
            policies = {f"on-{side}-error": policy, f"on-{other}-error": "report" if policy != "report" else "stop"} if side else {}
        arguments = {
            "commit": ("block-commit", {"device": "top", "top-node": "mid", "base-node": "base"}),
            "active": ("block-commit", {"device": "top", "base-node": "mid"}),
            "stream": ("block-stream", {"device": "top", "base-node": "base"}),
            "mirror": ("blockdev-mirror", {"device": "top", "target": "copy", "sync": "full"}),
            "backup": ("blockdev-backup", {"device": "top", "target": "copy", "sync": "full"}),
        }[job]
        self.qmp.execute(arguments[0], {"job-id": "j", **arguments[1], **policies})

    def lead_to(self, *names):
        """Takes the first event of these names. A job that is ready on the way is told to complete."""
        while True:
            for event in self.qmp.events:
                if event["event"] in names:
                    self.qmp.events.remove(event)
                    return event
                if event["event"] == "BLOCK_JOB_READY":
                    self.qmp.events.remove(event)
                    self.qmp.execute("job-complete", id="j")
                    break
            else:
                self.qmp.events.append(self.qmp.receive())

    def expect_error(self, error, side, action):
        self.assertEqual(error, {"device": "j", "operation": "read" if side == "source" else "write", "action": action})

    def resume(self, number):
        """The job has stopped; it says why, and goes on."""
        while self.lead_to("JOB_STATUS_CHANGE")["data"]["status"] not in ("paused", "standby"):
            pass
        info = self.qmp.execute("query-block-jobs")[0]
        self.assertEqual(info["io-status"], "nospace" if number == errno.ENOSPC else "failed")
        self.assertEqual((info["paused"], info["busy"]), (True, False))
        self.qmp.execute("job-resume", id="j")
        running = self.qmp.execute("query-block-jobs")
        if not any(event["event"] == "BLOCK_JOB_ERROR" for event in self.qmp.events):  # the next one already
            self.assertEqual([job["io-status"] for job in running], ["ok"] * len(running))

    def check_results(self, job):
        """The chain shows what it showed, and a copy is one."""
        self.server.stop()
        self.daemons.remove(self.server)
        shown = {"active": "mid"}.get(job, "top")
        image_compare(self.golden, self.image[shown], first_format="raw")
        if job in ("mirror", "backup"):
            image_compare(self.golden, self.image["copy"], first_format="raw")
        image_check(self.image[JOBS[job]["target"]], leaks_allowed=True)

    def check_view(self):
        """The chain shows what it showed; read through the daemon, which may hold more than the disk."""
        if not self.serving:
            self.server.nbd_server()
            self.serving = True
        self.server.export("top", writable=False)
        with open(self.golden, "rb") as golden, nbd_handle(self.server.uri("top")) as client:
            try:
                shown = client.pread(SIZE, 0)
            except Exception:  # pylint: disable=broad-except
                shown = client.pread(SIZE, 0)  # the second fault was left for the client
            self.assertEqual(shown, golden.read())
        self.qmp.execute("block-export-del", id="export-top")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED")

    def run_case(self, job, side, rule, number, policy):
        self.make_images()
        self.open(JOBS[job][side], rule, number)
        stops = policy == "stop" or (policy in ("enospc", "auto") and number == errno.ENOSPC)
        action = "stop" if stops else "ignore" if policy == "ignore" else "report"
        self.start(job, side, policy)
        first = self.lead_to("BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED")
        if first["event"] == "BLOCK_JOB_COMPLETED" and rule["event"] not in ("none", "write_aio"):
            self.assertNotIn("error", first["data"])  # a step that this job does not take
            self.check_results(job)
            return
        self.assertEqual(first["event"], "BLOCK_JOB_ERROR", first)
        self.expect_error(first["data"], side, action)
        self.failed = True  # the run has met an error
        last = self.go_on(job, side, number, action)
        for _ in range(2):  # the second fault may hit the second run
            if "error" in last:
                self.assertIn(action, ("report", "ignore"))
                self.assertIn(last["error"], (os.strerror(number), f"Cannot flush node '{JOBS[job]['target']}': {os.strerror(number)}"))
                self.assertEqual(last["target-state"], "intact" if job == "stream" else "partial")
                self.check_view()
                self.start(job, side, policy)
                last = self.go_on(job, side, number, action)
        self.assertNotIn("error", last)
        self.assertEqual(last["target-state"], "complete")
        self.check_results(job)

    def go_on(self, job, side, number, action):
        """After the first error of a run, or at the beginning of another: to its end, over what errors there are."""
        if action == "stop":
            self.resume(number)
        while True:
            event = self.lead_to("BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
            if event["event"] != "BLOCK_JOB_ERROR":
                self.qmp.wait_event("JOB_STATUS_CHANGE", id="j", status="null")
                self.qmp.events.clear()
                if action == "ignore":
                    self.assertEqual("error" in event["data"], job == "stream" and self.failed)
                self.failed = False
                return event["data"]
            self.failed = True
            self.expect_error(event["data"], side, action)
            if action == "stop":
                self.resume(number)

    def test_matrix(self):
        for job, (side, rule), number, policy in cases():
            with self.subTest(job=job, side=side, rule=rule, number=number, policy=policy):
                try:
                    self.run_case(job, side, rule, number, policy)
                finally:
                    if self.server in self.daemons:
                        self.daemons.remove(self.server)
                        self.server.kill()

    def make_ready(self, job, policy, number):
        """A job that is ready, with a client, and a target that fails the first write."""
        self.make_images()
        qemu_img("create", "-q", "-f", "qcow2", "-b", self.image["mid"], "-F", "qcow2", self.image["top"])
        self.open(JOBS[job]["target"], WRITES[0], number, times=1)
        self.server.nbd_server()
        self.server.export("top")
        arguments = {
            "active": ("block-commit", {"device": "top", "base-node": "mid", "on-error": policy}),
            "mirror": ("blockdev-mirror", {"device": "top", "target": "copy", "sync": "none", "on-target-error": policy}),
        }[job]
        self.qmp.execute(arguments[0], {"job-id": "j", **arguments[1]})
        self.qmp.wait_event("BLOCK_JOB_READY")

    def test_errors_of_a_job_that_is_ready(self):
        kinds = [("active", errno.EIO), ("mirror", errno.ENOSPC)]
        kinds += [("active", errno.ENOSPC), ("mirror", errno.EIO)] if FULL else []
        for (job, number), policy in itertools.product(kinds, ("report", "ignore", "stop")):
            for ending in ("complete", "soft", "force") if policy == "stop" else ("complete",):
                with self.subTest(job=job, number=number, policy=policy, ending=ending):
                    try:
                        self.make_ready(job, policy, number)
                        self.run_ready(job, number, policy, ending)
                    finally:
                        if self.server in self.daemons:
                            self.daemons.remove(self.server)
                            self.server.kill()

    def run_ready(self, job, number, policy, ending):
        with nbd_handle(self.server.uri("top")) as client:
            expected = bytearray(client.pread(SIZE, 0))

            def write(offset, value, length):
                client.pwrite(bytes([value]) * length, offset)
                expected[offset : offset + length] = bytes([value]) * length

            write(1 * MIB, 7, 256 * 1024)
            self.expect_error(self.lead_to_error(), "target", policy)
            write(2 * MIB, 8, 256 * 1024)  # nobody is held up by it
            if policy == "stop":
                self.resume(number) if ending == "complete" else self.cancel(ending == "force")
            if policy != "report" and ending == "complete":
                self.qmp.execute("job-complete", id="j")
            last = self.lead_to("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
            self.qmp.wait_event("JOB_STATUS_CHANGE", id="j", status="null")
            self.assertEqual("error" in last["data"], policy == "report")
            self.assertEqual(last["event"], "BLOCK_JOB_CANCELLED" if ending == "force" else "BLOCK_JOB_COMPLETED")
            well = policy != "report" and ending != "force"
            self.assertEqual(last["data"]["target-state"], "complete" if well else "partial")
            write(3 * MIB, 9, 64 * 1024)
            self.assertEqual(client.pread(SIZE, 0), bytes(expected))
        self.server.stop()
        self.daemons.remove(self.server)
        moved = policy != "report" and ending == "complete"  # the client writes to the target by now
        shown = JOBS[job]["target"] if moved else "top"
        if not (job == "mirror" and moved):  # that copy has what was written since, and nothing else
            golden = self.path("expected.raw")
            with open(golden, "wb") as file:
                file.write(expected)
            image_compare(golden, self.image[shown], first_format="raw")
        for name in ("top", JOBS[job]["target"]):
            image_check(self.image[name], leaks_allowed=True)

    def lead_to_error(self):
        return self.qmp.wait_event("BLOCK_JOB_ERROR")["data"]

    def cancel(self, force):
        while self.lead_to("JOB_STATUS_CHANGE")["data"]["status"] != "standby":
            pass
        self.qmp.execute("block-job-cancel", {"device": "j", "force": force})


if __name__ == "__main__":
    unittest.main()
