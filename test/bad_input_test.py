# SPDX-License-Identifier: LGPL-2.1-or-later
"""Wrong commands, options, images and byte streams: each gets an error that names the cause, and the daemon stays up.

The cases are tables; each row becomes a test. A row gives what is sent and a pattern for the sentence that comes back.
"""
import contextlib

import os
import re
import socket
import struct
import subprocess

from harness import DAEMON, MIB, SANITIZER_OPTIONS, SLOWNESS, QmpError, TestCase, nbd_handle
from hostile import BLOCK, COMPRESSED, COPIED, DATA, L1, L2, TABLE, extension, feature_name, qcow2_bytes


def method_name(text):
    return "test_" + re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def rows_become_tests(test_class, rows):
    """One test method for each row (title, …)."""
    for title, *row in rows:
        name = method_name(title)
        assert not hasattr(test_class, name), f"two rows are called {title}"
        setattr(test_class, name, lambda self, row=row: self.check_row(*row))


class Bad(TestCase):
    builds = ("release", "asan")
    time_limit = 30

    def setUp(self):
        super().setUp()
        self.server = self.daemon()

    def assert_still_works(self):
        """The daemon answers, and can still do its work."""
        self.assertTrue(self.server.is_alive(), self.server.stderr())
        self.server.qmp = qmp = self.server.qmp or self.server.connect()
        qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "alive", "size": MIB, "read-zeroes": True})
        qmp.execute("blockdev-del", node_name="alive")


# ---- commands ------------------------------------------------------------------------------------------------------

