# SPDX-License-Identifier: LGPL-2.1-or-later
"""vhost-user-blk exports as a real guest sees them (machine.py): Linux' driver, the peer's front end, our daemon."""
import hashlib
import json
import os
import subprocess
import time
import unittest

import machine
from harness import BUILD, FULL, MIB, SLOWNESS, TestCase, die_with_parent, run

SIZE = 64 * MIB
LOUDLY = f"NO GUEST: {machine.why_not()}; vhost-user-blk was not tried with one"


LOAD = os.path.join(BUILD, "bench", "vhost_load")


class Exports(TestCase):
    """The life of an export under load (bench/vhost_load.c), and what it refuses."""

    builds = ("release", "asan")

    def serve(self, **more):
        path = self.create_image("disk.qcow2", SIZE)
        daemon = self.daemon("--object", "iothread,id=t0", "--object", "iothread,id=t1",
                             "--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={path}")
        export = {"type": "vhost-user-blk", "id": "e0", "node-name": "disk", "writable": True, "num-queues": 2,
                  "iothread": ["t0", "t1"], "addr": {"type": "unix", "path": self.path("sock")}, **more}
        daemon.qmp.execute("block-export-add", export)
        return daemon, export

    def load(self, *words):
        line = [LOAD, "--unix", self.path("sock"), *words]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=die_with_parent)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def assert_connected(self, daemon, load):
        """Under load, an export is not deleted just so."""
        self.assertEqual(load.stderr.readline(), b"connected\n")
        self.assert_refused("still in use: 1 client is connected", daemon.qmp.execute, "block-export-del", id="e0")

    def test_data_beside_a_mirror(self):
        """Every block says where it belongs, in the disk, and in its copy."""
        daemon, _ = self.serve()
        run(LOAD, "--unix", self.path("sock"), "--mode", "fill", "--block", "65536", "--queues", "2", "--depth", "8")
        load = self.load("--mode", "write", "--random", "--packed", "--queues", "2", "--depth", "16", "--seconds", "1",
                         "--verify")
        copy = self.create_image("copy.qcow2", SIZE)
        daemon.add_qcow2("copy", copy)
        daemon.qmp.execute("blockdev-mirror", {"job-id": "j", "device": "disk", "target": "copy", "sync": "full"})
        daemon.qmp.wait_event("BLOCK_JOB_READY")
        out, err = load.communicate(timeout=60 * SLOWNESS)
        self.assertEqual(load.returncode, 0, err)
        self.assertGreater(json.loads(out)["requests"], 100)
        daemon.qmp.execute("block-job-cancel", device="j")
        daemon.qmp.wait_event("BLOCK_JOB_COMPLETED")
        daemon.qmp.execute("blockdev-del", node_name="copy")
        daemon.qmp.execute("block-export-add", {
            "type": "vhost-user-blk", "id": "e1", "node-name": "disk", "addr": {"type": "unix", "path": self.path("ro")}})
        run(LOAD, "--unix", self.path("ro"), "--mode", "read", "--seconds", "0.1")
        daemon.stop()
        run("qemu-img", "compare", self.path("disk.qcow2"), copy)

    def test_deleting_and_quitting_under_load(self):
        daemon, export = self.serve()
        run(LOAD, "--unix", self.path("sock"), "--mode", "fill", "--block", "65536", "--depth", "8")
        load = self.load("--mode", "read", "--random", "--queues", "2", "--depth", "16", "--seconds", "60")
        self.assert_connected(daemon, load)
        daemon.qmp.execute("block-export-del", id="e0", mode="hard")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
        self.assertFalse(os.path.exists(self.path("sock")))
        load.kill()
        daemon.qmp.execute("block-export-add", export)
        load = self.load("--mode", "read", "--random", "--queues", "2", "--depth", "16", "--seconds", "60")
        self.assert_connected(daemon, load)
        daemon.stop()

    def test_refused(self):
        daemon, export = self.serve()
        more = {**export, "id": "e1", "addr": {"type": "unix", "path": self.path("other")}}
        for change, reason in (
            ({"num-queues": 0}, "num-queues of export 'e1' must be between 1 and 256"),
            ({"num-queues": 257}, "num-queues"),
            ({"logical-block-size": 256}, "must be a power of 2 between 512 and 2097152"),
            ({"logical-block-size": 1000}, "must be a power of 2"),
            ({"addr": {"type": "inet", "host": "localhost", "port": "0"}}, "type 'unix' or 'fd'"),
            ({"addr": {"type": "unix", "path": self.path("sock")}}, "in use"),
            ({"addr": {"type": "unix", "path": self.path("no/such/folder")}}, "No such file"),
        ):
            self.assert_refused(reason, daemon.qmp.execute, "block-export-add", {**more, **change})
        self.assertEqual([export["id"] for export in daemon.qmp.execute("query-block-exports")], ["e0"])


