/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The configuration space of the block device, made anew whenever it is asked for: only the size and the cache mode
 * change. The cache mode outlives us beside the record of what is in flight. The space is filled whatever features were
 * negotiated; a driver looks at what it has negotiated.
 */
#include "export/vhost_user/config.h"
#include "export/vhost_user/session.h"
#include <errno.h>
#include <glib.h>
#include <stddef.h>
#include <string.h>

void vhost_config_read(const struct vhost_session *session, uint8_t ret[VHOST_CONFIG_BYTES_MAX])
{
    const struct vhost_device *device = &session->device;
    uint32_t block_sectors = device->block_bytes / 512;
    struct virtio_blk_config config = {
        .capacity = atomic_load(device->size) / 512,
        .seg_max = VHOST_SEGMENTS_MAX,
        .blk_size = device->block_bytes,
        .min_io_size = 1,
        .opt_io_size = 1,
        .wce = atomic_load(&device->write_back),
        .num_queues = (uint16_t)session->config.queues,
        .max_discard_sectors = VHOST_DISCARD_SECTORS_MAX,
        .max_discard_seg = VHOST_RANGES_MAX,
        .discard_sector_alignment = block_sectors,
        .max_write_zeroes_sectors = VHOST_ZEROES_SECTORS_MAX,
        .max_write_zeroes_seg = VHOST_RANGES_MAX,
        .write_zeroes_may_unmap = 1,
    };

    memset(ret, 0, VHOST_CONFIG_BYTES_MAX);
    memcpy(ret, &config, sizeof(config));
}

void vhost_set_write_back(struct vhost_session *session, bool write_back)
{
    atomic_store(&session->device.write_back, write_back && !session->config.writethrough);
    if (session->note) {
        session->note->write_through = !write_back;
    }
}

int vhost_config_write(struct vhost_session *session, const struct vhost_config_message *message)
{
    if (message->offset != offsetof(struct virtio_blk_config, wce) || message->bytes != 1 || message->payload[0] > 1) {
        return -EINVAL;
    }
    vhost_set_write_back(session, message->payload[0]);
    return 0;
}