NULL = {"driver": "null-co", "node-name": "n0", "size": MIB}
BEFORE = [("blockdev-add", NULL)]
SERVER = [("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "s"}}})]
EXPORT = {"type": "nbd", "id": "e0", "node-name": "n0"}

COMMAND_ROWS = [
    # title, commands before, command, arguments, pattern[, error class]
    ("unknown command", [], "no-such-command", {}, r"no-such-command", "CommandNotFound"),
    ("empty command name", [], "", {}, r".", "CommandNotFound"),
    ("missing argument", [], "blockdev-del", {}, r"node-name.*(missing|required)|missing.*node-name"),
    ("unknown argument", [], "blockdev-del", {"node-name": "x", "frob": 1}, r"frob"),
    ("argument of the wrong type", [], "blockdev-del", {"node-name": 5}, r"node-name.*string|string.*node-name"),
    ("null for a string", [], "blockdev-del", {"node-name": None}, r"node-name"),
    ("list for an object", [], "nbd-server-start", {"addr": []}, r"addr"),
    ("unknown union branch", [], "nbd-server-start", {"addr": {"type": "pigeon", "data": {}}}, r"pigeon"),
    ("unknown driver", [], "blockdev-add", {"driver": "qcow9", "node-name": "x"}, r"qcow9"),
    ("missing driver", [], "blockdev-add", {"node-name": "x"}, r"driver"),
    ("option of another driver", [], "blockdev-add", {**NULL, "filename": "x"}, r"filename"),
    ("node without a name", [], "blockdev-add", {"driver": "null-co", "size": MIB}, r"node-name"),
    ("node name taken", BEFORE, "blockdev-add", NULL, r"n0"),
    ("node name not well formed", [], "blockdev-add", {**NULL, "node-name": "1 bad/name"}, r"1 bad/name|[Ii]nvalid node"),
    ("node name too long", [], "blockdev-add", {**NULL, "node-name": "n" * 200}, r"too long|[Ii]nvalid|longer|at most|31"),
    ("negative size", [], "blockdev-add", {**NULL, "size": -1}, r"size|-1"),
    ("size as a fraction", [], "blockdev-add", {**NULL, "size": 1.5}, r"size"),
    ("missing file", [], "blockdev-add", {"driver": "file", "node-name": "f", "filename": "gone"}, r"gone.*No such file"),
    ("directory as a file", [], "blockdev-add", {"driver": "file", "node-name": "f", "filename": "/"}, r"/"),
    ("empty file name", [], "blockdev-add", {"driver": "file", "node-name": "f", "filename": ""}, r"."),
    ("raw over a missing node", [], "blockdev-add", {"driver": "raw", "node-name": "r", "file": "gone"}, r"gone"),
    ("raw offset beyond the end", BEFORE, "blockdev-add",
     {"driver": "raw", "node-name": "r", "file": "n0", "offset": 2 * MIB}, r"offset|size|larger|beyond"),
    ("raw size beyond the end", BEFORE, "blockdev-add",
     {"driver": "raw", "node-name": "r", "file": "n0", "size": 2 * MIB}, r"size|larger|beyond"),
    ("qcow2 over zeroes", BEFORE, "blockdev-add", {"driver": "qcow2", "node-name": "q", "file": "n0"}, r"qcow2"),
    ("child option of the wrong type", [], "blockdev-add", {"driver": "raw", "node-name": "r", "file": 7}, r"file"),
    ("bad child inside", [], "blockdev-add", {"driver": "raw", "node-name": "r", "file": {"driver": "nope"}}, r"nope"),
    ("unknown cache option", [], "blockdev-add", {**NULL, "cache": {"warm": True}}, r"warm"),
    ("unknown discard mode", [], "blockdev-add", {**NULL, "discard": "perhaps"}, r"perhaps"),
    ("deleting a missing node", [], "blockdev-del", {"node-name": "gone"}, r"gone"),
    ("deleting a node in use", BEFORE + [("blockdev-add", {"driver": "raw", "node-name": "r", "file": "n0"})],
     "blockdev-del", {"node-name": "n0"}, r"n0"),
    ("export without a server", BEFORE, "block-export-add", EXPORT, r"NBD server"),
    ("export of a missing node", SERVER, "block-export-add", {**EXPORT, "node-name": "gone"}, r"gone"),
    ("export of an unknown type", BEFORE, "block-export-add", {**EXPORT, "type": "carrier"}, r"carrier"),
    ("export id taken", BEFORE + SERVER + [("block-export-add", EXPORT)], "block-export-add",
     {**EXPORT, "name": "other"}, r"e0"),
    ("export name taken", BEFORE + SERVER + [("block-export-add", EXPORT)], "block-export-add",
     {**EXPORT, "id": "e1"}, r"n0"),
    ("export on a missing I/O thread", BEFORE + SERVER, "block-export-add", {**EXPORT, "iothread": "io9"}, r"io9"),
    ("writable export of a read-only node", [("blockdev-add", {**NULL, "read-only": True})] + SERVER,
     "block-export-add", {**EXPORT, "writable": True}, r"read-only|read only"),
    ("export name too long", BEFORE + SERVER, "block-export-add", {**EXPORT, "name": "x" * 5000}, r"name|long"),
    ("deleting a missing export", [], "block-export-del", {"id": "gone"}, r"gone"),
    ("starting the server twice", SERVER, "nbd-server-start", {"addr": {"type": "unix", "data": {"path": "t"}}}, r"server"),
    ("server on a path that cannot be", [], "nbd-server-start",
     {"addr": {"type": "unix", "data": {"path": "/gone/socket"}}}, r"/gone/socket"),
    ("server on a path too long", [], "nbd-server-start", {"addr": {"type": "unix", "data": {"path": "x" * 200}}}, r"long|108|path"),
    ("server on a bad port", [], "nbd-server-start",
     {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "http://"}}}, r"http://|port"),
    ("stopping no server", [], "nbd-server-stop", {}, r"server"),
    ("commit of a missing device", [], "block-commit", {"device": "gone"}, r"gone", "DeviceNotFound"),
    ("stream of a missing device", [], "block-stream", {"device": "gone"}, r"gone", None),
    ("commit without a backing image", BEFORE, "block-commit", {"device": "n0", "job-id": "j"}, r"n0|base|backing|itself"),
    ("commit to a missing base", BEFORE, "block-commit", {"device": "n0", "job-id": "j", "base-node": "gone"}, r"gone"),
    ("commit with a bad job id", BEFORE, "block-commit", {"device": "n0", "job-id": "1 j"}, r"1 j|job|[Ii]d|itself"),
    ("stream to a missing base", BEFORE, "block-stream", {"device": "n0", "job-id": "j", "base-node": "gone"}, r"gone"),
    ("stream with a negative speed", BEFORE, "block-stream", {"device": "n0", "job-id": "j", "speed": -5}, r"speed"),
    ("stream with base and bottom", BEFORE, "block-stream",
     {"device": "n0", "job-id": "j", "base-node": "n0", "bottom": "n0"}, r"bottom|base"),
    ("pausing a missing job", [], "job-pause", {"id": "gone"}, r"gone|[Jj]ob not found"),
    ("cancelling a missing block job", [], "block-job-cancel", {"device": "gone"}, r"gone", "DeviceNotActive"),
    ("completing a missing job", [], "job-complete", {"id": "gone"}, r"gone|[Jj]ob not found"),
    ("setting the speed of a missing job", [], "block-job-set-speed", {"device": "gone", "speed": 1}, r"gone", "DeviceNotActive"),
    ("negotiating twice", [], "qmp_capabilities", {}, r"[Cc]apabilities|qmp_capabilities", "CommandNotFound"),
]


class Command(Bad):
    def check_row(self, before, command, arguments, pattern, error_class="GenericError"):
        os.chdir(self.directory)
        for name, more in before:
            self.server.qmp.execute(name, more)
        with self.assertRaises(QmpError) as caught:
            self.server.qmp.execute(command, arguments)
        if error_class:
            self.assertEqual(caught.exception.error_class, error_class, str(caught.exception))
        self.assertRegex(caught.exception.desc, pattern)
        self.assert_still_works()


