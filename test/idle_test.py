# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon with every kind of export, and clients that have worked and now do nothing, does nothing."""
import contextlib
import glob
import os
import shutil
import subprocess
import time
import unittest

import harness
from fuse_test import can_mount
from harness import MIB, scale
from nbd_server_test import Extended
from vhost_hostile_test import Front

SIZE = 64 * MIB
QUIET_SECONDS = 20  # until everything that was begun is done


class Idle(harness.TestCase):
    builds = ("release",)

    def serve(self):
        """Everything there is; what has to stay alive."""
        daemon = self.daemon("--object", "iothread,id=t0", "--object", "iothread,id=t1", "--blockdev",
                             f"qcow2,node-name=disk,file.driver=file,file.filename={self.create_image('disk', SIZE)}")
        server = self.daemon("--blockdev", "null-co,node-name=far,size=1M")
        server.nbd_server()
        server.export("far")
        daemon.nbd_server()
        daemon.export("disk")
        daemon.export("disk", name="t", export_id="t", iothread="t0")
        daemon.qmp.execute("blockdev-add", {"driver": "nbd", "node-name": "near", "reconnect-delay": 10, "export": "far",
                                            "server": {"type": "unix", "path": server.nbd_path}})
        daemon.export("near")
        daemon.qmp.execute("block-export-add", {
            "type": "vhost-user-blk", "id": "v", "node-name": "disk", "writable": True, "iothread": "t1",
            "addr": {"type": "unix", "path": self.path("vhost.sock")}})
        stay = [server]
        for name in ("disk", "disk", "disk", "t", "t", "near", "near"):
            client = Extended(daemon.nbd_path).go(name)
            for i in range(8):
                self.assertEqual(client.reply(1, i * 65536, 0, payload=bytes([i + 1]) * 65536), [(0, b"")])
                self.assertEqual(len(client.pread(65536, i * 65536)), 65536)
            stay.append(client)
        front = Front(self.path("vhost.sock"))
        front.set_up()
        front.wait(front.submit(4))
        stay.append(front)
        if can_mount():
            path = self.path("file")
            with open(path, "wb"):
                pass
            daemon.qmp.execute("block-export-add", {"type": "fuse", "id": "f", "node-name": "disk", "mountpoint": path,
                                                    "writable": True})
            self.addCleanup(subprocess.run, ["umount", "-l", path], stderr=subprocess.DEVNULL, check=False)
            for _ in range(2):
                file = open(path, "r+b", buffering=0)
                self.addCleanup(file.close)
                file.write(b"x" * 100000)
                stay.append(file)
        return daemon, stay

    @staticmethod
    def switches(daemon):
        """How often each of the daemon's threads has gone to sleep: whoever calls the system without need does it. Not
        those of the worker pool, which end when they had no work for seconds, and do not wait for anything else."""
        counts = {}
        for path in glob.glob(f"/proc/{daemon.pid}/task/*/status"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(path) as status:
                fields = dict(line.split(":", 1) for line in status)
                if fields["Name"].strip() != "worker":
                    counts[path.split("/")[-2]] = int(fields["voluntary_ctxt_switches"])
        return counts

    def test_looking_before_sleeping(self):
        """poll-max-ns of an iothread: with 0 it sleeps before each request of a client that waits for its answers, with
        much it does not."""
        if len(os.sched_getaffinity(0)) == 1:
            self.skipTest("with one processor nobody looks")
        requests, names = 200, ("never", "long")
        daemon = self.daemon("--object", "iothread,id=never,poll-max-ns=0", "--object",
                             "iothread,id=long,poll-max-ns=50000000", "--object", "iothread,id=other", "--blockdev",
                             "null-co,node-name=n,size=1M")
        threads = {thread["id"]: thread for thread in daemon.qmp.execute("query-iothreads")}
        self.assertEqual([threads[name]["poll-max-ns"] for name in (*names, "other")], [0, 50000000, 40000])
        for value in (-1, 100000001):
            with self.assertRaisesRegex(harness.QmpError, "must be from 0 to"):
                daemon.qmp.execute("object-add", {"qom-type": "iothread", "id": "x", "poll-max-ns": value})
        daemon.nbd_server()
        slept = {}
        for name in names:
            daemon.export("n", name=name, export_id=name, iothread=name)
            client = Extended(daemon.nbd_path).go(name)
            before = self.switches(daemon)[str(threads[name]["thread-id"])]
            for _ in range(requests):
                client.pread(512, 0)
                time.sleep(0.002)  # longer than who shares its processor with the client can be without it
            slept[name] = self.switches(daemon)[str(threads[name]["thread-id"])] - before
            client.close()
        self.assertGreater(slept["never"], requests // 2)
        self.assertLess(slept["long"], requests // 4)

    def test_nothing_is_done(self):
        daemon, stay = self.serve()
        deadline = time.monotonic() + QUIET_SECONDS * harness.SLOWNESS
        while True:
            before = self.switches(daemon)
            time.sleep(0.3)
            if self.switches(daemon) == before:
                break
            self.assertLess(time.monotonic(), deadline, "it is never quiet")
        seconds = scale(1.5, 5)
        if not shutil.which("strace"):
            time.sleep(seconds)
            self.assertEqual(self.switches(daemon), before)
            self.skipTest("NO STRACE: only wakes were counted, not system calls")
        log = self.path("strace")
        tracer = subprocess.Popen(["strace", "-f", "-qq", "-ttt", "-o", log, "-p", str(daemon.pid)],
                                  stderr=subprocess.DEVNULL, preexec_fn=harness.die_with_parent)
        self.addCleanup(tracer.wait)
        self.addCleanup(tracer.kill)
        time.sleep(0.5)  # calls that it interrupts by its coming begin anew
        start = time.time()
        time.sleep(seconds)
        self.assertIsNone(tracer.poll())
        end = time.time()
        tracer.terminate()
        tracer.wait()
        with open(log) as lines:
            calls = [line for line in lines if start < float(line.split()[1]) < end and line.split()[0] in before]
        self.assertEqual(calls, [])
        self.assertEqual(len(before), 3)  # the control thread and two of I/O
        self.assertTrue(os.path.getsize(log), "strace saw nothing at all")
        self.assertEqual(len(stay), 11 if can_mount() else 9)


if __name__ == "__main__":
    unittest.main()
