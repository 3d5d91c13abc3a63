# SPDX-License-Identifier: LGPL-2.1-or-later
"""block_resize and change-backing-file on a running daemon: clients that write meanwhile, what they see when they connect
again, refusals beside exports and jobs, and what the peer's tools find in the images afterwards."""
import json
import os
import threading
import time

from harness import IS_PEER, KIB, MIB, TestCase, image_check, nbd_handle, qemu_img, qemu_io

SIZE = 4 * MIB


class Resizing(TestCase):
    builds = ("release", "asan")

    def size_of(self, daemon, node):
        nodes = {info["node-name"]: info for info in daemon.qmp.execute("query-named-block-nodes")}
        return nodes[node]["image"]["virtual-size"]

    def info(self, path, image_format="qcow2"):
        return json.loads(qemu_img("info", "-f", image_format, "--output=json", path))

    def claims(self, daemon):
        return {holder["id"]: holder["claims"] for holder in daemon.qmp.execute("query-access")["holders"]}

    def chain(self, *options):
        """base (longer than what leans on it, and full), a, top; what top shows behind its end must stay hidden."""
        base = self.create_image("base.qcow2", 2 * SIZE, *options)
        qemu_io(base, f"write -q -P 9 0 {2 * SIZE}")
        middle = self.create_image("a.qcow2", SIZE, *options, backing=base)
        qemu_io(middle, f"write -q -P 9 0 {MIB}")
        top = self.create_image("top.qcow2", SIZE + 512 if options else SIZE, *options, backing=middle)
        return [("base", base), ("a", middle), ("top", top)]

    def test_a_guest_writes_while_its_disk_grows_and_sees_it_when_it_connects_again(self):
        if IS_PEER:
            self.skipTest("the peer does not let an exported image grow")
        chain = self.chain()
        daemon = self.daemon()
        daemon.add_chain(chain)
        daemon.nbd_server()
        daemon.export("top")
        stop, written = threading.Event(), []

        def guest():
            with nbd_handle(daemon.uri("top")) as nbd:
                while not stop.is_set():
                    offset = len(written) % 64 * 64 * KIB
                    value = 1 + len(written) % 200
                    nbd.pwrite(bytes([value]) * 64 * KIB, offset)
                    written.append((offset, value))
                self.sizes = [nbd.get_size()]

        writer = threading.Thread(target=guest)
        writer.start()
        while not written:
            time.sleep(0.001)
        for step in range(1, 9):
            daemon.qmp.execute("block_resize", {"node-name": "top", "size": SIZE + step * 512 * KIB})
            self.assertEqual(self.size_of(daemon, "top"), SIZE + step * 512 * KIB)
            time.sleep(0.01)
        stop.set()
        writer.join()
        self.assertEqual(self.sizes, [SIZE])
        expected = dict(written)
        with nbd_handle(daemon.uri("top")) as nbd:
            self.assertEqual(nbd.get_size(), 2 * SIZE)
            self.assertEqual(nbd.pread(SIZE, SIZE), bytes(SIZE))
            for offset, value in expected.items():
                self.assertEqual(nbd.pread(64 * KIB, offset), bytes([value]) * 64 * KIB)
            nbd.pwrite(b"x" * 512, 2 * SIZE - 512)
            nbd.flush()
        daemon.stop()
        image_check(chain[2][1])
        self.assertEqual(self.info(chain[2][1])["virtual-size"], 2 * SIZE)
        qemu_io(chain[2][1], f"read -q -P 0 {SIZE} {SIZE - 512}", f"read -q -P {b'x'[0]} {2 * SIZE - 512} 512")

    def test_a_guest_writes_behind_the_old_end_while_images_below_grow(self):
        if IS_PEER:
            self.skipTest("the peer does not let an image grow that others lean on")
        chain = self.chain()
        daemon = self.daemon()
        daemon.add_chain(chain)
        daemon.nbd_server()
        daemon.qmp.execute("block_resize", device="top", size=3 * SIZE)
        daemon.export("top")
        with nbd_handle(daemon.uri("top")) as nbd:
            for step in range(1, 9):
                nbd.pwrite(bytes([step]) * 4096, 2 * SIZE + step * 64 * KIB)
                daemon.qmp.execute("block_resize", {"node-name": "a", "size": SIZE + step * MIB})
                daemon.qmp.execute("block_resize", {"node-name": "base", "size": 2 * SIZE + step * MIB})
                self.assertEqual(nbd.pread(SIZE, SIZE), bytes(SIZE))
            for step in range(1, 9):
                self.assertEqual(nbd.pread(4096, 2 * SIZE + step * 64 * KIB), bytes([step]) * 4096)
        daemon.stop()
        for _, path in chain:
            image_check(path)
        qemu_io(chain[1][1], f"read -q -P 9 0 {SIZE}")
        qemu_io(chain[2][1], f"read -q -P 9 0 {SIZE}", f"read -q -P 0 {SIZE} {SIZE}")

    def test_old_data_of_the_backing_file_stay_hidden_in_every_version(self):
        for options in (["compat=0.10"], ["cluster_size=512"], ["cluster_size=2M"]):
            with self.subTest(options):
                chain = self.chain(*options)
                daemon = self.daemon()
                daemon.add_chain(chain)
                for size in (SIZE + 1024, SIZE + 5 * 64 * KIB + 512, 2 * SIZE + MIB):
                    daemon.qmp.execute("block_resize", {"node-name": "top", "size": size})
                daemon.stop()
                image_check(chain[2][1])
                qemu_io(chain[2][1], f"read -q -P 9 0 {SIZE}", f"read -q -P 0 {SIZE} {SIZE + MIB}")

    def test_an_image_whose_snapshots_do_not_know_their_size_keeps_its_own(self):
        for options, allowed in (("compat=0.10", False), ("compat=1.1", True)):
            with self.subTest(options):
                path = self.create_image("snapshot.qcow2", SIZE, options)
                qemu_io(path, f"write -q -P 1 0 {SIZE}")
                qemu_img("snapshot", "-c", "s", path)
                qemu_io(path, f"write -q -P 2 0 {MIB}")
                daemon = self.daemon()
                daemon.add_qcow2("snapshot", path)
                arguments = {"node-name": "snapshot", "size": 2 * SIZE}
                if allowed:
                    daemon.qmp.execute("block_resize", arguments)
                else:
                    self.assert_refused("snapshot", daemon.qmp.execute, "block_resize", arguments)
                daemon.stop()
                image_check(path)
                qemu_img("snapshot", "-a", "s", path)
                self.assertEqual(self.info(path)["virtual-size"], SIZE)
                qemu_io(path, f"read -q -P 1 0 {SIZE}")
                os.unlink(path)

    def test_shrinking_is_for_who_is_alone_on_an_image(self):
        if IS_PEER:
            self.skipTest("the peer refuses in other words")
        chain = self.chain()
        daemon = self.daemon()
        daemon.add_chain(chain)
        daemon.nbd_server()
        daemon.export("top", writable=False, export_id="e0")
        before = self.claims(daemon)
        shrink = {"node-name": "top", "size": MIB}
        error = self.assert_refused("export e0", daemon.qmp.execute, "block_resize", shrink)
        self.assertEqual([(c["node"], c["action"]) for c in error.data["conflicts"]], [("top", "write-beneath")])
        self.assert_refused("a -> base", daemon.qmp.execute, "block_resize", {"node-name": "base", "size": MIB})
        check = daemon.qmp.execute("access-check", {"command": "block_resize", "arguments": shrink})
        self.assertFalse(check["admitted"])
        self.assertEqual(self.claims(daemon), before)
        self.assertEqual(self.size_of(daemon, "top"), SIZE)
        daemon.qmp.execute("block-export-del", id="e0")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
        daemon.qmp.execute("block_resize", shrink)
        daemon.qmp.execute("block_resize", {"node-name": "top", "size": 2 * MIB})
        daemon.export("top")
        with nbd_handle(daemon.uri("top")) as nbd:
            self.assertEqual(nbd.get_size(), 2 * MIB)
            self.assertEqual(nbd.pread(MIB, 0), bytes([9]) * MIB)
            self.assertEqual(nbd.pread(MIB, MIB), bytes(MIB))
        daemon.stop()
        image_check(chain[2][1])
        qemu_io(chain[2][1], f"read -q -P 9 0 {MIB}", f"read -q -P 0 {MIB} {MIB}")

    def test_an_image_grows_beside_a_commit_below_it_and_not_inside_it(self):
        if IS_PEER:
            self.skipTest("the peer decides otherwise")
        chain = self.chain()
        daemon = self.daemon()
        daemon.add_chain(chain)
        daemon.nbd_server()
        daemon.export("top")
        daemon.qmp.execute("block-commit", {"job-id": "j", "device": "top", "top-node": "a", "base-node": "base", "speed": 1})
        daemon.qmp.execute("block_resize", {"node-name": "top", "size": 2 * SIZE})
        for node in ("a", "base"):
            self.assert_refused("block-commit j", daemon.qmp.execute, "block_resize", {"node-name": node, "size": 4 * SIZE})
        for node in ("a", "top"):
            self.assert_refused(
                "block-commit j", daemon.qmp.execute, "change-backing-file",
                {"device": "top", "image-node-name": node, "backing-file": "x"},
            )
        daemon.qmp.execute("block-job-set-speed", device="j", speed=0)
        self.assertIsNone(daemon.qmp.wait_job("j"))
        with nbd_handle(daemon.uri("top")) as nbd:
            self.assertEqual(nbd.get_size(), 2 * SIZE)
            self.assertEqual(nbd.pread(SIZE, 0), bytes([9]) * SIZE)
            self.assertEqual(nbd.pread(SIZE, SIZE), bytes(SIZE))
        daemon.stop()
        for name in ("base", "top"):
            image_check(dict(chain)[name])
        qemu_io(dict(chain)["top"], f"read -q -P 9 0 {SIZE}", f"read -q -P 0 {SIZE} {SIZE}")

    def test_a_new_name_of_the_backing_file_is_found_by_the_peer(self):
        chain = self.chain()
        daemon = self.daemon()
        daemon.add_chain(chain)
        for node, name in (("a", "base.qcow2"), ("top", "./a.qcow2")):
            daemon.qmp.execute("change-backing-file", {"device": "top", "image-node-name": node, "backing-file": name})
        unknown = {"device": "top", "image-node-name": "x", "backing-file": "y"}
        self.assert_refused("'x'", daemon.qmp.execute, "change-backing-file", unknown)
        if not IS_PEER:  # which takes it, and the image has lost what is below it
            nothing = {"device": "top", "image-node-name": "top", "backing-file": ""}
            self.assert_refused("is empty", daemon.qmp.execute, "change-backing-file", nothing)
        long = {"device": "top", "image-node-name": "top", "backing-file": "n" * 1024}
        self.assert_refused(".", daemon.qmp.execute, "change-backing-file", long)
        self.assert_refused(
            "backing", daemon.qmp.execute, "change-backing-file",
            {"device": "top", "image-node-name": "base", "backing-file": "y"},
        )
        daemon.stop()
        for name, file in (("a", "base.qcow2"), ("top", "./a.qcow2")):
            info = self.info(dict(chain)[name])
            self.assertEqual(info["backing-filename"], file)
            self.assertEqual(info["backing-filename-format"], "qcow2")
            image_check(dict(chain)[name])
        qemu_io(dict(chain)["top"], f"read -q -P 9 0 {SIZE}")

    def test_raw_images_take_sizes_too_and_files_below_them_do_not(self):
        path = self.path("disk.raw")
        qemu_img("create", "-q", "-f", "raw", path, str(MIB))
        daemon = self.daemon()
        daemon.add_file("file", path)
        daemon.qmp.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "file": "file"})
        for size in (2 * MIB, 0, 3 * MIB):
            daemon.qmp.execute("block_resize", {"node-name": "disk", "size": size})
            self.assertEqual(self.info(path, "raw")["virtual-size"], size)
        if not IS_PEER:  # which changes the size of the file under the image
            file = {"node-name": "file", "size": 4 * MIB}
            self.assert_refused("disk -> file", daemon.qmp.execute, "block_resize", file)
        self.assert_refused(".", daemon.qmp.execute, "block_resize", {"node-name": "disk", "size": -1})
        self.assert_refused("node-name='x'", daemon.qmp.execute, "block_resize", {"node-name": "x", "size": 0})
        self.assert_refused("device", daemon.qmp.execute, "block_resize", {"size": 0})
        self.assertEqual(self.info(path, "raw")["virtual-size"], 3 * MIB)
        daemon.qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "null", "size": MIB})
        self.assert_refused(".", daemon.qmp.execute, "block_resize", {"node-name": "null", "size": 2 * MIB})
        daemon.qmp.execute(
            "blockdev-add",
            {"driver": "raw", "node-name": "window", "file": {"driver": "null-co", "size": MIB}, "size": 512},
        )
        self.assert_refused(".", daemon.qmp.execute, "block_resize", {"node-name": "window", "size": 1024})