rows_become_tests(Command, COMMAND_ROWS)

# ---- bytes on the monitor ------------------------------------------------------------------------------------------

MONITOR_ROWS = [
    # title, bytes after the negotiation, pattern of the error
    ("garbage", b"hello there\n", r"JSON|parse|[Ii]nvalid|syntax"),
    ("half a document", b'{"execute": "query-jobs"]\n', r"JSON|parse|[Ii]nvalid|syntax|expect"),
    ("a list", b"[1, 2]\n", r"object"),
    ("a bare string", b'"query-jobs"\n', r"object|JSON"),
    ("no execute", b'{"arguments": {}}\n', r"execute"),
    ("execute of the wrong type", b'{"execute": 5}\n', r"execute.*string|string.*execute|string"),
    ("arguments of the wrong type", b'{"execute": "query-jobs", "arguments": []}\n', r"arguments|object"),
    ("an unknown member", b'{"execute": "query-jobs", "frob": 1}\n', r"frob"),
    ("both execute and exec-oob", b'{"execute": "query-jobs", "exec-oob": "query-jobs"}\n', r"exec"),
    ("deep nesting", b'{"execute": "query-jobs", "id": ' + b"[" * 3000 + b"]" * 3000 + b"}\n", r"nest|deep|depth|JSON|limit"),
    ("invalid UTF-8", b'{"execute": "query-\xff\xfe"}\n', r"UTF-8|JSON|[Ii]nvalid|parse|query"),
    ("a control character", b'{"execute": "query\x01jobs"}\n', r"control|JSON|[Ii]nvalid|parse|query"),
    ("a null byte", b'{"execute": "query\x00jobs"}\n', r"JSON|[Ii]nvalid|parse|NUL|null"),
    ("a number out of range", b'{"execute": "block-job-set-speed", "arguments": {"device": "j", "speed": 1e999}}\n',
     r"speed|JSON|number|range|[Ii]nvalid"),
    ("an integer out of range", b'{"execute": "blockdev-add", "arguments": {"size": 18446744073709551616}}\n',
     r"integer|number|size|driver"),
    ("a null byte in a string", b'{"execute": "blockdev-add", "arguments": {"driver": "a\\u0000b", "node-name": "n"}}\n',
     r"\\u0000|driver"),
    ("a duplicate key", b'{"execute": "query-jobs", "execute": "query-jobs"}\n', r"[Dd]uplicate|JSON"),
    ("a surrogate alone", b'{"execute": "\\ud800"}\n', r"[Ss]urrogate|JSON|[Ii]nvalid|unicode|Unicode|parse|not a valid"),
]


class Monitor(Bad):
    def setUp(self):
        super().setUp()
        self.server.qmp.close()
        self.server.qmp = None

    def check_row(self, data, pattern):
        raw = self.server.connect()
        raw.send_raw(data)
        reply = raw.reply()
        self.assertIn("error", reply)
        self.assertRegex(reply["error"]["desc"], pattern)
        raw.close()
        self.assert_still_works()

    def test_monitor_commands_before_negotiation(self):
        raw = self.server.connect(negotiate=False)
        with self.assertRaises(QmpError) as caught:
            raw.execute("query-jobs")
        self.assertEqual(caught.exception.error_class, "CommandNotFound")
        self.assertIn("qmp_capabilities", caught.exception.desc)
        raw.close()
        self.assert_still_works()

    def test_monitor_unknown_capability(self):
        raw = self.server.connect(negotiate=False)
        with self.assertRaises(QmpError) as caught:
            raw.execute("qmp_capabilities", {"enable": ["flying"]})
        self.assertIn("flying", caught.exception.desc)
        raw.close()
        self.assert_still_works()

    def test_monitor_endless_document(self):
        """A document without an end is cut off at a limit instead of filling the memory."""
        raw = self.server.connect()
        with contextlib.suppress(OSError):
            raw.send_raw(b'{"execute": "')
            for _ in range(80):
                raw.send_raw(b"x" * MIB)
        raw.close()
        self.assert_still_works()

    def test_monitor_client_that_never_reads(self):
        raw = self.server.connect()
        raw.socket.settimeout(0.5)
        with contextlib.suppress(OSError):
            for _ in range(3000):
                raw.send_raw(b'{"execute": "query-qmp-schema"}\n')
        raw.close()
        self.assert_still_works()

    def test_monitor_client_that_leaves_in_the_middle(self):
        for cut in range(1, 30, 3):
            raw = self.server.connect()
            raw.send_raw(b'{"execute": "query-named-block-nodes"}\n'[:cut])
            raw.close()
        self.assert_still_works()


rows_become_tests(Monitor, [(f"monitor {title}", *row) for title, *row in MONITOR_ROWS])

# ---- command line --------------------------------------------------------------------------------------------------

