#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# A real file system on a chain of five images (base <- a <- b <- c <- top), reshaped while a client writes to the disk.
# Every command is printed before it runs, and every line of output is that of the command above it. The files stay in
# the folder that the first line names, so that each step can be looked at and repeated.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/build-state/demo}
client_pid=

say() { printf '\n# %s\n' "$*"; }

# Shows a command line and runs it.
run() {
    printf '$ %s\n' "$1"
    eval "$1"
}

# The same for one that must fail.
run_refused() {
    printf '$ %s\n' "$1"
    if eval "$1"; then
        echo "demo: that should have been refused" >&2
        exit 1
    fi
}

# Whatever happens, nothing stays behind running.
clean_up() {
    status=$?
    [ -z "$client_pid" ] || kill "$client_pid" 2>/dev/null || true
    if [ -f "$folder/pid" ]; then kill "$(cat "$folder/pid")" 2>/dev/null || true; fi
    [ $status = 0 ] || echo "demo: failed with status $status; the files are in $folder" >&2
}
trap clean_up EXIT

rm -rf "$folder"
run "mkdir -p $folder && cd $folder"
run "export PATH=$root/build:$root/build/test:/usr/sbin:/sbin:\$PATH INTERLOCK_QMP=$folder/qmp"

say "A file system from real files: the first 160 MiB of a disk of 200 MiB."
run 'mkdir files && cp -rL /usr/lib/python3.*/ files/ && head -c 40M /dev/urandom > files/random'
run '(cd files && find . -type f -print0 | sort -z | xargs -0 sha256sum) > sums && wc -l sums'
run 'mkfs.ext4 -q -d files -b 4096 fs.raw 160M && e2fsck -fn fs.raw'
run 'cp fs.raw expected.raw && truncate -s 200M expected.raw'

say "Five images. Each holds a fifth of the file system, and base has something older under the fifths of the others,
# so that only the whole chain, in the right order, is the file system."
run 'qemu-img create -q -f qcow2 base.qcow2 200M && qemu-io -c "write -q -P 0xba 0 160M" base.qcow2'
below=base
for name in a b c top; do
    run "qemu-img create -q -f qcow2 -b $below.qcow2 -F qcow2 $name.qcow2"
    below=$name
done
run 'for piece in {0..19}; do
      images=(base a b c top); image=${images[piece % 5]}; at=offset=$((piece * 8))M,size=8M
      qemu-img convert -n -S 0 --image-opts --target-image-opts driver=raw,$at,file.filename=fs.raw driver=raw,$at,file.driver=qcow2,file.file.filename=$image.qcow2
  done'
run 'qemu-img compare -f raw -F qcow2 expected.raw top.qcow2'

say "The daemon opens the chain and serves its top over NBD, from an I/O thread of its own."
run 'interlock daemon --object iothread,id=io --nbd-server addr.type=unix,addr.path=nbd \
    --blockdev qcow2,node-name=base,file.driver=file,file.filename=base.qcow2 \
    --blockdev qcow2,node-name=a,file.driver=file,file.filename=a.qcow2,backing=base \
    --blockdev qcow2,node-name=b,file.driver=file,file.filename=b.qcow2,backing=a \
    --blockdev qcow2,node-name=c,file.driver=file,file.filename=c.qcow2,backing=b \
    --blockdev qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,backing=c \
    --export nbd,id=disk,node-name=top,writable=on,iothread=io \
    --chardev socket,id=q,path=qmp,server=on,wait=off --monitor chardev=q --daemonize --pidfile pid'
run 'interlock graph'

say "From here on a client writes, reads and verifies the part of the disk behind the file system, without a pause."
run 'verify-client --socket nbd --export top --ledger ledger --new --seed 2 --offset 167772160 --length 41943040 > client.log 2>&1 &'
client_pid=$!
run 'nbdinfo --size "nbd+unix:///top?socket=nbd"'

say "Two jobs at once: a goes down into base, and c takes in everything above a. c then leans on base."
run 'interlock commit a --into=base --job-id=commit-a --speed=10000000 --async'
run 'interlock stream c --above=a --job-id=stream-c --speed=8000000 --async'
run 'interlock status'

say "A third would tread on them: b is being streamed away. It is refused, with the reason."
run_refused 'interlock commit b --into=a'
run 'interlock access'

say "Both run to their end."
run 'interlock job wait commit-a stream-c'
run 'interlock graph'

say "A backup of the disk as it is at this moment, while the client writes on; and a mirror that takes its place."
run 'interlock backup top --to backup.qcow2'
run 'interlock mirror top --to disk.qcow2 --replace'
run 'interlock graph'

say "The client has seen no wrong byte."
run "kill -TERM $client_pid && wait $client_pid && cat client.log"
client_pid=
run 'verify-client --socket nbd --export top --ledger ledger --verify'
run 'pid=$(cat pid) && kill -TERM $pid && timeout 5 tail -s 0.1 --pid=$pid -f /dev/null '

say "At rest: the peer's tools find the images clean, the file system and every file are what they were."
run 'for image in base c top backup disk; do qemu-img check $image.qcow2 || exit; done'
run 'qemu-img info --backing-chain top.qcow2 | grep -E "^(image|backing file):"'
run 'qemu-img convert -O raw backup.qcow2 backup.raw && cmp -n 167772160 fs.raw backup.raw && echo "the backup is whole"'
run 'qemu-img convert -O raw disk.qcow2 after.raw && verify-client --ledger ledger --file after.raw'
run 'dd if=after.raw of=expected.raw bs=1M skip=160 seek=160 count=40 conv=notrunc status=none'
run 'qemu-img compare -f raw -F qcow2 expected.raw disk.qcow2'
run 'truncate -s 160M after.raw && e2fsck -fn after.raw'
run 'mkdir after && debugfs -R "rdump / after" after.raw && (cd after && sha256sum --quiet -c ../sums && echo "all files are the same")'