@unittest.skipIf(machine.why_not(), LOUDLY)
class Guest(TestCase):
    time_limit = 150  # 20 s on an idle machine; emulated processors suffer from neighbours
    builds = ("release",)

    def serve(self):
        """A daemon with disks `a` (qcow2, two queues on two threads) and `b` (raw); for the first time or again."""
        daemon = self.daemon(
            "--object", "iothread,id=t0", "--object", "iothread,id=t1",
            "--blockdev", f"file,node-name=a-file,discard=unmap,filename={self.path('a.qcow2')}",
            "--blockdev", "qcow2,node-name=a,discard=unmap,file=a-file",
            "--blockdev", f"file,node-name=b,discard=unmap,filename={self.path('b.raw')}",
        )
        for node, queues in (("a", 2), ("b", 1)):
            daemon.qmp.execute("block-export-add", {
                "type": "vhost-user-blk", "id": f"disk-{node}", "node-name": node, "writable": True,
                "num-queues": queues, "iothread": ["t0", "t1"][:queues],
                "addr": {"type": "unix", "path": self.path(f"{node}.sock")}})
        return daemon

    def boot(self, *programs, packed="on", **more):
        self.create_image("a.qcow2", SIZE)
        with open(self.path("b.raw"), "wb") as raw:
            raw.truncate(SIZE)
        daemon = self.serve()
        disks = [(self.path("a.sock"), f",packed={packed},num-queues=2"), (self.path("b.sock"), ",num-queues=1")]
        return daemon, machine.Machine(self, disks, *programs, **more)

    def content(self, name):
        """The checksum of what is in an image."""
        if name.endswith(".qcow2"):
            run("qemu-img", "check", "-q", "-f", "qcow2", self.path(name))
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.path(name), self.path("content"))
            name = "content"
        with open(self.path(name), "rb") as image:
            return hashlib.md5(image.read()).hexdigest()

    def test_disks_of_a_guest_and_a_daemon_that_is_killed(self):
        daemon, guest = self.boot()
        facts = guest.run("cd /sys/block; cat vda/serial; echo; cat vdb/serial; echo; cat vda/size vdb/size; ls vda/mq"
                          "; cat vda/queue/write_cache")
        self.assertEqual(facts.split(), ["disk-a", "disk-b", str(SIZE // 512), str(SIZE // 512), "0", "1", "write", "back"])
        # What is written is read, past the guest's cache.
        guest.run("dd if=/dev/urandom of=/tmp/p bs=256k count=8")
        for disk in ("vda", "vdb"):
            guest.run(f"dd if=/tmp/p of=/dev/{disk} bs=64k seek=16 oflag=direct"
                      f" && dd if=/dev/{disk} bs=64k skip=16 count=32 iflag=direct of=/tmp/q && cmp /tmp/p /tmp/q")
        # Discarding, and zeroes.
        guest.run("blkdiscard -o 1048576 -l 1048576 /dev/vda && dd if=/dev/vda bs=64k skip=16 count=16 iflag=direct of=/tmp/q"
                  " && dd if=/dev/zero of=/tmp/z bs=64k count=16 && cmp /tmp/q /tmp/z")
        # A longer disk.
        daemon.qmp.execute("block_resize", {"node-name": "a", "size": 2 * SIZE})
        guest.run(f"until [ $(cat /sys/block/vda/size) = {2 * SIZE // 512} ]; do sleep 0.1; done"
                  f" && dd if=/tmp/p of=/dev/vda bs=64k seek={SIZE // 65536 + 100} oflag=direct")
        # Killed in the middle of writes, again and again: the guest notices nothing, and nothing is lost. What qcow2
        # keeps in memory until a flush would be, so there the guest switches the cache off: the next daemon knows.
        guest.run("echo 'write through' > /sys/block/vda/cache_type")
        guest.run("for disk in vda vdb; do ( until [ -e /tmp/stop ]; do for at in 1024 2048; do"
                  " dd if=/tmp/p of=/dev/$disk bs=4k seek=$at oflag=direct || touch /tmp/failed; done; done; touch /tmp/ended-$disk )"
                  " >/dev/null 2>&1 & done")
        for _ in range(10 if FULL else 2):
            time.sleep(self.random.uniform(0.1, 0.6))
            daemon.kill()
            daemon = self.serve()
        guest.run("touch /tmp/stop; until [ -e /tmp/ended-vda -a -e /tmp/ended-vdb ]; do sleep 0.1; done; [ ! -e /tmp/failed ]")
        guest.run("for disk in vda vdb; do for at in 1024 2048; do dd if=/dev/$disk bs=4k skip=$at count=512 iflag=direct"
                  " of=/tmp/q && cmp /tmp/p /tmp/q || exit 1; done; done")
        sums = guest.run("sync; md5sum /dev/vda /dev/vdb").split()
        guest.end()
        daemon.stop()
        self.assertEqual(self.content("a.qcow2"), sums[0])
        self.assertEqual(self.content("b.raw"), sums[2])

    @unittest.skipUnless(FULL, "minutes")
    def test_fio_verifies(self):
        for packed in ("off", "on"):
            daemon, guest = self.boot("/usr/bin/fio", packed=packed, memory=1024)
            for disk in ("vda", "vdb"):
                guest.run(f"fio --name=x --filename=/dev/{disk} --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw"
                          " --bsrange=512-128k --size=60m --verify=crc32c --verify_fatal=1 --do_verify=1 --numjobs=1",
                          timeout=600)
            guest.run("echo 'write through' > /sys/block/vda/cache_type")
            writer = guest.begin("fio --name=x --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16"
                                 " --rw=randwrite --bs=4k --size=60m --verify=crc32c --verify_fatal=1 --do_verify=1")
            for _ in range(10):
                time.sleep(self.random.uniform(0.1, 2))
                daemon.kill()
                daemon = self.serve()
            guest.finish(writer, timeout=600)
            guest.end()
            daemon.stop()
            run("qemu-img", "check", "-f", "qcow2", self.path("a.qcow2"))


if __name__ == "__main__":
    unittest.main()