NULL_LINE = ["--blockdev", "null-co,node-name=n0,size=1048576"]
LINE_ROWS = [
    # title, options, pattern on stderr
    ("an unknown option", ["--frobnicate"], r"frobnicate"),
    ("a word too many", ["image.qcow2"], r"image\.qcow2"),
    ("an option without its value", ["--blockdev"], r"blockdev.*(argument|value)|(argument|value).*blockdev"),
    ("an unknown driver", ["--blockdev", "qcow9,node-name=x"], r"qcow9"),
    ("a missing file", ["--blockdev", "file,node-name=x,filename=/gone/file"], r"/gone/file.*No such file"),
    ("an unknown key", ["--blockdev", "null-co,node-name=x,frob=1"], r"frob"),
    ("a bad number", ["--blockdev", "null-co,node-name=x,size=lots"], r"lots|size"),
    ("a bad switch", ["--blockdev", "null-co,node-name=x,read-zeroes=maybe"], r"maybe|read-zeroes"),
    ("a key without a value", ["--blockdev", "null-co,node-name"], r"node-name"),
    ("bad JSON", ["--blockdev", '{"driver": "null-co"'], r"JSON|parse|expect|[Ii]nvalid|'}'"),
    ("a key and its sub-key", ["--blockdev", "null-co,node-name=x,cache=1,cache.direct=on"], r"cache"),
    ("an export of a missing node", ["--nbd-server", "addr.type=unix,addr.path=s", "--export", "nbd,id=e,node-name=gone"], r"gone"),
    ("an export without a server", [*NULL_LINE, "--export", "nbd,id=e,node-name=n0"], r"server"),
    ("an unknown export type", ["--export", "carrier,id=e,node-name=gone"], r"carrier"),
    ("an unknown address type", ["--nbd-server", "addr.type=pigeon"], r"pigeon"),
    ("a monitor without its chardev", ["--monitor", "chardev=gone"], r"gone"),
    ("an unknown chardev backend", ["--chardev", "telepathy,id=c"], r"telepathy"),
    ("an unknown object type", ["--object", "unicorn,id=u"], r"unicorn"),
    ("an object without an id", ["--object", "iothread"], r"id"),
    ("the same object twice", ["--object", "iothread,id=a", "--object", "iothread,id=a"], r"\ba\b"),
    ("a pid file that cannot be", ["--pidfile", "/gone/pid"], r"/gone/pid"),
]


class Line(TestCase):
    time_limit = 20

    def check_row(self, options, pattern):
        result = subprocess.run(
            [*DAEMON, *options], cwd=self.directory, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=10 * SLOWNESS, env={**SANITIZER_OPTIONS, **os.environ}, check=False,
        )
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertRegex(result.stderr, pattern)


rows_become_tests(Line, [(f"line {title}", *row) for title, *row in LINE_ROWS])

# ---- images --------------------------------------------------------------------------------------------------------

OPEN_ROWS = [
    # title, the image's bytes, pattern of the refusal to open it
    ("empty", b"", r"qcow2|short|small|magic"),
    ("half a header", qcow2_bytes(length=50), r"qcow2|short|header|read"),
    ("wrong magic", qcow2_bytes(magic=0x514649FA), r"qcow2"),
    ("version 1", qcow2_bytes(version=1), r"version"),
    ("version 4", qcow2_bytes(version=4), r"version"),
    ("clusters of 256 bytes", qcow2_bytes(cluster_bits=8), r"[Cc]luster"),
    ("clusters of 4 MiB", qcow2_bytes(cluster_bits=22), r"[Cc]luster"),
    ("clusters of 2 to the 4 billion", qcow2_bytes(cluster_bits=0xFFFFFFFF), r"[Cc]luster"),
    ("size of 2 to the 63", qcow2_bytes(size=1 << 63), r"size|large|L1"),
    ("size beyond the L1 table", qcow2_bytes(size=1 << 50), r"L1|size|large"),
    ("L1 table of 2 to the 32 entries", qcow2_bytes(l1_size=0xFFFFFFFF), r"L1"),
    ("L1 table not aligned", qcow2_bytes(l1_offset=L1 + 8), r"L1"),
    ("L1 table beyond 63 bits", qcow2_bytes(l1_offset=(1 << 64) - 65536), r"L1"),
    ("L1 table too small", qcow2_bytes(l1_size=0), r"L1"),
    ("refcount table not aligned", qcow2_bytes(table_offset=TABLE + 512), r"[Rr]ef(erence )?count"),
    ("refcount table of no cluster", qcow2_bytes(table_clusters=0), r"[Rr]ef(erence )?count"),
    ("refcount table of 256 TiB", qcow2_bytes(table_clusters=0xFFFFFFFF), r"[Rr]ef(erence )?count"),
    ("refcount table beyond 63 bits", qcow2_bytes(table_offset=(1 << 64) - 65536), r"[Rr]ef(erence )?count"),
    ("refcounts of 128 bits", qcow2_bytes(refcount_order=7), r"[Rr]ef(erence )?count"),
    ("header of 50 bytes", qcow2_bytes(header_length=50), r"[Hh]eader"),
    ("header longer than a cluster", qcow2_bytes(header_length=1 << 20), r"[Hh]eader"),
    ("an unknown feature bit", qcow2_bytes(incompatible=1 << 40), r"40|feature"),
    ("an unknown feature with a name", qcow2_bytes(incompatible=1 << 9, extensions=feature_name(0, 9, b"teleport")), r"teleport"),
    ("an encryption from the future", qcow2_bytes(crypt_method=7), r"crypt"),
    ("backing name longer than allowed", qcow2_bytes(backing=b"b", backing_size=2000), r"[Bb]acking"),
    ("backing name outside the first cluster", qcow2_bytes(backing=b"b", backing_offset=1 << 40), r"[Bb]acking"),
    ("extension longer than the header's cluster", qcow2_bytes(extensions=extension(0xE2792ACA, b"qcow2", 1 << 30)), r"[Ee]xtension"),
    ("snapshots beyond any number", qcow2_bytes(snapshot_count=0xFFFFFFF, snapshot_offset=DATA), r"[Ss]napshot"),
    ("compression of an unknown type", qcow2_bytes(compression=9, incompatible=1 << 3), r"[Cc]ompress"),
    ("a data file that nobody gave", qcow2_bytes(incompatible=1 << 2), r"data.file|external"),
]


