# SPDX-License-Identifier: LGPL-2.1-or-later
"""The control socket: negotiation, ids, out-of-band, order of events, keys of answers, and how the daemon ends.

Where the peer has the same thing, the same script runs on both and the traces are compared.
"""
import contextlib
import json
import os
import signal
import socket
import subprocess
import time

from harness import DAEMON, IS_PEER, KIB, MIB, PEER, PROGRAM, SANITIZER_OPTIONS, SLOWNESS, Gone, QmpError, TestCase, qemu_img, qemu_io
from harness import die_with_parent


class Protocol(TestCase):
    builds = ("release", "asan")

    def test_greeting_names_version_and_capabilities(self):
        daemon = self.daemon()
        greeting = daemon.qmp.greeting["QMP"]
        self.assertEqual(set(greeting), {"version", "capabilities"})
        self.assertEqual(greeting["capabilities"], ["oob"])
        self.assertEqual(set(greeting["version"]), {"qemu", "package"})
        self.assertEqual(set(greeting["version"]["qemu"]), {"major", "minor", "micro"})

    def test_ids_of_every_kind_come_back(self):
        daemon = self.daemon()
        for identity in (0, -1, 1.5, "", "text", None, True, [1, [2]], {"a": {"b": []}}):
            daemon.qmp.send_raw(json.dumps({"execute": "query-jobs", "id": identity}).encode() + b"\n")
            reply = daemon.qmp.reply()
            self.assertIn("id", reply)
            self.assertEqual(reply["id"], identity)

    def test_reply_without_an_id_has_none(self):
        daemon = self.daemon()
        daemon.qmp.send_raw(b'{"execute": "query-jobs"}')
        self.assertEqual(daemon.qmp.reply(), {"return": []})

    def test_error_reply_has_the_id(self):
        daemon = self.daemon()
        daemon.qmp.send_raw(b'{"execute": "nothing-of-the-kind", "id": 7}')
        reply = daemon.qmp.reply()
        self.assertEqual(reply["id"], 7)
        self.assertEqual(reply["error"]["class"], "CommandNotFound")

    def test_commands_in_one_packet_are_answered_in_order(self):
        daemon = self.daemon()
        daemon.qmp.send_raw(b"".join(b'{"execute": "query-jobs", "id": %d}' % i for i in range(200)))
        self.assertEqual([daemon.qmp.reply()["id"] for _ in range(200)], list(range(200)))

    def test_a_command_may_come_byte_by_byte(self):
        daemon = self.daemon()
        for byte in b'{ "execute" : "query-jobs" ,\r\n "id" : "slow" } \n':
            daemon.qmp.send_raw(bytes([byte]))
        self.assertEqual(daemon.qmp.reply()["id"], "slow")

    def test_out_of_band_needs_its_capability(self):
        daemon = self.daemon()
        daemon.qmp.send_raw(b'{"exec-oob": "query-jobs", "id": 1}\n')
        self.assertIn("error", daemon.qmp.reply())

    def test_out_of_band_is_for_commands_that_allow_it(self):
        daemon = self.daemon()
        daemon.qmp.close()
        daemon.qmp = daemon.connect(negotiate=False)
        daemon.qmp.execute("qmp_capabilities", {"enable": ["oob"]})
        daemon.qmp.send_raw(b'{"exec-oob": "query-jobs", "id": 1}\n')
        self.assertRegex(daemon.qmp.reply()["error"]["desc"], r"query-jobs")
        allowed = [
            entry["name"] for entry in daemon.qmp.execute("query-qmp-schema")
            if entry["meta-type"] == "command" and entry.get("allow-oob")
        ]
        for name in allowed:
            daemon.qmp.send_raw(json.dumps({"exec-oob": name, "id": name}).encode() + b"\n")
            self.assertEqual(daemon.qmp.reply()["id"], name)

    def test_the_monitor_can_be_left_and_entered_again(self):
        daemon = self.daemon()
        daemon.qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "kept", "size": MIB})
        for _ in range(20):
            daemon.qmp.close()
            daemon.qmp = daemon.connect()
            names = [node["node-name"] for node in daemon.qmp.execute("query-named-block-nodes")]
            self.assertEqual(names, ["kept"])

    def test_schema_and_commands_agree(self):
        daemon = self.daemon()
        commands = {command["name"] for command in daemon.qmp.execute("query-commands")}
        schema = daemon.qmp.execute("query-qmp-schema")
        self.assertEqual(commands, {entry["name"] for entry in schema if entry["meta-type"] == "command"})
        names = {entry["name"] for entry in schema}
        for entry in schema:
            if entry["meta-type"] == "object":
                for member in entry["members"]:
                    self.assertIn(member["type"], names, entry["name"])

    def test_the_schema_is_the_peers_where_both_have_a_command(self):
        """Same arguments, same types down to the leaves, same defaults of presence; ours may have more of them."""
        ours, theirs = (self.schema_of(command) for command in (None, [PEER]))
        common = sorted(set(ours) & set(theirs))
        self.assertGreater(len(common), 20)
        for name in common:
            self.assert_compatible(name, ours[name], theirs[name])

    def schema_of(self, command):
        """Command name -> its arguments as nested dictionaries {name: (optional, type)}."""
        daemon = self.daemon(command=command)
        entries = {entry["name"]: entry for entry in daemon.qmp.execute("query-qmp-schema")}

        def resolve(name, depth):
            entry = entries[name]
            kind = entry["meta-type"]
            if kind == "object" and depth < 4:
                members = {m["name"]: ("default" in m, resolve(m["type"], depth + 1)) for m in entry["members"]}
                return {**members, **({"(tag)": entry["tag"]} if "tag" in entry else {})}
            if kind == "builtin":
                return entry["json-type"]
            if kind == "array":
                return [resolve(entry["element-type"], depth + 1)] if depth < 4 else "array"
            if kind == "alternate":
                return frozenset(resolve(choice["type"], 4) for choice in entry["members"])
            return kind

        result = {name: resolve(e["arg-type"], 0) for name, e in entries.items() if e["meta-type"] == "command"}
        daemon.stop()
        self.daemons.remove(daemon)
        return result

    def assert_compatible(self, path, ours, theirs):
        """What a client of the peer may send to ours means the same; ours may leave out what it does not have yet."""
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for name in set(ours) & set(theirs) - {"(tag)"}:
                if not ours[name][0]:
                    self.assertFalse(theirs[name][0], f"{path}.{name} is optional there")
                self.assert_compatible(f"{path}.{name}", ours[name][1], theirs[name][1])
            for name in set(ours) - set(theirs) - {"(tag)"}:
                self.assertTrue(ours[name][0], f"{path}.{name} is ours alone and not optional")
        elif isinstance(ours, list) and isinstance(theirs, list):
            self.assert_compatible(f"{path}[]", ours[0], theirs[0])
        elif isinstance(ours, frozenset):
            self.assertLessEqual(theirs if isinstance(theirs, frozenset) else {theirs}, ours, path)
        else:
            self.assertEqual(ours, theirs, path)

    def test_monitor_on_tcp(self):
        port = self.random.randrange(20000, 60000)
        daemon = self.daemon("--chardev", f"socket,id=tcp,host=127.0.0.1,port={port},server=on,wait=off",
                             "--monitor", "chardev=tcp")
        with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rw") as stream:
            self.assertIn("QMP", json.loads(stream.readline()))
            stream.write('{"execute": "qmp_capabilities"}\n{"execute": "query-jobs"}\n')
            stream.flush()
            self.assertEqual(json.loads(stream.readline()), {"return": {}})
            self.assertEqual(json.loads(stream.readline()), {"return": []})
        self.assertTrue(daemon.is_alive())

    def test_monitor_on_stdio(self):
        commands = [{"execute": "qmp_capabilities"}, {"execute": "query-jobs", "id": 1}, {"execute": "quit", "id": 2}]
        line = [*DAEMON, "--chardev", "stdio,id=std", "--monitor", "chardev=std"]
        result = subprocess.run(
            line, input="".join(json.dumps(command) + "\n" for command in commands), capture_output=True, text=True,
            timeout=20 * SLOWNESS, env={**SANITIZER_OPTIONS, **os.environ}, check=True,
        )
        replies = [json.loads(text) for text in result.stdout.splitlines()]
        self.assertEqual([reply["id"] for reply in replies if "id" in reply], [1, 2])


