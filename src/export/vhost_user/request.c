/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a request of the guest asks for (virtio 1.2, section 5.2.6), done over the export's backend. Data go from and to
 * the guest's memory; everything else (the header, the ranges of a discard) is copied once and looked at there.
 * 1. a request that fails its checks touches no backend;
 * 2. the status byte is the last one that the guest lets us write, and is written last.
 * The guest may change data that it writes while they are written: what is stored then is its own affair.
 */
#include "base/size.h"
#include "block/user.h"
#include "export/vhost_user/config.h"
#include "export/vhost_user/queue.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define SECTOR 512

/* Where the data of a request are: without the header, without the status. */
struct place {
    struct buffers data;
    uint64_t offset, bytes;
};

static int status_of(int r)
{
    return r == 0 ? VIRTIO_BLK_S_OK : r == -ENOTSUP || r == -EOPNOTSUPP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
}

static unsigned write_flags(const struct vhost_device *device)
{
    return atomic_load_explicit(&device->write_back, memory_order_relaxed) ? 0 : REQUEST_FUA;
}

/* Is [sector, sector + bytes) inside the disk and made of whole logical blocks? */
static bool range_is_good(const struct vhost_device *device, uint64_t sector, uint64_t bytes, uint64_t *ret_offset)
{
    uint64_t size = atomic_load_explicit(device->size, memory_order_acquire);

    if (sector > size / SECTOR || bytes > size - sector * SECTOR) {
        return false;
    }
    *ret_offset = sector * SECTOR;
    return is_aligned(*ret_offset | bytes, device->block_bytes);
}

static int coroutine_fn run_read(const struct vhost_device *device, const struct place *place)
{
    return place->bytes ? backend_read(device->backend, place->offset, place->bytes, place->data, 0) : 0;
}

static int coroutine_fn run_write(const struct vhost_device *device, const struct place *place)
{
    if (!device->writable) {
        return -EROFS;
    }
    return place->bytes ? backend_write(device->backend, place->offset, place->bytes, place->data, write_flags(device))
                        : 0;
}

static int coroutine_fn run_range(const struct vhost_device *device, bool discard,
                                  const struct virtio_blk_discard_write_zeroes *range)
{
    uint64_t offset, bytes = (uint64_t)range->num_sectors * SECTOR;
    unsigned flags = range->flags;

    if (flags & ~(discard ? 0u : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)) {
        return -ENOTSUP;
    }
    if (range->num_sectors > (discard ? VHOST_DISCARD_SECTORS_MAX : VHOST_ZEROES_SECTORS_MAX) ||
        !range_is_good(device, range->sector, bytes, &offset)) {
        return -EINVAL;
    }
    if (!bytes) {
        return 0;
    }
    if (discard) {
        return backend_discard(device->backend, offset, bytes);
    }
    return backend_write_zeroes(device->backend, offset, bytes, write_flags(device) | (flags ? REQUEST_MAY_UNMAP : 0));
}

/* Discard or write zeroes: the data are ranges. */
static int coroutine_fn run_ranges(const struct vhost_device *device, bool discard, const struct place *place)
{
    struct virtio_blk_discard_write_zeroes ranges[VHOST_RANGES_MAX];
    int r = 0;

    if (!device->writable) {
        return -EROFS;
    }
    if (!place->bytes || place->bytes % sizeof(ranges[0]) || place->bytes > sizeof(ranges)) {
        return -EINVAL;
    }
    buffers_copy_out(place->data, ranges, place->bytes);
    for (unsigned i = 0; i < place->bytes / sizeof(ranges[0]) && r == 0; i++) {
        r = run_range(device, discard, &ranges[i]);
    }
    if (r == 0 && discard && write_flags(device)) {
        r = backend_flush(device->backend);
    }
    return r;
}

static int run_id(const struct vhost_device *device, const struct place *place)
{
    buffers_copy_in(place->data, device->name, min_u64(place->bytes, sizeof(device->name)));
    return 0;
}

/* The last byte that the guest lets us write, taken out of the chain. */
static uint8_t *take_status(struct ring_chain *chain)
{
    struct iovec *last = &chain->iov[chain->out + chain->in - 1];
    uint8_t *status = (uint8_t *)last->iov_base + last->iov_len - 1;

    chain->in_bytes--;
    if (--last->iov_len == 0) {
        chain->in--;
    }
    return status;
}

static int coroutine_fn run(const struct vhost_device *device, const struct ring_chain *chain,
                            const struct virtio_blk_outhdr *header)
{
    struct buffers out = {chain->iov, chain->out, 0}, in = {chain->iov + chain->out, chain->in, 0};
    struct place read = {.data = in, .bytes = chain->in_bytes},
                 write = {.data = buffers_advance(out, sizeof(*header)), .bytes = chain->out_bytes - sizeof(*header)};

    switch (header->type) {
    case VIRTIO_BLK_T_IN:
        return read.bytes <= VHOST_TRANSFER_MAX && range_is_good(device, header->sector, read.bytes, &read.offset)
                   ? run_read(device, &read)
                   : -EINVAL;
    case VIRTIO_BLK_T_OUT:
        return write.bytes <= VHOST_TRANSFER_MAX && range_is_good(device, header->sector, write.bytes, &write.offset)
                   ? run_write(device, &write)
                   : -EINVAL;
    case VIRTIO_BLK_T_FLUSH:
        return backend_flush(device->backend);
    case VIRTIO_BLK_T_GET_ID:
        return run_id(device, &read);
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        return run_ranges(device, header->type == VIRTIO_BLK_T_DISCARD, &write);
    default:
        return -ENOTSUP;
    }
}

int coroutine_fn vhost_block_run(const struct vhost_device *device, struct ring_chain *chain)
{
    struct virtio_blk_outhdr header;
    uint64_t room = chain->in_bytes;

    if (chain->out_bytes < sizeof(header) || !room) {
        return -EPROTO;
    }
    buffers_copy_out((struct buffers){chain->iov, chain->out, 0}, &header, sizeof(header));
    uint8_t *status = take_status(chain);
    *status = (uint8_t)status_of(run(device, chain, &header));
    return (int)min_u64(room, G_MAXINT32);
}