class Image(Bad):
    def check_row(self, image, pattern):
        path = self.path("bad.qcow2")
        with open(path, "wb") as out:
            out.write(image)
        self.server.add_file("file", path)
        error = self.assert_refused(
            pattern, self.server.qmp.execute, "blockdev-add", {"driver": "qcow2", "node-name": "bad", "file": "file", "backing": None}
        )
        self.assertNotRegex(error.desc, r"^(Invalid argument|Input/output error)$")
        self.server.qmp.execute("blockdev-del", node_name="file")
        with open(path, "rb") as content:
            self.assertEqual(content.read(), image, "an image that was refused has changed")
        self.assert_still_works()

    def add_by_name(self, path):
        arguments = {"driver": "qcow2", "node-name": "bad", "file": {"driver": "file", "filename": path}}
        self.server.qmp.execute("blockdev-add", arguments)

    def test_image_that_backs_itself(self):
        path = self.path("self.qcow2")
        with open(path, "wb") as out:
            out.write(qcow2_bytes(backing=b"self.qcow2", extensions=extension(0xE2792ACA, b"qcow2")))
        self.assert_refused(r"loop|leads back|itself|deep|lock|long|too many", self.add_by_name, path)
        self.assert_still_works()

    def test_images_that_back_each_other(self):
        for name, below in (("a.qcow2", b"b.qcow2"), ("b.qcow2", b"a.qcow2")):
            with open(self.path(name), "wb") as out:
                out.write(qcow2_bytes(backing=below, extensions=extension(0xE2792ACA, b"qcow2")))
        self.assert_refused(r"loop|leads back|itself|deep|lock|long|too many", self.add_by_name, self.path("a.qcow2"))
        self.assert_still_works()

    def test_backing_image_that_is_missing(self):
        path = self.path("over.qcow2")
        with open(path, "wb") as out:
            out.write(qcow2_bytes(backing=b"gone.qcow2", extensions=extension(0xE2792ACA, b"qcow2")))
        self.assert_refused(r"gone\.qcow2", self.add_by_name, path)
        self.assert_still_works()

    def test_backing_image_of_an_unknown_format(self):
        path = self.path("over.qcow2")
        with open(path, "wb") as out:
            out.write(qcow2_bytes(backing=b"gone.img", extensions=extension(0xE2792ACA, b"qcow9")))
        self.assert_refused(r"qcow9|gone", self.add_by_name, path)
        self.assert_still_works()

    def test_image_marked_corrupt_opens_for_reading_only(self):
        path = self.path("corrupt.qcow2")
        with open(path, "wb") as out:
            out.write(qcow2_bytes(incompatible=1 << 1))
        self.assert_refused(r"corrupt", self.server.add_qcow2, "q", path)
        self.assert_still_works()


rows_become_tests(Image, [(f"image {title}", *row) for title, *row in OPEN_ROWS])