class LikeThePeer(TestCase):
    """The same script here and there."""

    builds = ("release",)
    time_limit = 60

    def both(self, script, *options):
        """What `script(daemon)` returns with our daemon and with the peer, each on its own images."""
        results = []
        for program in (None, [PEER]):
            chain = [(name, self.create_one(name, below)) for name, below in (("base", None), ("mid", "base"), ("top", "mid"))]
            daemon = self.daemon(*options, command=program)
            daemon.add_chain(chain)
            results.append(script(daemon))
            daemon.stop()
            self.daemons.remove(daemon)
        return results

    def create_one(self, name, below):
        path = self.create_image(f"{name}.qcow2", 8 * MIB, backing=self.path(f"{below}.qcow2") if below else None)
        qemu_io(path, f"write -q -P {len(name)} {256 * len(name)}k 1M")
        return path

    def trace(self, events):
        """Events with what does not depend on the clock, and without what the peer does not say."""
        result = []
        for event in events:
            data = {k: v for k, v in event.get("data", {}).items() if k not in ("offset", "len", "target-state")}
            if {"offset", "len"} <= set(event.get("data", {})):
                data["done"] = event["data"]["offset"] == event["data"]["len"]
            result.append((event["event"], data))
        return result

    def assert_same(self, script, *options):
        ours, theirs = self.both(script, *options)
        self.assertEqual(ours, theirs)

    def collect(self, qmp, until):
        """All events, in order, up to the first for which until(event) holds, and those right after it."""
        seen = []
        while True:
            message = qmp.events.pop(0) if qmp.events else qmp.receive()
            seen.append(message)
            if until(message):
                return seen

    def ended(self, job):
        return lambda e: e["event"] == "JOB_STATUS_CHANGE" and e["data"] == {"status": "null", "id": job}

    def status(self, job, wanted):
        return lambda e: e["event"] == "JOB_STATUS_CHANGE" and e["data"] == {"status": wanted, "id": job}

    def test_secrets_open_images(self):
        """What opens an encrypted image, what does not, and in which words a script sees that: none of them secret."""
        volume, image = self.path("volume.luks"), self.path("aes.qcow2")
        subprocess.run([PROGRAM, "img", "create", "-q", "--object", "secret,id=s,data=hunter2", "-f", "luks", "-o",
                        "key-secret=s,iter-time=10", volume, "1M"], check=True)
        qemu_img("create", "-q", "--object", "secret,id=s,data=hunter2", "-f", "qcow2", "-o",
                 "encrypt.format=aes,encrypt.key-secret=s", image, "1M")
        with open(self.path("password"), "w", encoding="ascii") as password:
            password.write("aHVudGVyMg==")

        def script(daemon):
            outcomes = []

            def attempt(command, **arguments):
                try:
                    daemon.qmp.execute(command, arguments)
                    outcomes.append("done")
                except QmpError as error:
                    self.assertNotIn("hunter", str(error))
                    outcomes.append("refused")

            attempt("object-add", **{"qom-type": "secret", "id": "right", "format": "base64", "file": self.path("password")})
            attempt("object-add", **{"qom-type": "secret", "id": "wrong", "data": "hunter3"})
            attempt("object-add", **{"qom-type": "secret", "id": "wrong", "data": "hunter3"})
            attempt("object-add", **{"qom-type": "secret", "id": "none"})
            attempt("object-add", **{"qom-type": "secret", "id": "bad", "format": "base64", "data": "hunter%"})
            for key in ({}, {"key-secret": "nobody"}, {"key-secret": "wrong"}, {"key-secret": "right"}):
                attempt("blockdev-add", **{"driver": "luks", "node-name": f"luks-{len(outcomes)}", "read-only": True,
                                           "file": {"driver": "file", "filename": volume}, **key})
                for kind in ("aes", "luks"):
                    attempt("blockdev-add", **{"driver": "qcow2", "node-name": f"qcow2-{len(outcomes)}", "read-only": True,
                                               "file": {"driver": "file", "filename": image},
                                               "encrypt": {"format": kind, **key}})
            attempt("object-del", id="right")
            attempt("object-del", id="right")
            nodes = daemon.qmp.execute("query-named-block-nodes")
            outcomes += sorted((node["drv"], node["encrypted"], node["image"].get("encrypted")) for node in nodes
                               if node["drv"] != "file" and not node["file"].endswith(("base.qcow2", "mid.qcow2", "top.qcow2")))
            return outcomes

        self.assert_same(script)

    def test_events_of_a_commit(self):
        def script(daemon):
            daemon.qmp.execute("block-commit", {"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base"})
            return self.trace(self.collect(daemon.qmp, self.ended("j")))

        self.assert_same(script)

    def test_events_of_an_active_commit_with_pivot(self):
        def script(daemon):
            daemon.qmp.execute("block-commit", {"job-id": "j", "device": "top", "base-node": "mid"})
            events = self.collect(daemon.qmp, lambda e: e["event"] == "BLOCK_JOB_READY")
            daemon.qmp.execute("block-job-complete", device="j")
            return self.trace(events + self.collect(daemon.qmp, self.ended("j")))

        self.assert_same(script)

    def test_events_of_an_active_commit_that_is_left(self):
        def script(daemon):
            daemon.qmp.execute("block-commit", {"job-id": "j", "device": "top", "base-node": "mid"})
            events = self.collect(daemon.qmp, lambda e: e["event"] == "BLOCK_JOB_READY")
            daemon.qmp.execute("block-job-cancel", device="j")
            return self.trace(events + self.collect(daemon.qmp, self.ended("j")))

        self.assert_same(script)

    def test_events_of_a_stream(self):
        def script(daemon):
            daemon.qmp.execute("block-stream", {"job-id": "j", "device": "top", "base-node": "base"})
            return self.trace(self.collect(daemon.qmp, self.ended("j")))

        self.assert_same(script)

    def test_events_of_a_cancelled_stream(self):
        def script(daemon):
            daemon.qmp.execute("block-stream", {"job-id": "j", "device": "top", "speed": 65536})
            events = self.collect(daemon.qmp, self.status("j", "running"))
            time.sleep(0.1)
            daemon.qmp.execute("block-job-cancel", device="j")
            return self.trace(events + self.collect(daemon.qmp, self.ended("j")))

        self.assert_same(script)

    def test_events_with_manual_finalize_and_dismiss(self):
        def script(daemon):
            manual = {"auto-finalize": False, "auto-dismiss": False}
            daemon.qmp.execute("block-stream", {"job-id": "j", "device": "top", **manual})
            events = self.collect(daemon.qmp, lambda e: e["event"] == "BLOCK_JOB_PENDING")
            daemon.qmp.execute("job-finalize", id="j")
            events += self.collect(daemon.qmp, self.status("j", "concluded"))
            jobs = [{k: v for k, v in job.items() if "progress" not in k} for job in daemon.qmp.execute("query-jobs")]
            daemon.qmp.execute("job-dismiss", id="j")
            return self.trace(events + self.collect(daemon.qmp, self.ended("j"))), jobs

        self.assert_same(script)

    def test_events_of_a_paused_stream(self):
        def script(daemon):
            daemon.qmp.execute("block-stream", {"job-id": "j", "device": "top", "speed": 65536})
            events = self.collect(daemon.qmp, self.status("j", "running"))
            time.sleep(0.1)
            daemon.qmp.execute("job-pause", id="j")
            events += self.collect(daemon.qmp, self.status("j", "paused"))
            daemon.qmp.execute("job-resume", id="j")
            events += self.collect(daemon.qmp, self.status("j", "running"))
            daemon.qmp.execute("block-job-set-speed", device="j", speed=0)
            return self.trace(events + self.collect(daemon.qmp, self.ended("j")))

        self.assert_same(script)

    def test_verbs_in_the_wrong_state_have_the_same_class(self):
        def script(daemon):
            result = []
            manual = {"auto-finalize": False, "auto-dismiss": False}
            daemon.qmp.execute("block-stream", {"job-id": "j", "device": "top", "speed": 65536, **manual})
            for state in ("running", "pending", "concluded"):
                if state == "pending":
                    daemon.qmp.execute("block-job-set-speed", device="j", speed=0)
                    daemon.qmp.wait_event("BLOCK_JOB_PENDING")
                if state == "concluded":
                    daemon.qmp.execute("job-finalize", id="j")
                    daemon.qmp.wait_event("JOB_STATUS_CHANGE", status="concluded")
                verbs = ["job-resume", "job-complete", "job-dismiss", "job-finalize"][: 3 if state == "pending" else 4]
                for verb in [v for v in verbs if not (state == "concluded" and v == "job-dismiss")]:
                    try:
                        daemon.qmp.execute(verb, id="j")
                        result.append((state, verb, "done"))
                    except QmpError as error:
                        result.append((state, verb, error.error_class))
            daemon.qmp.execute("job-dismiss", id="j")
            return result

        self.assert_same(script)

    def test_answers_have_the_peers_keys(self):
        """Every key that the peer's answers have stands in ours with a value of the same type."""

        def script(daemon):
            daemon.nbd_server()
            daemon.export("top")
            daemon.qmp.execute("block-stream", {"job-id": "j", "device": "top", "speed": 65536})
            time.sleep(0.2)
            answers = {}
            for command in ("query-block-jobs", "query-jobs", "query-block-exports", "query-named-block-nodes", "query-version"):
                with contextlib.suppress(QmpError):
                    answers[command] = daemon.qmp.execute(command)
            nodes = answers["query-named-block-nodes"]
            answers["query-named-block-nodes"] = [node for node in nodes if node["node-name"] == "top"]
            daemon.qmp.execute("block-job-cancel", {"device": "j", "force": True})
            return answers

        ours, theirs = self.both(script)
        self.assert_has(ours, theirs, "")

    def assert_has(self, ours, theirs, path):
        if isinstance(theirs, dict):
            self.assertIsInstance(ours, dict, path)
            for key, value in theirs.items():
                self.assertIn(key, ours, f"{path}: the peer has {key}")
                self.assert_has(ours[key], value, f"{path}.{key}")
        elif isinstance(theirs, list):
            self.assertEqual(bool(ours), bool(theirs), path)
            if theirs:
                self.assert_has(ours[0], theirs[0], f"{path}[]")
        else:
            self.assertEqual(type(ours), type(theirs), path)

    def test_backing_strings_after_the_jobs_are_the_same(self):
        def script(daemon):
            daemon.qmp.execute("block-stream", {"job-id": "j", "device": "top", "base-node": "base"})
            daemon.qmp.wait_job("j")
            after_stream = self.backing_strings()
            daemon.qmp.execute("block-stream", {"job-id": "j", "device": "mid"})
            daemon.qmp.wait_job("j")
            return after_stream, self.backing_strings()

        self.assert_same(script)

    def backing_strings(self):
        result = {}
        for name in ("base", "mid", "top"):
            info = json.loads(qemu_img("info", "-U", "--output=json", "-f", "qcow2", self.path(f"{name}.qcow2")))
            result[name] = [info.get(key) for key in ("backing-filename", "backing-filename-format")]
        return result

    def test_a_given_backing_string_is_written_as_it_is(self):
        def script(daemon):
            daemon.qmp.execute(
                "block-commit",
                {"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base", "backing-file": "./base.qcow2"},
            )
            daemon.qmp.wait_job("j")
            return self.backing_strings()

        self.assert_same(script)


