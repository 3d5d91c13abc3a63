/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_VHOST_USER_VHOST_USER_FORMAT_H
#define INTERLOCK_EXPORT_VHOST_USER_VHOST_USER_FORMAT_H

#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <stdint.h>

/*
 * What goes over the wire and lies in shared memory: the vhost-user protocol (its interoperability document), rings and
 * the block device (virtio 1.2; Linux' uapi headers have most of it). Messages are in the machine's byte order, rings
 * and requests little-endian.
 */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "rings are little-endian"
#endif

struct vhost_header {
    uint32_t request;
    uint32_t flags;
    uint32_t bytes; /* of the payload */
};
#define VHOST_VERSION 1u
#define VHOST_VERSION_MASK 3u
#define VHOST_FLAG_REPLY 4u
#define VHOST_FLAG_NEED_REPLY 8u

/* The front end's requests. */
enum vhost_request_type {
    VHOST_GET_FEATURES = 1,
    VHOST_SET_FEATURES = 2,
    VHOST_SET_OWNER = 3,
    VHOST_RESET_OWNER = 4,
    VHOST_SET_MEM_TABLE = 5,
    VHOST_SET_VRING_NUM = 8,
    VHOST_SET_VRING_ADDR = 9,
    VHOST_SET_VRING_BASE = 10,
    VHOST_GET_VRING_BASE = 11,
    VHOST_SET_VRING_KICK = 12,
    VHOST_SET_VRING_CALL = 13,
    VHOST_SET_VRING_ERR = 14,
    VHOST_GET_PROTOCOL_FEATURES = 15,
    VHOST_SET_PROTOCOL_FEATURES = 16,
    VHOST_GET_QUEUE_NUM = 17,
    VHOST_SET_VRING_ENABLE = 18,
    VHOST_SET_BACKEND_REQ_FD = 21,
    VHOST_GET_CONFIG = 24,
    VHOST_SET_CONFIG = 25,
    VHOST_GET_INFLIGHT_FD = 31,
    VHOST_SET_INFLIGHT_FD = 32,
    VHOST_RESET_DEVICE = 34,
    VHOST_GET_MAX_MEM_SLOTS = 36,
    VHOST_ADD_MEM_REG = 37,
    VHOST_REM_MEM_REG = 38,
    VHOST_SET_STATUS = 39,
    VHOST_GET_STATUS = 40,
    VHOST_REQUEST_COUNT
};
/* The back end's. */
#define VHOST_BACKEND_CONFIG_CHANGE 2u

/* A feature bit that virtio does not use. */
#define VHOST_F_PROTOCOL_FEATURES 30

enum vhost_protocol_feature {
    VHOST_PROTOCOL_F_MQ = 0,
    VHOST_PROTOCOL_F_REPLY_ACK = 3,
    VHOST_PROTOCOL_F_BACKEND_REQ = 5,
    VHOST_PROTOCOL_F_CONFIG = 9,
    VHOST_PROTOCOL_F_INFLIGHT_SHMFD = 12,
    VHOST_PROTOCOL_F_RESET_DEVICE = 13,
    VHOST_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15,
    VHOST_PROTOCOL_F_STATUS = 16,
};

struct vhost_vring_number {
    uint32_t index;
    uint32_t number;
};
struct vhost_vring_addresses {
    uint32_t index;
    uint32_t flags;
    uint64_t descriptors, used, available, log; /* in the front end's address space */
};
/* SET_VRING_KICK, CALL and ERR: the index, and whether there is no descriptor. */
#define VHOST_VRING_INDEX_MASK UINT64_C(0xff)
#define VHOST_VRING_NO_FD UINT64_C(0x100)

struct vhost_region {
    uint64_t guest, size, user, offset;
};
#define VHOST_TABLE_REGIONS_MAX 8
struct vhost_memory_table {
    uint32_t count;
    uint32_t padding;
    struct vhost_region regions[VHOST_TABLE_REGIONS_MAX];
};
struct vhost_single_region {
    uint64_t padding;
    struct vhost_region region;
};

#define VHOST_CONFIG_BYTES_MAX 256
struct vhost_config_message {
    uint32_t offset, bytes, flags;
    uint8_t payload[VHOST_CONFIG_BYTES_MAX];
};
#define VHOST_CONFIG_HEAD 12

struct vhost_inflight {
    uint64_t size, offset;
    uint16_t queues, queue_size;
};
#define VHOST_INFLIGHT_BYTES 20 /* without the padding at its end, which QEMU sends and wants, too */

/* Any of them. */
union vhost_payload {
    uint64_t number;
    struct vhost_vring_number vring;
    struct vhost_vring_addresses addresses;
    struct vhost_memory_table table;
    struct vhost_single_region region;
    struct vhost_config_message config;
    struct vhost_inflight inflight;
};
_Static_assert(sizeof(struct vhost_header) == 12, "wire format");
_Static_assert(sizeof(struct vhost_vring_addresses) == 40, "wire format");
_Static_assert(sizeof(struct vhost_region) == 32, "wire format");
_Static_assert(sizeof(struct vhost_memory_table) == 264, "wire format");
_Static_assert(sizeof(struct vhost_inflight) == 24, "wire format");
_Static_assert(sizeof(struct vhost_single_region) == 40, "wire format");
_Static_assert(sizeof(struct vhost_config_message) == 268, "wire format");

/* What is in flight, in memory that survives us: one region for each queue. */
struct inflight_head {
    uint64_t features;
    uint16_t version; /* 0: never used */
    uint16_t count;   /* of entries: the queue's size */
};
#define INFLIGHT_VERSION 1
struct inflight_split_entry {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;    /* of the last batch */
    uint64_t counter; /* order of arrival */
};
struct inflight_split {
    uint64_t features;
    uint16_t version, count;
    uint16_t last_batch; /* head of the list of what was used last */
    uint16_t used_index; /* as of the used ring */
    struct inflight_split_entry entries[];
};
struct inflight_packed_entry {
    uint8_t inflight;
    uint8_t padding;
    uint16_t next; /* free entry, or one of the same chain */
    uint16_t last; /* of the chain: in its head */
    uint16_t length;
    uint64_t counter;
    uint16_t id, flags;
    uint32_t bytes;
    uint64_t address;
};
struct inflight_packed {
    uint64_t features;
    uint16_t version, count;
    uint16_t free, old_free;
    uint16_t used_index, old_used_index;
    uint8_t used_wrap, old_used_wrap;
    uint8_t padding[7];
    struct inflight_packed_entry entries[];
};
_Static_assert(sizeof(struct inflight_split) == 16 && sizeof(struct inflight_split_entry) == 16, "shared format");
_Static_assert(sizeof(struct inflight_packed) == 32 && sizeof(struct inflight_packed_entry) == 32, "shared format");

/* Ours, behind the regions: what else has to survive us. Other back ends look at the regions alone. */
struct inflight_note {
    char magic[8];
    uint8_t write_through; /* the guest has switched the cache off, and will not say so again */
    uint8_t padding[55];
};
#define INFLIGHT_NOTE_MAGIC "ILvublk1"
_Static_assert(sizeof(struct inflight_note) == 64, "shared format");

/* Flags of a packed descriptor. */
#define PACKED_AVAILABLE (1u << VRING_PACKED_DESC_F_AVAIL)
#define PACKED_USED (1u << VRING_PACKED_DESC_F_USED)

#endif