# Images that open, or perhaps not, and whose tables lie: nothing may be written where the header or another table is.
LYING_ROWS = [
    ("L2 table in the header", qcow2_bytes(words={L1: 0 | COPIED | 1 << 40})),
    ("L2 table not aligned", qcow2_bytes(words={L1: (L2 + 512) | COPIED})),
    ("L2 table beyond the end", qcow2_bytes(words={L1: (1 << 45) | COPIED})),
    ("L2 table is the L1 table", qcow2_bytes(words={L1: L1 | COPIED})),
    ("L2 table is the refcount table", qcow2_bytes(words={L1: TABLE | COPIED})),
    ("L2 table is the refcount block", qcow2_bytes(words={L1: BLOCK | COPIED})),
    ("data in the header", qcow2_bytes(words={L2: 0 | COPIED | 1 << 40, L2 + 8: 1 | COPIED})),
    ("data in the L1 table", qcow2_bytes(words={L2: L1 | COPIED})),
    ("data in the refcount table", qcow2_bytes(words={L2: TABLE | COPIED})),
    ("data in the refcount block", qcow2_bytes(words={L2: BLOCK | COPIED})),
    ("data in the L2 table", qcow2_bytes(words={L2: L2 | COPIED})),
    ("data not aligned", qcow2_bytes(words={L2: (DATA + 512) | COPIED})),
    ("data beyond the end", qcow2_bytes(words={L2: (1 << 45) | COPIED})),
    ("compressed data beyond the end", qcow2_bytes(words={L2: COMPRESSED | (1 << 45)})),
    ("compressed data that is garbage", qcow2_bytes(words={L2: COMPRESSED | (3 << 54) | DATA})),
    ("refcount block not aligned", qcow2_bytes(words={TABLE: BLOCK + 512})),
    ("refcount block in the header", qcow2_bytes(words={TABLE: 1})),
    ("refcount block beyond the end", qcow2_bytes(words={TABLE: 1 << 45})),
    ("refcount block is the L1 table", qcow2_bytes(words={TABLE: L1})),
    ("refcount table of nothing", qcow2_bytes(words={TABLE: 0})),
    ("refcounts all zero", qcow2_bytes(refcounts=[0] * 6)),
    ("refcounts of the tables zero", qcow2_bytes(refcounts=[1, 0, 0, 0, 0, 1])),
    ("refcounts at their largest", qcow2_bytes(refcounts=[0xFFFF] * 6)),
    ("refcount table that is the header", qcow2_bytes(table_offset=0)),
    ("L1 table that is the header", qcow2_bytes(l1_offset=0)),
    ("L1 table that is the refcount table", qcow2_bytes(l1_offset=TABLE)),
]


class Lying(Bad):
    def check_row(self, image):
        """Every kind of request gets an answer, and the header stays whole but for its feature bits."""
        path = self.path("lying.qcow2")
        with open(path, "wb") as out:
            out.write(image)
        try:
            self.server.add_qcow2("lying", path, discard="unmap")
            opened = True
        except QmpError as refusal:
            opened = False
            self.assertRegex(refusal.desc, r"[Rr]efcount|L1|L2|[Cc]luster|[Oo]ffset|overlap|align|corrupt|reference count")
        if opened:
            self.server.nbd_server()
            self.server.export("lying")
            with nbd_handle(self.server.uri("lying")) as handle:
                self.exercise(handle)
            self.server.qmp.execute("query-named-block-nodes")
        self.assert_still_works()
        self.server.stop()
        with open(path, "rb") as content:
            header = content.read(104)
        self.assertEqual(header[:48], image[:48], "the header was overwritten")
        self.assertEqual(header[60:72], image[60:72], "the header was overwritten")

    def exercise(self, handle):
        import nbd

        requests = [
            lambda: handle.pread(65536, 0),
            lambda: handle.pwrite(b"w" * 4096, 4096),
            lambda: handle.pwrite(b"w" * 512, 65536 * 3),
            lambda: handle.zero(65536, 0),
            lambda: handle.trim(131072, 0),
            lambda: handle.pwrite(b"x" * 65536, 65536),
            lambda: handle.pread(65536, 65536),
            lambda: handle.pwrite(b"y" * 1048576, 1048576),
            handle.flush,
            lambda: handle.pread(1048576, 0),
        ]
        for request in requests:
            with contextlib.suppress(nbd.Error):
                request()


rows_become_tests(Lying, [(f"lying {title}", *row) for title, *row in LYING_ROWS])

# ---- NBD byte streams ----------------------------------------------------------------------------------------------

I_HAVE_OPT = 0x49484156454F5054
OPT_REPLY = 0x3E889045565A9
REQUEST = 0x25609513
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (0x80000000 + n for n in (1, 3, 6, 9))
EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 6, 7, 8, 9, 10


