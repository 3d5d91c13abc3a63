# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs that copy, snapshot and make images: what they do, leave behind, print and answer; at the peer's daemon too.

Each test of `Both` runs with Interlock and with the peer, since the verbs speak plain QMP; what needs access control is
in `Verbs`, and that the peer has none is told by the verbs themselves (`WithPeer`)."""
import contextlib
import json
import os
import pty
import re
import signal
import subprocess

from harness import IS_PEER, KIB, MIB, PEER, PROGRAM, SANITIZER_OPTIONS, SLOWNESS, TestCase
from harness import image_compare, qemu_img, qemu_io, run

SLOW = 64 * KIB


class VerbCase(TestCase):
    builds = ("release", "asan")
    time_limit = 40
    command = None

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("what is tested is the client")
        self.chain = self.create_chain(["base", "top"], 8 * MIB)
        qemu_io(self.chain[1][1], "write -q -P 2 4M 2M")
        # A monitor serves one client at a time, as the peer's: one for the verbs, one for the test.
        chardev = f"socket,id=verbs,path={self.path('verbs')},server=on,wait=off"
        self.server = self.daemon("--chardev", chardev, "--monitor", "chardev=verbs", command=self.command)
        self.server.add_chain(self.chain)
        self.environment = {**SANITIZER_OPTIONS, **os.environ, "INTERLOCK_QMP": self.path("verbs")}
        os.mkdir(self.path("out"))

    def start(self, *words):
        return subprocess.Popen([PROGRAM, *words], cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def read_until(self, running, pattern):
        """The first line of output with the pattern in it."""
        lines = []
        while not re.search(pattern, line := running.stdout.readline()):
            self.assertTrue(line, f"ended with {running.poll()}: {lines}")
            lines.append(line)
        return line

    def interlock(self, *words, status=0):
        running = self.start(*words)
        text = running.communicate(timeout=20 * SLOWNESS)[0]
        self.assertEqual(running.returncode, status, f"{words}: {text}")
        return text

    def nodes(self):
        return {info["node-name"] for info in self.server.qmp.execute("query-named-block-nodes", {"flat": True})}

    def made(self):
        return sorted(os.listdir(self.path("out")))

    def state(self):
        """All that a verb could leave behind."""
        return self.nodes(), sorted(self.server.qmp.jobs()), self.made()

    def compare(self, name, node="top"):
        """The file, closed by the daemon, has what the node shows now."""
        kind = "raw" if name.endswith("raw") else "qcow2"
        image_compare(self.path(f"{node}.qcow2"), self.path(name), second_format=kind)


class Both:
    """The same with both daemons."""

    def test_mirror_makes_a_copy_and_closes_it(self):
        before = self.nodes()
        text = self.interlock("mirror", "top", "--to", "out/copy.qcow2")
        self.assertIn("made", text)
        self.assertIn("mirror-top: done", text)
        self.assertEqual(self.nodes(), before)
        self.assertEqual(self.server.qmp.jobs(), {})
        self.compare_top("out/copy.qcow2")

    def compare_top(self, name):
        self.server.stop()
        self.compare(name)

    def test_mirror_with_replace_moves_the_users(self):
        self.server.nbd_server()
        self.server.export("top")
        self.interlock("mirror", "top", "--to", "out/disk.qcow2", "--replace", "--node-name", "disk")
        self.assertEqual(self.server.qmp.execute("query-block-exports")[0]["node-name"], "disk")
        self.assertIn("disk", self.nodes())
        self.compare_top("out/disk.qcow2")

    def test_mirror_can_be_kept_ready(self):
        text = self.interlock("mirror", "top", "--to", "out/copy.qcow2", "--keep-ready", "--job-id=m")
        for words in ("m: ready", "interlock job complete m", "interlock job cancel m", "interlock close copy"):
            self.assertIn(words, text)
        self.assertEqual(self.server.qmp.jobs()["m"]["status"], "ready")
        self.interlock("job", "change", "m", "--copy-mode=write-blocking")
        self.interlock("job", "cancel", "m")
        self.assertIsNone(self.server.qmp.wait_job("m"))
        self.interlock("close", "copy")
        self.compare_top("out/copy.qcow2")

    def test_mirror_of_the_upper_image_alone_leans_on_what_is_below(self):
        self.interlock("mirror", "top", "--to", "out/upper.qcow2", "--sync=top")
        self.server.stop()
        info = json.loads(qemu_img("info", "--output=json", self.path("out/upper.qcow2")))
        self.assertEqual(info["backing-filename"], self.path("base.qcow2"))
        self.compare("out/upper.qcow2")

    def test_backups_of_several_are_one_transaction(self):
        before = self.nodes()
        text = self.interlock("backup", "top=out/one.qcow2", "base=out/two.raw")
        self.assertIn("backup-top: done", text)
        self.assertIn("backup-base: done", text)
        self.assertEqual(self.nodes(), before)
        self.server.stop()
        self.compare("out/one.qcow2")
        self.compare("out/two.raw", "base")

    def test_backups_of_several_all_or_none(self):
        before = self.state()
        text = self.interlock("backup", "top=out/one.qcow2", "base=top", status=1)
        self.assertIn("interlock backup: ", text)
        self.assertEqual(self.state(), before)

    def test_two_backups_of_one_node_at_once(self):
        for name in ("one", "two"):
            text = self.interlock("backup", "top", "--to", f"out/{name}.qcow2", "--speed", str(SLOW), "--async")
            self.assertIn(f"interlock close {name}", text)
        self.assertEqual(sorted(self.server.qmp.jobs()), ["backup-top", "backup-top-2"])
        self.interlock("job", "set-speed", "backup-top-2", "128k")
        speeds = {job["device"]: job["speed"] for job in self.server.qmp.execute("query-block-jobs")}
        self.assertEqual(speeds, {"backup-top": SLOW, "backup-top-2": 128 * KIB})
        waiting = self.start("job", "wait", "backup-top", "backup-top-2")
        self.assertIn("backup", waiting.stdout.readline())
        for job in speeds:
            self.server.qmp.execute("block-job-set-speed", device=job, speed=0)
        text = waiting.communicate(timeout=20 * SLOWNESS)[0]
        self.assertIn("backup-top: done", text)
        self.assertIn("backup-top-2: done", text)
        self.assertEqual(waiting.returncode, 0)
        self.interlock("close", "one", "two")
        self.server.stop()
        self.compare("out/one.qcow2")
        self.compare("out/two.qcow2")

    def test_an_incremental_backup_follows_a_full_one(self):
        self.interlock("bitmap", "add", "top", "since", "--granularity=64k")
        self.interlock("backup", "top", "--to", "out/full.qcow2")
        self.server.nbd_server()
        self.server.export("top")
        qemu_io(self.server.uri("top"), "write -q -P 9 1M 128k", image_format="raw")
        self.assertRegex(self.interlock("bitmap", "list", "top"), r"since +128 KiB dirty, by 64 KiB")
        more = ["--bitmap=since", "--backing=out/full.qcow2", "--backing-format=qcow2"]
        self.interlock("backup", "top", "--to", "out/second.qcow2", *more)
        self.assertRegex(self.interlock("bitmap", "list", "top"), r"since +0 B dirty")
        self.server.stop()
        self.compare("out/second.qcow2")
        self.assertLess(os.path.getsize(self.path("out/second.qcow2")), MIB)

    def test_a_compressed_backup(self):
        self.interlock("backup", "top", "--to", "out/small.qcow2", "--compress")
        self.server.stop()
        self.compare("out/small.qcow2")
        self.assertLess(os.path.getsize(self.path("out/small.qcow2")), MIB)

    def test_snapshots_of_several(self):
        self.interlock("snapshot", "top=out/over.qcow2")
        self.assertIn("over", self.nodes())
        self.server.nbd_server()
        self.server.export("over")
        qemu_io(self.server.uri("over"), "read -q -P 2 4M 2M", "write -q -P 7 0 64k", image_format="raw")
        self.server.stop()
        info = json.loads(qemu_img("info", "--output=json", self.path("out/over.qcow2")))
        self.assertEqual(info["backing-filename"], self.path("top.qcow2"))
        qemu_io(self.path("out/over.qcow2"), "read -q -P 7 0 64k", "read -q -P 2 4M 2M")

    def test_bitmaps_have_their_verbs(self):
        self.interlock("bitmap", "add", "top", "a", "b", "--persistent", "--disabled")
        text = self.interlock("bitmap", "list", "top")
        self.assertEqual(text.count("disabled, persistent"), 2)
        self.interlock("bitmap", "enable", "top", "a", "b")
        self.assertNotIn("disabled", self.interlock("bitmap"))
        self.interlock("bitmap", "disable", "top", "b")
        self.interlock("bitmap", "add", "base", "c")
        self.interlock("bitmap", "merge", "top", "a", "b")
        self.interlock("bitmap", "merge", "top", "a", "c", "--from=base")
        self.interlock("bitmap", "clear", "top", "a")
        self.interlock("bitmap", "remove", "base", "c")
        before = self.interlock("bitmap", "list")
        self.interlock("bitmap", "remove", "top", "a", "gone", status=1)  # both or none
        self.assertEqual(self.interlock("bitmap", "list"), before)
        self.interlock("bitmap", "remove", "top", "a", "b")
        self.assertIn("no bitmaps", self.interlock("bitmap", "list"))

    def test_images_are_made(self):
        self.interlock("create", "out/a.qcow2", "1G", "-o", "cluster-size=131072")
        self.interlock("create", "out/b.raw", "4M", "-o", "preallocation=full")
        text = self.interlock("create", "out/a.qcow2", "1G", status=1)
        self.assertIn("is there already", text)
        text = self.interlock("create", "gone/c.qcow2", "1G", status=1)
        self.assertIn("No such file", text)
        self.interlock("create", "out/d.qcow2", "1G", "-o", "cluster-size=3", status=1)
        self.assertEqual(self.made(), ["a.qcow2", "b.raw"])
        self.assertEqual(self.server.qmp.jobs(), {})
        info = json.loads(qemu_img("info", "--output=json", self.path("out/a.qcow2")))
        self.assertEqual((info["virtual-size"], info["cluster-size"]), (1024 * MIB, 131072))
        self.assertGreaterEqual(os.stat(self.path("out/b.raw")).st_blocks * 512, 4 * MIB)

    def test_a_size_may_be_relative_and_shrinks_only_when_told(self):
        self.interlock("resize", "top", "+1M")
        text = self.interlock("resize", "top", "8M", status=1)
        self.assertIn("--shrink", text)
        self.interlock("resize", "top", "8M", "--shrink")
        self.interlock("resize", "top", "much", status=1)

    def test_what_exists_is_not_written_over(self):
        with open(self.path("out/mine.qcow2"), "wb") as mine:
            mine.write(b"mine")
        before = self.state()
        for verb in ("mirror", "backup", "snapshot"):
            self.assertIn("is there already", self.interlock(verb, "top", "--to", "out/mine.qcow2", status=1))
        self.assertEqual(self.state(), before)
        with open(self.path("out/mine.qcow2"), "rb") as mine:
            self.assertEqual(mine.read(), b"mine")

    def test_an_existing_file_can_be_written_to_on_request(self):
        self.interlock("create", "out/there.qcow2", "8M")
        self.assertIn("--format", self.interlock("backup", "top", "--to", "out/there.qcow2", "--existing", status=1))
        self.interlock("backup", "top", "--to", "out/there.qcow2", "--existing", "--format=qcow2")
        self.compare_top("out/there.qcow2")

    def test_a_refused_start_leaves_nothing(self):
        before = self.state()
        for verb in ("mirror", "backup"):
            text = self.interlock(verb, "top", "--to", "out/x.qcow2", "--arg", "no-such-thing=1", status=1)
            self.assertIn("no-such-thing", text)
            self.assertIn("removed", text)
            self.assertEqual(self.state(), before)

    def test_a_cancelled_copy_is_no_success_and_leaves_nothing(self):
        before = self.state()
        running = self.start("backup", "top", "--to", "out/x.qcow2", "--speed", str(SLOW), "--job-id=b")
        self.server.qmp.wait_event("JOB_STATUS_CHANGE", id="b", status="running")
        self.server.qmp.execute("block-job-cancel", device="b", force=True)
        text = running.communicate(timeout=20 * SLOWNESS)[0]
        self.assertEqual(running.returncode, 1, text)
        self.assertIn("b: cancelled", text)
        self.assertEqual("what it wrote to is partial" in text, not self.command, text)
        self.assertEqual(self.state(), before)

    def test_an_interrupt_leaves_the_job_running_and_says_how_to_go_on(self):
        running = self.start("backup", "top", "--to", "out/x.qcow2", "--speed", str(SLOW), "--job-id=b")
        self.read_until(running, "backup b:")
        running.send_signal(signal.SIGINT)
        text = running.communicate(timeout=20 * SLOWNESS)[0]
        self.assertEqual(running.returncode, 130, text)
        for words in ("interlock job wait b", "interlock job cancel b", "interlock close x"):
            self.assertIn(words, text)
        self.assertIn("b", self.server.qmp.jobs())
        self.interlock("job", "set-speed", "b", "0")
        self.assertIsNone(self.server.qmp.wait_job("b"))

    def test_a_pause_is_shown_with_its_reason(self):
        self.server.qmp.execute("blockdev-add", {
            "driver": "qcow2", "node-name": "bad", "backing": None, "file": {
                "driver": "blkdebug", "image": {"driver": "file", "filename": self.create_image("bad.qcow2", 8 * MIB)},
                "inject-error": [{"event": "write_aio", "errno": 28, "once": True}]}})
        running = self.start("backup", "top", "--to", "bad", "--on-error=stop", "--job-id=b")
        self.read_until(running, "paused: no space left")
        self.server.qmp.execute("block-job-resume", device="b")
        text = running.communicate(timeout=20 * SLOWNESS)[0]
        self.assertEqual(running.returncode, 0, text)
        self.interlock("close", "bad")
        self.compare_top("bad.qcow2")

    def test_a_terminal_shows_a_bar(self):
        ours, theirs = pty.openpty()
        line = [PROGRAM, "backup", "top", "--to", "out/x.qcow2", "--speed=8M"]
        with subprocess.Popen(line, cwd=self.directory, env=self.environment, stdin=theirs, stdout=theirs) as running:
            os.close(theirs)
            text = b""
            with contextlib.suppress(OSError):  # the terminal is gone when nobody has it open any more
                while data := os.read(ours, 4096):
                    text += data
            os.close(ours)
            self.assertEqual(running.wait(20 * SLOWNESS), 0)
        self.assertRegex(text.decode(), r"backup backup-top \[#*\.*\] +\d+ %  .*B/s  \S+ left  running")
        self.assertIn(b"backup-top: done", text)

    def test_wrong_use_is_explained(self):
        before = self.state()
        rows = [
            (["mirror"], "NODE"),
            (["mirror", "top"], "--to"),
            (["mirror", "gone", "--to", "out/x.qcow2"], "no node 'gone'"),
            (["mirror", "top", "--to", "gone"], "./gone"),
            (["mirror", "top", "--to", "base", "--format=raw"], "base"),
            (["mirror", "top", "--to", "top"], "into itself"),
            (["backup", "top", "base", "--to", "out/x.qcow2"], "for each"),
            (["backup", "top=out/x.qcow2", "--to", "out/y.qcow2"], "for each"),
            (["backup", "top", "--to", "out/x.vmdk", "--format=vmdk"], "vmdk"),
            (["backup", "top", "--to", "out/x.raw", "--sync=top"], "raw"),
            (["backup", "top", "--to", "out/x.qcow2", "--sync=frob"], "frob"),
            (["backup", "top", "--to", "out/x.qcow2", "--bitmap=gone"], "gone"),
            (["backup", "top", "--to", "out/x.qcow2", "--speed=fast"], "fast"),
            (["backup", "top", "--to", "out/x.qcow2", "--wait", "--async"], "--async"),
            (["backup", "top", "--to", "gone/x.qcow2"], "No such file"),
            (["snapshot", "top", "--delete"], "--internal"),
            (["snapshot", "top", "--to", "out/x.raw"], "raw"),
            (["bitmap", "frob"], "frob"),
            (["bitmap", "add", "top"], "name"),
            (["bitmap", "merge", "top", "a"], "SOURCE"),
            (["bitmap", "clear", "top", "gone"], "gone"),
            (["create", "out/x.qcow2"], "SIZE"),
            (["create", "out/x.qcow2", "big"], "big"),
            (["resize", "top"], "SIZE"),
            (["close", "gone"], "gone"),
            (["close"], "nodes"),
            (["amend", "top"], "KEY=VALUE"),
            (["job", "set-speed", "gone"], "BYTES"),
            (["job", "change", "gone", "--copy-mode=background"], "gone"),
            (["mirror", "top", "--to", "out/x.qcow2", "--queue-timeout=3"], "--queue"),
        ]
        for words, pattern in rows:
            with self.subTest(words=words):
                self.assertIn(pattern.lower(), self.interlock(*words, status=1).lower())
        self.assertEqual(self.state(), before)


class WithPeer(Both, VerbCase):
    builds = ("release",)
    command = [PEER]

    def test_what_needs_access_control_is_told(self):
        before = self.state()
        for option in ("--queue", "--dry-run"):
            text = self.interlock("backup", "top", "--to", "out/x.qcow2", option, status=1)
            self.assertIn(f"{option} needs Interlock", text)
        self.assertIn("needs Interlock", self.interlock("mirror", "top", "--to", "out/x.qcow2", "--sync=none", status=1))
        self.assertEqual(self.state(), before)


class Help(TestCase):
    def test_every_verb_has_its_help(self):
        verbs = "commit stream mirror backup snapshot bitmap create amend resize close job".split()
        whole = run(PROGRAM, "--help").stdout
        for verb in verbs:
            text = run(PROGRAM, verb, "--help").stdout
            self.assertIn(f"interlock {verb}", text)
            self.assertIn(f"\n  {verb} ", whole)


class Verbs(Both, VerbCase):
    def test_a_dry_run_changes_nothing(self):
        rows = [
            ["commit", "top"],
            ["stream", "top"],
            ["mirror", "top", "--to", "out/x.qcow2"],
            ["mirror", "top", "--to", "out/x.qcow2", "--replace", "--copy-mode=write-blocking"],
            ["backup", "top", "--to", "out/x.qcow2"],
            ["backup", "top=out/x.qcow2", "base=out/y.qcow2"],
            ["snapshot", "top", "--to", "out/x.qcow2"],
            ["snapshot", "top=out/x.qcow2"],
            ["bitmap", "add", "top", "b"],
            ["resize", "top", "+1M"],
            ["create", "out/x.qcow2", "1M"],
        ]
        before = self.state()
        contents = {path: open(path, "rb").read() for _, path in self.chain}
        for words in rows:
            with self.subTest(words=words):
                text = self.interlock(*words, "--dry-run")
                self.assertIn("admitted", text)
                self.assertEqual("would make" in text, any("out/" in word for word in words), text)
                self.assertEqual(self.state(), before)
        for path, content in contents.items():
            with open(path, "rb") as now:
                self.assertEqual(now.read(), content)

    def test_a_dry_run_tells_of_a_refusal(self):
        self.interlock("stream", "top", "--speed", str(SLOW), "--async", "--job-id=pull")
        before = self.state()
        text = self.interlock("commit", "top", "--dry-run", status=1)
        self.assertIn("refused", text)
        self.assertIn("pull", text)
        self.assertIn("gone", self.interlock("commit", "top", "--into=gone", "--dry-run", status=1))
        self.assertEqual(self.state(), before)

    def test_a_refused_operation_takes_its_file_back(self):
        self.interlock("commit", "top", "--speed", str(SLOW), "--async", "--job-id=down")
        before = self.state()
        text = self.interlock("backup", "base", "--to", "out/x.qcow2", status=1)
        for words in ("down", "node 'base'", "removed"):
            self.assertIn(words, text)
        self.assertEqual(self.state(), before)

    def test_who_queues_begins_when_the_others_have_ended(self):
        self.interlock("commit", "top", "--speed", str(SLOW), "--async", "--keep-ready", "--job-id=down")
        running = self.start("backup", "base", "--to", "out/x.qcow2", "--queue")
        self.read_until(running, "waits for down")
        self.server.qmp.execute("block-job-cancel", device="down", force=True)
        text = running.communicate(timeout=20 * SLOWNESS)[0]
        self.assertEqual(running.returncode, 0, text)
        self.assertIn("backup-base: done", text)
        self.assertEqual(self.made(), ["x.qcow2"])

    def test_who_queues_in_vain_leaves_nothing(self):
        self.interlock("commit", "top", "--speed", str(SLOW), "--async", "--keep-ready", "--job-id=down")
        before = self.state()
        text = self.interlock("backup", "base", "--to", "out/x.qcow2", "--queue", "--queue-timeout=0.2", status=1)
        self.assertIn("timeout", text)
        self.assertEqual(self.state(), before)
        running = self.start("resize", "base", "4M", "--shrink", "--queue")
        waiting = self.read_until(running, "waits for").split()[0]
        self.server.qmp.execute("access-cancel", id=waiting)
        text = running.communicate(timeout=20 * SLOWNESS)[0]
        self.assertEqual(running.returncode, 1, text)
        self.assertIn("cancelled", text)
        self.assertEqual(self.state(), before)

    def test_several_that_queue_are_one(self):
        self.interlock("commit", "top", "--speed", str(SLOW), "--async", "--keep-ready", "--job-id=down")
        running = self.start("backup", "base=out/x.qcow2", "top=out/y.qcow2", "--queue")
        self.read_until(running, "waits for down")
        self.server.qmp.execute("block-job-cancel", device="down", force=True)
        text = running.communicate(timeout=20 * SLOWNESS)[0]
        self.assertEqual(running.returncode, 0, text)
        self.assertEqual(self.made(), ["x.qcow2", "y.qcow2"])

    def test_internal_snapshots(self):
        self.interlock("snapshot", "top", "base", "--internal=before")
        self.interlock("snapshot", "top", "--internal=before", "--delete")
        self.server.stop()
        self.assertNotIn("before", qemu_img("snapshot", "-l", self.path("top.qcow2")))
        self.assertIn("before", qemu_img("snapshot", "-l", self.path("base.qcow2")))

    def test_a_key_is_added(self):
        secrets = {name: self.path(name) for name in ("old", "new")}
        for name, path in secrets.items():
            with open(path, "w", encoding="ascii") as file:
                file.write(f"the {name} one")
            self.server.qmp.execute("object-add", {"qom-type": "secret", "id": name, "file": path})
        options = "encrypt.format=luks,encrypt.key-secret=old,encrypt.iter-time=10"
        qemu_img("create", "-q", "--object", f"secret,id=old,file={secrets['old']}", "-f", "qcow2", "-o", options,
                 self.path("e.qcow2"), "1M")
        self.server.qmp.execute("blockdev-add", {
            "driver": "qcow2", "node-name": "e", "encrypt": {"format": "luks", "key-secret": "old"},
            "file": {"driver": "file", "filename": self.path("e.qcow2")}})
        change = ["format=luks", "state=active", "new-secret=new", "iter-time=10"]
        text = self.interlock("amend", "e", *[word for key in change for word in ("-o", f"encrypt.{key}")])
        self.assertIn("amend-e: done", text)
        self.assertEqual(self.server.qmp.jobs(), {})
        self.server.stop()
        opened = f"driver=qcow2,encrypt.key-secret=new,file.filename={self.path('e.qcow2')}"
        run("qemu-io", "--object", f"secret,id=new,file={secrets['new']}", "--image-opts", opened, "-c", "read -q 0 1M")

    def test_mirror_of_what_is_new_takes_the_place_of_the_old(self):
        self.server.nbd_server()
        self.server.export("top")
        self.interlock("mirror", "top", "--to", "out/new.qcow2", "--sync=none", "--keep-ready", "--job-id=m")
        qemu_io(self.server.uri("top"), "write -q -P 8 5M 64k", image_format="raw")
        self.interlock("job", "complete", "m")
        self.assertIsNone(self.server.qmp.wait_job("m"))
        content = ["read -q -P 8 5M 64k", "read -q -P 2 4M 1M"]
        qemu_io(self.server.uri("top"), *content, image_format="raw")
        self.server.stop()
        qemu_io(self.path("out/new.qcow2"), *content)
