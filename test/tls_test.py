# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD over TLS: certificates and shared keys, who is let in, and clients that try without."""
import contextlib
import ctypes
import os
import select
import socket
import struct
import subprocess
import threading
import time
import unittest

from harness import IS_PEER, MIB, TestCase, run, scale

try:
    import nbd
except ImportError:
    nbd = None

try:
    gnutls = ctypes.CDLL("libgnutls.so.30")
except OSError:
    gnutls = None

SIZE = 8 * MIB
CAPABLE = nbd and nbd.NBD().supports_tls()


class Peer:
    """The client's side of TLS 1.3 with a shared key, whose bytes go to the server when a test says so."""

    def __init__(self, server, user, key):
        self.server = server
        self.ends = socket.socketpair()
        self.lock = threading.Lock()
        self.held = None
        for source, target in ((self.ends[1], server), (server, self.ends[1])):
            threading.Thread(target=self.pass_on, args=(source, target), daemon=True).start()
        credentials, self.session = ctypes.c_void_p(), ctypes.c_void_p()
        datum = (ctypes.c_void_p * 2)(ctypes.cast(ctypes.c_char_p(key), ctypes.c_void_p), len(key))
        gnutls.gnutls_psk_allocate_client_credentials(ctypes.byref(credentials))
        gnutls.gnutls_psk_set_client_credentials(credentials, user, datum, 1)
        gnutls.gnutls_init(ctypes.byref(self.session), 2)
        gnutls.gnutls_priority_set_direct(self.session, b"NORMAL:-VERS-ALL:+VERS-TLS1.3:+ECDHE-PSK:+DHE-PSK:+PSK", None)
        gnutls.gnutls_credentials_set(self.session, 4, credentials)
        gnutls.gnutls_transport_set_int2(self.session, self.ends[0].fileno(), self.ends[0].fileno())
        if gnutls.gnutls_handshake(self.session) != 0:
            raise ConnectionError("no TLS")

    def pass_on(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with self.lock:
                    if target is self.server and self.held is not None:
                        self.held += data
                        continue
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def hold(self):
        self.held = b""

    def release(self):
        """All that was sent since hold(), at once."""
        time.sleep(0.05)
        with self.lock:
            data, self.held = self.held, None
        self.server.sendall(data)

    def send(self, data):
        assert gnutls.gnutls_record_send(self.session, data, len(data)) == len(data)

    def change_keys(self, both):
        assert gnutls.gnutls_session_key_update(self.session, 1 if both else 0) == 0

    def recv(self, count, _flags=0):
        data = b""
        while len(data) < count:
            room = ctypes.create_string_buffer(count - len(data))
            result = gnutls.gnutls_record_recv(self.session, room, len(room))
            if result <= 0 and result != -28:
                raise EOFError(result)
            data += room.raw[: max(result, 0)]
        return data


@unittest.skipUnless(CAPABLE, "needs libnbd with TLS, and its Python module")
class Tls(TestCase):
    time_limit = 60
    builds = ("release", "asan")

    # --- keys ---

    def certify(self, folder, name, signer=None, days=3, alternative="localhost"):
        """A certificate and its key, NAME-cert.pem and NAME-key.pem, signed by the authority in the folder."""
        path = lambda suffix: os.path.join(folder, f"{name}-{suffix}")
        with open(path("key.pem"), "w") as key:
            subprocess.run(["certtool", "--generate-privkey", "--key-type=rsa", "--bits=2048"], stdout=key, stderr=subprocess.DEVNULL,
                           check=True)
        with open(path("template"), "w") as template:
            template.write(f"cn = {alternative if name == 'server' else name}\nexpiration_days = {days}\n")
            if not signer:
                template.write("ca\ncert_signing_key\n")
            elif name == "server":
                template.write(f"tls_www_server\ndns_name = {alternative}\nsigning_key\nencryption_key\n")
            else:
                template.write("tls_www_client\nsigning_key\nencryption_key\n")
        line = ["certtool", "--template", path("template"), "--load-privkey", path("key.pem"), "--outfile",
                path("cert.pem")]
        if signer:
            line += ["--generate-certificate", "--load-ca-certificate", os.path.join(folder, f"{signer}-cert.pem"),
                     "--load-ca-privkey", os.path.join(folder, f"{signer}-key.pem")]
        else:
            line += ["--generate-self-signed"]
        run(*line)

    def certificates(self, folder="pki", **more):
        folder = self.path(folder)
        os.mkdir(folder)
        self.certify(folder, "ca")
        self.certify(folder, "server", "ca", **more)
        self.certify(folder, "client", "ca")
        return folder

    def keys(self):
        folder = self.path("psk")
        os.mkdir(folder)
        with open(os.path.join(folder, "keys.psk"), "w") as keys:
            for number, user in enumerate(("alice", "bob", "qemu")):
                keys.write(f"{user}:{str(number) * 64}\n")
        return folder

    # --- both sides ---

    def serve(self, *objects, authorization=None, file_options=""):
        image = self.create_image(f"disk{self.daemon_count}.qcow2", SIZE)
        options = []
        for item in objects:
            options += ["--object", item]
        daemon = self.daemon(*options, "--blockdev",
                             f"qcow2,node-name=disk,file.driver=file,file.filename={image}{file_options}")
        more = {"tls-authz": authorization} if authorization else {}
        daemon.qmp.execute("nbd-server-start", {
            "addr": {"type": "unix", "data": {"path": daemon.nbd_path}}, "tls-creds": "tls", **more})
        daemon.qmp.execute("block-export-add", type="nbd", id="e0", node_name="disk", writable=True)
        return daemon

    def client(self, daemon, folder=None, user=None, level=None):
        handle = nbd.NBD()
        handle.set_tls(nbd.TLS_REQUIRE if level is None else level)
        handle.set_export_name("disk")
        if user:
            handle.set_tls_psk_file(os.path.join(folder, "keys.psk"))
            handle.set_tls_username(user)
        elif folder:
            handle.set_tls_certificates(folder)
            handle.set_tls_verify_peer(False)  # over a unix socket there is no name to compare with
        handle.connect_unix(daemon.nbd_path)
        return handle

    def work(self, handle):
        """Long and short, in flight at once."""
        block = os.urandom(MIB)
        handle.pwrite(block, 3 * MIB)
        cookies = []
        buffers = []
        for number in range(64):
            buffers.append(nbd.Buffer(100000 if number % 2 else 512))
            cookies.append(handle.aio_pread(buffers[-1], 3 * MIB + number * 5000))
        for _ in cookies:
            handle.poll(-1)
        while handle.aio_in_flight():
            handle.poll(-1)
        for number, buffer in enumerate(buffers):
            start = number * 5000
            self.assertEqual(bytes(buffer.to_bytearray()), block[start : start + len(buffer)])
        self.assertEqual(handle.pread(4096, 0), bytes(4096))
        handle.flush()

    def assert_kept_out(self, daemon, *arguments, **more):
        with self.assertRaises(nbd.Error):
            self.client(daemon, *arguments, **more).pread(512, 0)

    # --- the tests ---

    def test_certificates(self):
        folder = self.certificates()
        daemon = self.serve(f"tls-creds-x509,id=tls,endpoint=server,dir={folder}")
        handle = self.client(daemon, folder)
        self.assertTrue(handle.get_tls_negotiated())
        self.work(handle)
        handle.shutdown()
        self.assert_kept_out(daemon, level=nbd.TLS_DISABLE)
        stranger = self.certificates("stranger")
        self.assert_kept_out(daemon, stranger)
        options = ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={folder}", "--image-opts",
                   f"driver=nbd,server.type=unix,server.path={daemon.nbd_path},export=disk,tls-creds=t,"
                   "tls-hostname=localhost"]
        self.assertIn("virtual size: 8 MiB", run("qemu-img", "info", *options).stdout)

    def test_shared_keys(self):
        folder = self.keys()
        daemon = self.serve(f"tls-creds-psk,id=tls,endpoint=server,dir={folder}")
        handle = self.client(daemon, folder, "alice")
        self.work(handle)
        handle.shutdown()
        other = self.path("other")
        os.mkdir(other)
        with open(os.path.join(other, "keys.psk"), "w") as keys:
            keys.write(f"alice:{'9' * 64}\n")
        self.assert_kept_out(daemon, other, "alice")
        self.assert_kept_out(daemon, level=nbd.TLS_DISABLE)
        options = ["--object", f"tls-creds-psk,id=t,endpoint=client,username=bob,dir={folder}", "--image-opts",
                   f"driver=nbd,server.type=unix,server.path={daemon.nbd_path},export=disk,tls-creds=t"]
        self.assertIn("virtual size: 8 MiB", run("qemu-img", "info", *options).stdout)

    def test_a_mapped_file(self):
        """What is sent straight from the mapping elsewhere is encrypted first."""
        if IS_PEER or not self.path("x").startswith("/dev/shm"):
            self.skipTest("only in tmpfs, and not of the peer")
        folder = self.keys()
        daemon = self.serve(f"tls-creds-psk,id=tls,endpoint=server,dir={folder}", file_options=",file.mapped=on")
        handle = self.client(daemon, folder, "alice")
        for _ in range(3):
            self.work(handle)
        handle.shutdown()

    def test_whom_an_authorization_lets_in(self):
        folder = self.keys()
        rules = "authz-list,id=who,policy=deny,rules.0.match=al*,rules.0.policy=allow,rules.0.format=glob"
        daemon = self.serve(f"tls-creds-psk,id=tls,endpoint=server,dir={folder}", rules, authorization="who")
        handle = self.client(daemon, folder, "alice")
        said = daemon.qmp.execute("query-nbd-clients")
        self.assertEqual([(client["tls"], client["tls-identity"]) for client in said], [(True, "alice")])
        handle.shutdown()
        self.assert_kept_out(daemon, folder, "bob")
        daemon.qmp.execute("object-del", id="who")
        self.assert_kept_out(daemon, folder, "alice")

        pki = self.certificates()
        daemon = self.serve(f"tls-creds-x509,id=tls,endpoint=server,dir={pki}", "authz-simple,id=who,identity=CN=client",
                            authorization="who")
        self.client(daemon, pki).shutdown()
        daemon = self.serve(f"tls-creds-x509,id=tls,endpoint=server,dir={pki}", "authz-simple,id=who,identity=CN=else",
                            authorization="who")
        self.assert_kept_out(daemon, pki)

    def test_bad_credentials_are_told_when_they_are_added(self):
        folder = self.keys()
        daemon = self.serve(f"tls-creds-psk,id=tls,endpoint=server,dir={folder}")
        add = lambda **more: daemon.qmp.execute("object-add", **more)
        x509 = {"qom-type": "tls-creds-x509", "endpoint": "server"}
        self.assert_refused("ca-cert.pem", add, **x509, id="a", dir=self.path("nothing"))
        old = self.path("old")
        os.mkdir(old)
        self.certify(old, "ca")
        other = self.certificates("other")
        for name in ("server-cert.pem", "server-key.pem"):
            os.link(os.path.join(other, name), os.path.join(old, name))
        self.assert_refused("cannot be used", add, **x509, id="b", dir=old)
        self.assert_refused("priority", add, **{**x509, "qom-type": "tls-creds-anon"}, id="c", priority="NONSENSE")
        self.assert_refused("already", add, **{**x509, "qom-type": "tls-creds-anon"}, id="tls")
        self.assert_refused("in use", daemon.qmp.execute, "object-del", id="tls")
        daemon.qmp.execute("nbd-server-stop")
        daemon.qmp.execute("object-del", id="tls")
        start = {"addr": {"type": "unix", "data": {"path": daemon.nbd_path}}}
        self.assert_refused("no TLS credentials 'tls'", daemon.qmp.execute, "nbd-server-start",
                            {**start, "tls-creds": "tls"})
        add(**{"qom-type": "tls-creds-anon"}, id="mine", endpoint="client")
        self.assert_refused("for a client", daemon.qmp.execute, "nbd-server-start", {**start, "tls-creds": "mine"})

    def plain(self, daemon):
        """A connection after the greeting, without TLS."""
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(20)
        stream.connect(daemon.nbd_path)
        stream.recv(18, socket.MSG_WAITALL)
        stream.sendall(struct.pack(">I", 3))
        return stream

    def option(self, number, data=b""):
        return struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data

    def answer(self, stream):
        _, _, kind, length = struct.unpack(">QIII", stream.recv(20, socket.MSG_WAITALL))
        stream.recv(length, socket.MSG_WAITALL)
        return kind

    def test_without_it_nothing_is_told(self):
        daemon = self.serve(f"tls-creds-psk,id=tls,endpoint=server,dir={self.keys()}")
        stream = self.plain(daemon)
        go = struct.pack(">I", 4) + b"disk\0\0"
        for number, data in ((3, b""), (6, go), (7, go), (8, b""), (9, go), (10, go), (77, b"abc")):
            stream.sendall(self.option(number, data))
            self.assertEqual(self.answer(stream), 0x80000005)
        stream.sendall(self.option(2))
        self.assertEqual(self.answer(stream), 1)
        stream.close()
        stream = self.plain(daemon)
        stream.sendall(self.option(1, b"disk"))
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(stream.recv(1), b"")
        stream.close()

    def test_plain_text_behind_the_request_for_tls_is_not_taken(self):
        folder = self.keys()
        daemon = self.serve(f"tls-creds-psk,id=tls,endpoint=server,dir={folder}")
        go = self.option(7, struct.pack(">I", 4) + b"disk\0\0")
        stream = self.plain(daemon)
        stream.sendall(self.option(5) + go)
        self.assertEqual(self.answer(stream), 1)
        rest = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := stream.recv(4096):
                rest += piece
        self.assertNotIn(struct.pack(">Q", 0x3E889045565A9), rest)  # no answer to an option, in plain text or not
        stream.close()
        self.client(daemon, folder, "alice").shutdown()

    @unittest.skipUnless(gnutls, "needs libgnutls")
    def test_new_keys_among_data(self):
        """A change of keys is followed by data, or by half of them, in one piece of the stream."""
        folder = self.keys()
        daemon = self.serve(f"tls-creds-psk,id=tls,endpoint=server,dir={folder}")
        stream = self.plain(daemon)
        stream.sendall(self.option(5))
        self.assertEqual(self.answer(stream), 1)
        peer = Peer(stream, b"alice", b"0" * 64)
        unknown = self.option(99)
        peer.hold()
        for both in (True, False):
            peer.change_keys(both)
        peer.send(unknown)
        peer.change_keys(True)
        peer.send(unknown[:7])
        peer.change_keys(False)
        peer.send(unknown[7:])
        peer.release()
        self.assertEqual([self.answer(peer) for _ in range(2)], [0x80000001] * 2)
        # Plain text in the middle of a stream that is not.
        stream.sendall(unknown)
        with self.assertRaises(EOFError):
            self.answer(peer)
        stream.close()
        self.client(daemon, folder, "bob").shutdown()

    def test_handshakes_that_are_cut_off_or_bent(self):
        """Somebody in between cuts the stream after any byte, or changes one: the client fails or works, the server
        goes on."""
        folder = self.keys()
        daemon = self.serve(f"tls-creds-psk,id=tls,endpoint=server,dir={folder}")
        path = self.path("between")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen(5)

        def between(limit, bend):
            """Passes bytes on, both ways; of the client's the one numbered `limit` is changed, or the last."""
            client, _ = listener.accept()
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            server.connect(daemon.nbd_path)
            passed = 0
            with client, server:
                while streams := select.select([client, server], [], [], 0.15)[0]:  # both wait for more: it is over
                    for ready in streams:
                        data = bytearray(ready.recv(65536))
                        if ready is server:
                            client.sendall(data)
                        else:
                            if passed <= limit < passed + len(data) and bend:
                                data[limit - passed] ^= 1 << bend % 8
                            elif not bend:
                                data = data[:max(0, limit - passed)]
                            passed += len(data)
                            server.sendall(data)
                        if not data:
                            return

        def quietly(limit, bend):
            with contextlib.suppress(OSError):
                between(limit, bend)

        for _ in range(scale(10, 800)):
            limit, bend = self.random.randrange(20, 700), self.random.choice((0, 0, 1, 4, 8))
            thread = threading.Thread(target=quietly, args=(limit, bend))
            thread.start()
            handle = nbd.NBD()
            handle.set_tls(nbd.TLS_REQUIRE)
            handle.set_tls_psk_file(os.path.join(folder, "keys.psk"))
            handle.set_tls_username("alice")
            handle.set_export_name("disk")
            with contextlib.suppress(nbd.Error):
                handle.connect_unix(path)
                self.assertEqual(handle.pread(512, 0), bytes(512))
                handle.shutdown()
            del handle
            thread.join()
        listener.close()
        self.client(daemon, folder, "alice").shutdown()

    def test_who_says_nothing_is_dropped(self):
        folder = self.keys()
        image = self.create_image("quiet.qcow2", SIZE)
        daemon = self.daemon("--object", f"tls-creds-psk,id=tls,endpoint=server,dir={folder}", "--blockdev",
                             f"qcow2,node-name=disk,file.driver=file,file.filename={image}", "--nbd-server",
                             f"addr.type=unix,addr.path={self.path('sock')},tls-creds=tls,handshake-max-seconds=1",
                             "--export", "nbd,id=e0,node-name=disk")
        daemon.nbd_path = self.path("sock")
        stream = self.plain(daemon)
        stream.sendall(self.option(5))
        self.assertEqual(self.answer(stream), 1)
        start = time.monotonic()
        stream.sendall(b"\x16\x03\x01\x02")  # the beginning of a record
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(stream.recv(1), b"")
        self.assertLess(time.monotonic() - start, 15)
        stream.close()
        self.client(daemon, folder, "bob").shutdown()


if __name__ == "__main__":
    unittest.main()