class Stream:
    """A raw NBD connection, to say wrong things on."""

    def __init__(self, path, flags=3):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10 * SLOWNESS)
        self.socket.connect(path)
        greeting = self.receive(18)
        assert greeting[:16] == b"NBDMAGICIHAVEOPT", greeting
        if flags is not None:
            self.send(struct.pack(">I", flags))

    def send(self, data):
        self.socket.sendall(data)

    def receive(self, size):
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def is_closed(self):
        """Whether the server hangs up, whatever it says before."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(65536):
                pass
        return True

    def option(self, option, data=b"", length=None):
        self.send(struct.pack(">QII", I_HAVE_OPT, option, len(data) if length is None else length) + data)

    def option_reply(self, option):
        magic, answered, kind, length = struct.unpack(">QIII", self.receive(20))
        assert (magic, answered) == (OPT_REPLY, option), (hex(magic), answered)
        return kind, self.receive(length)

    def last_option_reply(self, option):
        while True:
            kind, data = self.option_reply(option)
            if kind not in (REP_INFO, REP_SERVER, 4):
                return kind, data

    def go(self, name=b"disk"):
        self.option(GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        kind, _ = self.last_option_reply(GO)
        assert kind == REP_ACK, hex(kind)

    def request(self, kind, offset, length, data=b"", flags=0, magic=REQUEST):
        self.send(struct.pack(">IHHQQI", magic, flags, kind, 0x1122334455667788, offset, length) + data)

    def reply_error(self):
        """The error of a simple reply."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert (magic, cookie) == (0x67446698, 0x1122334455667788), hex(magic)
        return error