class Ending(TestCase):
    builds = ("release", "asan")
    time_limit = 40

    def busy_daemon(self, *options, **more):
        """A daemon with a throttled job, an export and a client that is in the middle of things."""
        chain = self.create_chain(["base", "mid", "top"], 32 * MIB)
        qemu_io(chain[0][1], "write -q -P 7 0 24M")
        daemon = self.daemon(*options, **more)
        daemon.add_chain(chain)
        daemon.nbd_server()
        daemon.export("top")
        daemon.qmp.execute("block-stream", {"job-id": "slow", "device": "top", "speed": 4 * KIB})
        return daemon

    def assert_ends_within(self, daemon, seconds):
        start = time.monotonic()
        daemon.wait(timeout=15 * SLOWNESS)
        self.assertLess(time.monotonic() - start, seconds * SLOWNESS)
        self.assertFalse(os.path.exists(daemon.nbd_path), "the NBD socket is still there")
        self.assertFalse(os.path.exists(daemon.monitor_path), "the monitor's socket is still there")

    def test_sigterm_ends_it_in_two_seconds_with_throttled_jobs(self):
        daemon = self.busy_daemon()
        time.sleep(0.3)
        daemon.process.send_signal(signal.SIGTERM)
        self.assert_ends_within(daemon, 2)

    def test_sigint_ends_it_the_same(self):
        daemon = self.busy_daemon()
        time.sleep(0.3)
        daemon.process.send_signal(signal.SIGINT)
        self.assert_ends_within(daemon, 2)

    def test_sigterm_with_a_ready_active_commit(self):
        chain = self.create_chain(["base", "top"], 8 * MIB)
        daemon = self.daemon()
        daemon.add_chain(chain)
        daemon.qmp.execute("block-commit", {"job-id": "j", "device": "top", "base-node": "base"})
        daemon.qmp.wait_event("BLOCK_JOB_READY")
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait(timeout=15 * SLOWNESS)

    def test_sigterm_with_a_paused_job(self):
        daemon = self.busy_daemon()
        daemon.qmp.execute("job-pause", id="slow")
        daemon.process.send_signal(signal.SIGTERM)
        self.assert_ends_within(daemon, 2)

    def test_sigterm_with_a_pending_job(self):
        chain = self.create_chain(["base", "top"], 8 * MIB)
        daemon = self.daemon()
        daemon.add_chain(chain)
        daemon.qmp.execute("block-stream", {"job-id": "j", "device": "top", "auto-finalize": False, "auto-dismiss": False})
        daemon.qmp.wait_event("BLOCK_JOB_PENDING")
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait(timeout=15 * SLOWNESS)

    def test_quit_is_answered_and_ends_it(self):
        daemon = self.busy_daemon()
        self.assertEqual(daemon.qmp.execute("quit"), {})
        with contextlib.suppress(Gone, OSError):
            while True:
                daemon.qmp.receive()
        self.assert_ends_within(daemon, 2)

    def test_images_are_clean_and_unlocked_after_the_end(self):
        daemon = self.busy_daemon()
        daemon.stop()
        for name in ("base", "mid", "top"):
            qemu_img("check", "-f", "qcow2", self.path(f"{name}.qcow2"))

    def test_daemonize_returns_when_all_is_set_up(self):
        self.create_image("disk.qcow2", 8 * MIB)
        pid_file, nbd = self.path("pid"), self.path("n")
        line = [*DAEMON, "--blockdev", "file,node-name=f,filename=disk.qcow2", "--blockdev", "qcow2,node-name=q,file=f",
                "--nbd-server", "addr.type=unix,addr.path=n", "--export", "nbd,id=e,node-name=q",
                "--chardev", "socket,id=m,path=m,server=on,wait=off", "--monitor", "chardev=m",
                "--daemonize", "--pidfile", "pid"]
        subprocess.run(line, cwd=self.directory, stdin=subprocess.DEVNULL, timeout=20 * SLOWNESS, check=True,
                       env={**SANITIZER_OPTIONS, **os.environ}, preexec_fn=die_with_parent)
        with open(pid_file, encoding="ascii") as text:
            pid = int(text.read())
        try:
            os.kill(pid, 0)
            qemu_img("info", "-f", "raw", f"nbd+unix:///q?socket={nbd}")
        finally:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 5 * SLOWNESS
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertFalse(os.path.exists(f"/proc/{pid}"))
        self.assertEqual(os.listdir(self.directory), ["disk.qcow2"], "the pid file or a socket is still there")

    def test_daemonize_reports_a_failure(self):
        line = [*DAEMON, "--daemonize", "--blockdev", "file,node-name=f,filename=/gone/file"]
        result = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20 * SLOWNESS, check=False)
        self.assertEqual(result.returncode, 1)
        self.assertIn("/gone/file", result.stderr)

    def test_both_engines_do_the_same(self):
        if IS_PEER:
            self.skipTest("the peer has no --engine")
        path = self.create_image("disk.qcow2", 8 * MIB)
        qemu_io(path, "write -q -P 3 1M 1M")
        for engine in ("auto", "uring", "epoll"):
            daemon = self.daemon("--engine", engine)
            daemon.add_qcow2("disk", path)
            daemon.nbd_server()
            daemon.export("disk")
            qemu_io(daemon.uri("disk"), "read -P 3 1M 1M", "write -P 4 2M 64k", "flush", "read -P 4 2M 64k", image_format="raw")
            daemon.stop()
            self.daemons.remove(daemon)
