# SPDX-License-Identifier: LGPL-2.1-or-later
"""What node access control says of itself, and what it has to say between processes. Which operations may run side by
side is the business of scenario_test.py.
"""
import scenes
from harness import IS_PEER, TestCase, qemu_io


class Access(TestCase):
    time_limit = 60
    builds = ("release",)
    long_builds = ("release", "asan")

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the peer decides otherwise")

    def open_graph(self):
        """A daemon on a chain base <- a <- b <- c <- top."""
        self.images = scenes.Images("chain", self.directory, self.seed)
        daemon = self.daemon()
        daemon.add_chain([(name, self.images.path(name)) for name, _ in scenes.TOPOLOGIES["chain"]])
        daemon.nbd_server()
        return daemon

    def test_a_stale_image_is_refused_with_its_reason(self):
        daemon = self.open_graph()
        scenes.start(daemon, "commit b>base", "j")
        scenes.end(daemon, "commit b>base", "j")
        for node in ("a", "b"):
            error = self.assert_refused(r"stale", daemon.export, node, False)
            self.assertIn("base", error.desc)

    def test_holders_and_their_claims_are_listed(self):
        daemon = self.open_graph()
        scenes.start(daemon, "commit b>a", "one")
        daemon.export("top")
        access = daemon.qmp.execute("query-access")
        holders = {holder["id"]: holder for holder in access["holders"]}
        self.assertEqual(holders["one"]["command"], "block-commit")
        self.assertEqual({claim["node"] for claim in holders["one"]["claims"]}, {"a", "b", "c"})
        for holder in holders.values():
            for claim in holder["claims"]:
                self.assertTrue(claim["path"], holder)

    def test_two_clients_of_one_node_may_both_write(self):
        daemon = self.open_graph()
        for number in range(4):
            daemon.export("top", name=f"v{number}", export_id=f"v{number}")
        for number in range(4):
            qemu_io(daemon.uri(f"v{number}"), f"write -P {number + 50} {number * 256}k 256k", "flush", image_format="raw")
        for number in range(4):
            qemu_io(daemon.uri("v0"), f"read -P {number + 50} {number * 256}k 256k", image_format="raw")

    def test_a_locked_image_is_refused_with_its_path(self):
        """Between processes: the peer's tools and ours refuse each other."""
        daemon = self.open_graph()
        daemon.export("top")
        with self.assertRaises(AssertionError) as caught:
            qemu_io(self.images.path("top"), "write 0 4k")
        self.assertIn("lock", str(caught.exception))
        other = self.daemon()
        error = self.assert_refused(r"lock", self.open_and_export, other, self.images.path("top"))
        self.assertIn(self.images.path("top"), error.desc)

    def open_and_export(self, daemon, path):
        daemon.add_qcow2("top", path)
        daemon.nbd_server()
        daemon.export("top")