class Nbd(Bad):
    SIZE = MIB

    def setUp(self):
        super().setUp()
        self.server.qmp.execute(
            "blockdev-add", {"driver": "null-co", "node-name": "disk", "size": self.SIZE, "read-zeroes": True}
        )
        self.server.nbd_server()
        self.server.export("disk")
        self.addCleanup(self.check_service)

    def stream(self, **more):
        return Stream(self.server.nbd_path, **more)

    def check_service(self):
        """Whatever was said, the next client is served."""
        with nbd_handle(self.server.uri("disk")) as handle:
            self.assertEqual(handle.pread(512, 0), bytes(512))
        self.assert_still_works()

    def test_nbd_unknown_client_flags(self):
        self.assertTrue(self.stream(flags=0xFFFFFFFF).is_closed())

    def test_nbd_garbage_for_an_option(self):
        stream = self.stream()
        stream.send(b"GET / HTTP/1.1\r\n\r\n" * 4)
        self.assertTrue(stream.is_closed())

    def test_nbd_unknown_option_is_refused_by_code(self):
        stream = self.stream()
        stream.option(4242, b"abc")
        self.assertEqual(stream.option_reply(4242)[0], ERR_UNSUP)
        stream.go()

    def test_nbd_option_of_4_gib(self):
        stream = self.stream()
        stream.option(GO, b"x" * 100, length=0xFFFFFFFF)
        stream.socket.shutdown(socket.SHUT_WR)
        self.assertTrue(stream.is_closed())

    def test_nbd_name_longer_than_its_option(self):
        stream = self.stream()
        stream.option(GO, struct.pack(">I", 1000) + b"disk" + struct.pack(">H", 0))
        self.assertEqual(stream.option_reply(GO)[0], ERR_INVALID)
        stream.go()

    def test_nbd_option_too_short(self):
        stream = self.stream()
        stream.option(GO, b"\0")
        self.assertEqual(stream.option_reply(GO)[0], ERR_INVALID)
        stream.go()

    def test_nbd_more_info_requests_than_said(self):
        stream = self.stream()
        stream.option(GO, struct.pack(">I", 4) + b"disk" + struct.pack(">HH", 500, 3))
        self.assertEqual(stream.option_reply(GO)[0], ERR_INVALID)
        stream.go()

    def test_nbd_unknown_export(self):
        stream = self.stream()
        stream.option(GO, struct.pack(">I", 4) + b"gone" + struct.pack(">H", 0))
        kind, text = stream.last_option_reply(GO)
        self.assertEqual(kind, ERR_UNKNOWN)
        self.assertIn(b"gone", text)
        stream.go()

    def test_nbd_unknown_export_the_old_way(self):
        stream = self.stream()
        stream.option(EXPORT_NAME, b"gone")
        self.assertTrue(stream.is_closed())

    def test_nbd_export_name_too_long(self):
        stream = self.stream()
        name = b"x" * 5000
        stream.option(GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        with contextlib.suppress(EOFError, ConnectionError):
            self.assertGreater(stream.option_reply(GO)[0], 0x80000000)

    def test_nbd_list_with_data(self):
        stream = self.stream()
        stream.option(LIST, b"surprise")
        self.assertEqual(stream.option_reply(LIST)[0], ERR_INVALID)
        stream.go()

    def test_nbd_structured_replies_with_data(self):
        stream = self.stream()
        stream.option(STRUCTURED, b"surprise")
        self.assertEqual(stream.option_reply(STRUCTURED)[0], ERR_INVALID)
        stream.go()

    def test_nbd_meta_context_without_structured_replies(self):
        stream = self.stream()
        stream.option(SET_META, struct.pack(">I", 4) + b"disk" + struct.pack(">I", 0))
        self.assertEqual(stream.last_option_reply(SET_META)[0], ERR_INVALID)
        stream.go()

    def test_nbd_meta_context_with_lying_lengths(self):
        stream = self.stream()
        stream.option(STRUCTURED)
        stream.option_reply(STRUCTURED)
        for data in (
            struct.pack(">I", 4) + b"disk" + struct.pack(">I", 0xFFFFFFFF),
            struct.pack(">I", 4) + b"disk" + struct.pack(">II", 1, 0xFFFFFFF0) + b"base:allocation",
            struct.pack(">I", 0xFFFFFFFC) + b"disk",
        ):
            stream.option(SET_META, data)
            self.assertEqual(stream.last_option_reply(SET_META)[0], ERR_INVALID)

    def test_nbd_hundred_thousand_options(self):
        stream = self.stream()
        with contextlib.suppress(OSError, EOFError):
            for _ in range(1000):
                for _ in range(100):
                    stream.option(4242)
                for _ in range(100):
                    stream.option_reply(4242)

    def test_nbd_client_that_says_nothing(self):
        quiet = [self.stream(flags=None) for _ in range(20)]
        self.check_service()
        for stream in quiet:
            stream.socket.close()

    def test_nbd_request_with_wrong_magic(self):
        stream = self.stream()
        stream.go()
        stream.request(0, 0, 512, magic=0xDEADBEEF)
        self.assertTrue(stream.is_closed())

    def test_nbd_read_beyond_the_end(self):
        stream = self.stream()
        stream.go()
        for offset, length in ((self.SIZE, 512), (self.SIZE - 256, 512), (1 << 63, 512), ((1 << 64) - 512, 1024)):
            stream.request(0, offset, length)
            self.assertEqual(stream.reply_error(), 22, (offset, length))

    def test_nbd_write_beyond_the_end(self):
        stream = self.stream()
        stream.go()
        stream.request(1, self.SIZE - 256, 512, b"x" * 512)
        self.assertIn(stream.reply_error(), (22, 28))
        stream.request(0, 0, 512)
        self.assertEqual(stream.reply_error(), 0)

    def test_nbd_zero_and_trim_beyond_the_end(self):
        stream = self.stream()
        stream.go()
        for kind in (4, 6, 5):
            stream.request(kind, self.SIZE, 0xFFFFFE00)
            self.assertIn(stream.reply_error(), (22, 28), kind)

    def test_nbd_read_of_4_gib(self):
        stream = self.stream()
        stream.go()
        stream.request(0, 0, 0xFFFFFFFF)
        with contextlib.suppress(EOFError):
            self.assertIn(stream.reply_error(), (22, 75))

    def test_nbd_write_of_4_gib(self):
        stream = self.stream()
        stream.go()
        stream.request(1, 0, 0xFFFFFFFF, b"x" * 4096)
        stream.socket.shutdown(socket.SHUT_WR)
        self.assertTrue(stream.is_closed())

    def test_nbd_unknown_command(self):
        stream = self.stream()
        stream.go()
        stream.request(99, 0, 0)
        self.assertEqual(stream.reply_error(), 22)
        stream.request(0, 0, 512)
        self.assertEqual(stream.reply_error(), 0)

    def test_nbd_unknown_command_flags(self):
        stream = self.stream()
        stream.go()
        stream.request(0, 0, 512, flags=0x8000)
        self.assertEqual(stream.reply_error(), 22)

    def test_nbd_block_status_without_a_context(self):
        stream = self.stream()
        stream.go()
        stream.request(7, 0, 512)
        self.assertEqual(stream.reply_error(), 22)

    def test_nbd_client_that_leaves_inside_a_write(self):
        for sent in (0, 1, 100, 60000):
            stream = self.stream()
            stream.go()
            stream.request(1, 0, 65536, b"x" * sent)
            stream.socket.close()

    def test_nbd_client_that_never_reads(self):
        stream = self.stream()
        stream.go()
        stream.socket.settimeout(0.5)
        with contextlib.suppress(OSError):
            for _ in range(20000):
                stream.request(0, 0, 65536)
        self.check_service()
        stream.socket.close()

    def test_nbd_client_that_leaves_with_requests_under_way(self):
        for _ in range(10):
            stream = self.stream()
            stream.go()
            for _ in range(50):
                stream.request(0, 0, 65536)
            stream.socket.close()

    def test_nbd_random_bytes(self):
        """Valid beginnings with random ends, many of them."""
        for _ in range(150):
            stream = self.stream(flags=self.random.choice([0, 1, 2, 3]))
            with contextlib.suppress(OSError, EOFError, AssertionError):
                if self.random.random() < 0.5:
                    stream.go()
                    for _ in range(self.random.randrange(4)):
                        stream.request(self.random.randrange(10), self.random.randrange(1 << 21), self.random.randrange(1 << 17))
                stream.send(self.random.randbytes(self.random.randrange(1, 400)))
            stream.socket.close()
