/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_VHOST_USER_CONFIG_H
#define INTERLOCK_EXPORT_VHOST_USER_CONFIG_H

#include "base/size.h"
#include "export/vhost_user/vhost_user_format.h"
#include <stdbool.h>

/* What the device is and can: its features and its configuration space (virtio 1.2, sections 5.2.3 and 5.2.4). */
struct vhost_device;

#define VHOST_QUEUES_MAX 256 /* their indices are bytes in some messages */
#define VHOST_BLOCK_BYTES_MAX ((uint32_t)(2 * MiB))
#define VHOST_SEGMENTS_MAX 126
#define VHOST_TRANSFER_MAX GiB /* of one request */
#define VHOST_DISCARD_SECTORS_MAX ((uint32_t)(GiB / 512))
#define VHOST_ZEROES_SECTORS_MAX ((uint32_t)(GiB / 512))
#define VHOST_RANGES_MAX 32 /* of one discard or write zeroes */

#define VHOST_PROTOCOL_FEATURES                                                                                \
    (1ULL << VHOST_PROTOCOL_F_MQ | 1ULL << VHOST_PROTOCOL_F_REPLY_ACK | 1ULL << VHOST_PROTOCOL_F_BACKEND_REQ | \
     1ULL << VHOST_PROTOCOL_F_CONFIG | 1ULL << VHOST_PROTOCOL_F_INFLIGHT_SHMFD |                               \
     1ULL << VHOST_PROTOCOL_F_RESET_DEVICE | 1ULL << VHOST_PROTOCOL_F_CONFIGURE_MEM_SLOTS |                    \
     1ULL << VHOST_PROTOCOL_F_STATUS)

static inline uint64_t vhost_features(bool writable)
{
    return 1ULL << VIRTIO_BLK_F_SEG_MAX | 1ULL << VIRTIO_BLK_F_BLK_SIZE | 1ULL << VIRTIO_BLK_F_FLUSH |
           1ULL << VIRTIO_BLK_F_TOPOLOGY | 1ULL << VIRTIO_BLK_F_CONFIG_WCE | 1ULL << VIRTIO_BLK_F_MQ |
           (writable ? 1ULL << VIRTIO_BLK_F_DISCARD | 1ULL << VIRTIO_BLK_F_WRITE_ZEROES : 1ULL << VIRTIO_BLK_F_RO) |
           1ULL << VIRTIO_RING_F_INDIRECT_DESC | 1ULL << VIRTIO_RING_F_EVENT_IDX | 1ULL << VHOST_F_PROTOCOL_FEATURES |
           1ULL << VIRTIO_F_VERSION_1 | 1ULL << VIRTIO_F_RING_PACKED;
}

#endif
