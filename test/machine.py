# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real guest: Debian's cloud kernel under qemu-system, with a shell on its serial line and vhost-user-blk disks.

`Machine` starts it with an initial RAM disk made here (busybox, the kernel's virtio modules, and fio if wanted) and
types commands into its shell. KVM is used where it works, else TCG.
"""
import glob
import gzip
import io
import os
import re
import shutil
import subprocess
import time

from harness import SLOWNESS, Qmp, die_with_parent, run

QEMU = "qemu-system-x86_64"
BUSYBOX = "/bin/busybox"
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
mount -t tmpfs none /tmp
for module in {modules}; do insmod /modules/$module.ko || echo "$module: not loaded"; done
stty -echo
PS1= echo shell-is-there
exec setsid cttyhack sh
"""


def kernel():
    """The newest of Debian's cloud kernels: (image, folder of its modules), or None."""
    found = sorted(glob.glob("/boot/vmlinuz-*-cloud-amd64"), key=os.path.getmtime)
    for image in reversed(found):
        modules = "/lib/modules/" + os.path.basename(image).removeprefix("vmlinuz-")
        if os.path.isdir(modules):
            return image, modules
    return None


def why_not():
    """What is missing for a guest, or None."""
    if not shutil.which(QEMU):
        return f"{QEMU} is not installed"
    version = run(QEMU, "--version").stdout.split("version ")[1]
    if int(version.split(".")[0]) < 10:
        return f"{QEMU} is older than 10 (no reconnect-ms): {version.split()[0]}"
    if not kernel():
        return "no Debian cloud kernel in /boot (linux-image-cloud-amd64)"
    if not os.path.exists(BUSYBOX) or b"statically linked" not in subprocess.run(
            ["file", "-L", BUSYBOX], capture_output=True, check=False).stdout:
        return "no static busybox (busybox-static)"
    return None


class Archive:
    """A cpio archive in memory, as the kernel unpacks it (newc)."""

    def __init__(self):
        self.out = io.BytesIO()
        self.number = 0
        self.folders = set()

    def _entry(self, name, mode, data=b""):
        self.number += 1
        name = name.encode() + b"\0"
        fields = (self.number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        self.out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
        self.out.write(b"\0" * (-self.out.tell() % 4) + data)
        self.out.write(b"\0" * (-self.out.tell() % 4))

    def folder(self, name):
        parts = name.strip("/").split("/")
        for length in range(1, len(parts) + 1):
            path = "/".join(parts[:length])
            if path and path not in self.folders:
                self.folders.add(path)
                self._entry(path, 0o040755)

    def file(self, name, data, mode=0o755):
        self.folder(os.path.dirname(name))
        self._entry(name.strip("/"), 0o100000 | mode, data)

    def copy(self, path, name=None):
        with open(path, "rb") as source:
            self.file(name or path, source.read())

    def bytes(self):
        self._entry("TRAILER!!!", 0)
        return self.out.getvalue()


def add_program(archive, path):
    """A program of the host with the libraries that it is linked with."""
    archive.copy(path)
    for library in re.findall(r"(/\S+) \(0x", run("ldd", path).stdout):
        archive.copy(library)


def ram_disk(path, *programs):
    modules = kernel()[1]
    archive = Archive()
    for folder in ("dev", "proc", "sys", "tmp"):
        archive.folder(folder)
    archive.copy(BUSYBOX, "bin/busybox")
    for name in MODULES:
        found = glob.glob(f"{modules}/kernel/**/{name}.ko*", recursive=True)[0]
        if not found.endswith(".ko"):
            raise AssertionError(f"{found}: compressed modules are not unpacked here")
        archive.copy(found, f"modules/{name}.ko")
    for program in programs:
        add_program(archive, program)
    archive.file("init", INIT.format(modules=" ".join(MODULES)).encode())
    with gzip.open(path, "wb", 1) as out:
        out.write(archive.bytes())
    return path


def kvm_works():
    """The processor says that it has what KVM needs; a /dev/kvm without that does not get a guest far."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as text:
        flags = re.search(r"^flags\s*:.*\b(vmx|svm)\b", text.read(), re.MULTILINE)
    return bool(flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


class Machine:
    """A guest; each of `disks` is the path of a vhost-user-blk socket and options of its device."""

    def __init__(self, test, disks, *programs, memory=256, processors=2):
        self.directory = test.directory
        self.time_limit = 120 * SLOWNESS
        self.kvm = kvm_works()
        self.text = ""
        self.serial = None
        monitor = os.path.join(self.directory, "machine.qmp")
        line = [
            QEMU, "-accel", "kvm" if self.kvm else "tcg,thread=multi", "-machine", "q35", "-cpu",
            "host" if self.kvm else "qemu64", "-smp", str(processors), "-m", f"{memory}M", "-nodefaults", "-display", "none",
            "-object", f"memory-backend-memfd,id=ram,size={memory}M,share=on", "-numa", "node,memdev=ram",
            "-kernel", kernel()[0], "-initrd", ram_disk(os.path.join(self.directory, "ram-disk"), *programs),
            "-append", "console=ttyS0 quiet panic=-1 oops=panic no_timer_check nokaslr mitigations=off tsc=reliable random.trust_cpu=on",
            "-no-reboot", "-serial", "stdio", "-qmp", f"unix:{monitor},server=on,wait=off",
        ]
        for number, (path, options) in enumerate(disks):
            line += ["-chardev", f"socket,id=disk{number},path={path},reconnect-ms=100",
                     "-device", f"vhost-user-blk-pci,chardev=disk{number}{options}"]
        self.stderr_path = os.path.join(self.directory, "machine.stderr")
        with open(self.stderr_path, "wb") as stderr:
            self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                                            preexec_fn=die_with_parent)
        test.addCleanup(self.end)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.qmp = None
        self.monitor = monitor
        self.count = 0
        self.wait_for("shell-is-there\n")
        time.sleep(0.1)  # what comes before the shell has set its terminal up is lost
        self.run("true")

    def connect(self):
        self.qmp = Qmp(self.monitor)
        return self.qmp

    def _read(self):
        data = self.process.stdout.read()
        if data:
            self.text += data.decode("utf-8", "replace").replace("\r", "")
        elif self.process.poll() is not None:
            raise AssertionError(f"the machine has ended:\n{self.text[-4000:]}\n{self.stderr()}")
        else:
            time.sleep(0.01)

    def stderr(self):
        with open(self.stderr_path, encoding="utf-8", errors="replace") as text:
            return text.read()[-4000:]

    def wait_for(self, text):
        deadline = time.monotonic() + self.time_limit
        while text not in self.text:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the guest does not come up:\n{self.text[-4000:]}\n{self.stderr()}")
            self._read()
        self.text = ""

    def begin(self, command):
        """Types a command; end() waits for it."""
        self.count += 1
        self.process.stdin.write(f"( {command} ) 2>&1; echo done-{self.count}=$?\n".encode())
        self.process.stdin.flush()
        return self.count

    def finish(self, number, timeout=None, check=True):
        """What the command has printed."""
        deadline = time.monotonic() + (timeout or self.time_limit)
        while True:
            found = re.search(rf"done-{number}=(\d+)\n", self.text)
            if found:
                output, self.text = self.text[: found.start()].replace("/ # ", ""), self.text[found.end() :]
                if check and found.group(1) != "0":
                    raise AssertionError(f"a command of the guest failed ({found.group(1)}):\n{output[-4000:]}")
                return output
            if time.monotonic() > deadline:
                raise TimeoutError(f"the guest does not answer:\n{self.text[-4000:]}\n{self.stderr()}")
            self._read()

    def run(self, command, timeout=None, check=True):
        return self.finish(self.begin(command), timeout, check)

    def end(self):
        if self.qmp:
            self.qmp.close()
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
