# SPDX-License-Identifier: LGPL-2.1-or-later
"""vhost-user-blk exports as a real guest sees them (machine.py): Linux' driver, the peer's front end, our daemon."""
import os
import threading
import time
import unittest

import machine
from harness import FULL, KIB, MIB, SLOWNESS, TestCase, run

SIZE = 64 * MIB


@unittest.skipIf(machine.why_not(), f"no guest: {machine.why_not()}")
class Guest(TestCase):
    time_limit = 60
    builds = ("release",)

    def serve(self, name="d"):
        """A daemon with disks `a` (qcow2, two queues on two threads) and `b` (raw); starts, or starts again."""
        daemon = self.daemon(
            "--object", "iothread,id=t0", "--object", "iothread,id=t1",
            "--blockdev", f"qcow2,node-name=a,discard=unmap,file.driver=file,file.filename={self.path('a.qcow2')},file.discard=unmap",
            "--blockdev", f"file,node-name=b,discard=unmap,filename={self.path('b.raw')}", name=name,
        )
        for node, queues in (("a", 2), ("b", 1)):
            daemon.qmp.execute("block-export-add", {
                "type": "vhost-user-blk", "id": f"disk-{node}", "node-name": node, "writable": True, "num-queues": queues,
                "iothread": ["t0", "t1"][:queues], "addr": {"type": "unix", "path": self.path(f"{node}.sock")}})
        return daemon

    def test_disks(self):
        self.create_image("a.qcow2", SIZE)
        with open(self.path("b.raw"), "wb") as raw:
            raw.truncate(SIZE)
        daemon = self.serve()
        t0 = time.monotonic()
        guest = machine.Machine(self, [(self.path("a.sock"), ",packed=on,num-queues=2"), (self.path("b.sock"), ",num-queues=1")])
        print(time.monotonic() - t0, guest.kvm)
        print(guest.run("cat /sys/block/vda/serial /sys/block/vda/size /sys/block/vdb/size; ls /sys/block/vda/mq; dmesg | grep -i vd"))
