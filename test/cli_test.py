# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of the command line against a running daemon: what they print, and their exit status."""
import json
import os
import subprocess
import time

from harness import IS_PEER, MIB, PROGRAM, SANITIZER_OPTIONS, SLOWNESS, TestCase, qemu_io

SLOW = 64 * 1024


class Cli(TestCase):
    builds = ("release", "asan")
    time_limit = 40

    def setUp(self):
        super().setUp()
        if IS_PEER:
            self.skipTest("the verbs talk to query-graph and query-access")
        self.chain = self.create_chain(["base", "a", "b", "top"], 8 * MIB)
        qemu_io(self.chain[1][1], "write -q -P 1 0 2M")
        qemu_io(self.chain[2][1], "write -q -P 2 4M 2M")
        # A monitor serves one client at a time, as the peer's: one for the verbs, one for the test.
        chardev = f"socket,id=verbs,path={self.path('verbs')},server=on,wait=off"
        self.server = self.daemon("--chardev", chardev, "--monitor", "chardev=verbs")
        self.server.add_chain(self.chain)
        self.server.nbd_server()
        self.server.export("top")

    def interlock(self, *words, status=0):
        environment = {**SANITIZER_OPTIONS, **os.environ, "INTERLOCK_QMP": self.path("verbs")}
        result = subprocess.run(
            [PROGRAM, *words], cwd=self.directory, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=20 * SLOWNESS, env=environment, check=False,
        )
        self.assertEqual(result.returncode, status, f"{words}: {result.stdout}{result.stderr}")
        return result.stdout + result.stderr

    def test_status_names_nodes_exports_and_jobs(self):
        self.interlock("stream", "b", "--speed", str(SLOW), "--async", "--job-id=pull")
        text = self.interlock("status")
        for word in ("base", "top", "qcow2", "export-top", "pull", "stream"):
            self.assertIn(word, text)

    def test_graph_is_a_picture_of_the_chain(self):
        lines = self.interlock("graph").splitlines()
        order = [next(i for i, line in enumerate(lines) if f"{name}.qcow2" in line) for name in ("top", "b", "a", "base")]
        self.assertEqual(order, sorted(order))
        self.assertIn("export-top", lines[order[0]])

    def test_graph_as_dot_and_svg(self):
        dot = self.interlock("graph", "--dot")
        self.assertTrue(dot.startswith("digraph"))
        for name in ("base", "a", "b", "top"):
            self.assertIn(f'"{name}"', dot)
        self.interlock("graph", "--svg", "picture.svg")
        with open(self.path("picture.svg"), encoding="utf-8") as picture:
            self.assertIn("<svg", picture.read())

    def test_commit_runs_to_its_end(self):
        text = self.interlock("commit", "a", "--into=base")
        self.assertIn("done", text)
        self.assertIn("STALE", self.interlock("graph"))

    def test_active_commit_completes_by_itself(self):
        self.interlock("commit", "top", "--into=b")
        exports = self.server.qmp.execute("query-block-exports")
        self.assertEqual(exports[0]["node-name"], "b")

    def test_active_commit_can_be_kept_ready(self):
        self.interlock("commit", "top", "--into=b", "--async", "--keep-ready", "--job-id=down")
        self.server.qmp.wait_event("BLOCK_JOB_READY", device="down")
        self.assertIn("ready", self.interlock("job", "list"))
        self.interlock("job", "complete", "down")
        self.assertIn("no job", self.wait_no_jobs())

    def wait_no_jobs(self):
        deadline = time.monotonic() + 10 * SLOWNESS
        while "no jobs" not in (text := self.interlock("job", "list")):
            self.assertLess(time.monotonic(), deadline, text)
        return text

    def test_stream_runs_to_its_end(self):
        self.interlock("stream", "b", "--above=base")
        picture = self.interlock("graph").splitlines()
        b = next(i for i, line in enumerate(picture) if "b.qcow2" in line)
        self.assertIn("base.qcow2", picture[b + 1])

    def test_waiting_for_several_jobs_ends_with_the_last(self):
        for job, verb in (("one", ["commit", "a", "--into=base"]), ("two", ["stream", "top", "--above=a"])):
            self.interlock(*verb, f"--job-id={job}", "--async", "--speed", str(MIB))
        text = self.interlock("job", "wait", "one", "two")
        self.assertIn("one: done", text)
        self.assertIn("two: done", text)
        self.assertIn("no jobs", self.interlock("job", "list"))

    def test_a_cancelled_job_is_no_success(self):
        self.interlock("stream", "b", "--speed", str(SLOW), "--async", "--job-id=pull")
        environment = {**SANITIZER_OPTIONS, **os.environ, "INTERLOCK_QMP": self.path("verbs")}
        waiting = subprocess.Popen([PROGRAM, "job", "wait", "pull"], env=environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        waiting.stdout.readline()
        self.server.qmp.execute("job-cancel", id="pull")
        text = waiting.communicate(timeout=10 * SLOWNESS)[0]
        self.assertEqual(waiting.returncode, 1)
        self.assertIn("cancelled", text)

    def test_a_job_can_be_paused_and_resumed(self):
        self.interlock("stream", "b", "--speed", str(SLOW), "--async", "--job-id=pull")
        self.interlock("job", "pause", "pull")
        self.server.qmp.wait_event("JOB_STATUS_CHANGE", id="pull", status="paused")
        self.assertIn("paused", self.interlock("job", "list"))
        self.interlock("job", "resume", "pull")
        self.interlock("job", "cancel", "pull")

    def test_a_refusal_names_the_holder_and_the_remedy(self):
        self.interlock("commit", "a", "--into=base", "--speed", str(SLOW), "--async", "--job-id=down")
        text = self.interlock("commit", "b", "--into=base", status=1)
        for word in ("down", "node 'a'", "wait"):
            self.assertIn(word, text)

    def test_access_lists_who_holds_what(self):
        self.interlock("commit", "a", "--into=base", "--speed", str(SLOW), "--async", "--job-id=down")
        text = self.interlock("access")
        for word in ("down", "write-data", "base", "export-top"):
            self.assertIn(word, text)
        self.assertIn("backing", self.interlock("access", "--edges"))

    def test_access_check_tells_before_it_happens(self):
        down = ["access", "check", "block-commit", "job-id=x", "device=top", "top-node=a", "base-node=base"]
        self.assertIn("admitted", self.interlock(*down, "speed=65536", "auto-dismiss=true"))
        self.interlock("commit", "a", "--into=base", "--speed", str(SLOW), "--async", "--job-id=down")
        text = self.interlock("access", "check", "block-export-add", "type=nbd", "id=e", "node-name=base", status=1)
        for word in ("refused", "read-data", "base", "down", "wait for it, cancel it"):
            self.assertIn(word, text)
        check = json.loads(self.interlock(*down, "--json", status=1))
        self.assertEqual(check["conflicts"][0]["holder"]["id"], "down")
        self.assertIn("it only looks", self.interlock("access", "check", "query-jobs"))
        address = ["addr.type=unix", "addr.data.path=x"]
        self.assertIn("serves nothing", self.interlock("access", "check", "nbd-server-start", *address))
        self.assertIn("admitted", self.interlock("access", "check", "job-pause", '{"id": "down"}'))
        for words in (["gone"], ["job-pause"], ["job-pause", "id"], ["job-pause", "{"], ["job-pause", "id=x", "id.y=x"], []):
            self.assertIn("interlock access: ", self.interlock("access", "check", *words, status=2))

    def test_wrong_use_is_explained(self):
        rows = [
            (["frobnicate"], "frobnicate"),
            (["graph", "--frob"], "frob"),
            (["commit"], "node"),
            (["commit", "gone"], "gone"),
            (["job", "frob"], "frob"),
            (["access", "frob"], "frob"),
            (["job", "wait"], "ID"),
            (["job", "wait", "gone"], "gone"),
            (["status", "--qmp", "/gone/socket"], "/gone/socket"),
        ]
        for words, pattern in rows:
            with self.subTest(words=words):
                self.assertIn(pattern.lower(), self.interlock(*words, status=1).lower())
