/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_VHOST_USER_RING_H
#define INTERLOCK_EXPORT_VHOST_USER_RING_H

#include "export/vhost_user/memory.h"
#include "export/vhost_user/vhost_user_format.h"
#include <stdbool.h>
#include <stdint.h>

/*
 * A virtqueue of either layout, seen from the device (virtio 1.2, sections 2.7 and 2.8), with the record of what is in
 * flight if the front end keeps one. One loop at a time. Whatever lies in shared memory may change under us: each word
 * of it is read once, and looked at in our copy.
 */
struct ring_ops;

#define RING_SIZE_MAX 1024
/* Descriptors of one request, and pieces of memory that they may lead to. */
#define RING_CHAIN_MAX RING_SIZE_MAX
#define RING_IOV_MAX (RING_CHAIN_MAX + VHOST_REGIONS_MAX)

/* What the front end has said of a queue. */
struct ring_config {
    const struct vhost_memory *memory;
    bool packed, event_index, indirect;
    unsigned size;                         /* of a split ring: a power of two */
    uint64_t descriptors, available, used; /* addresses of the front end */
    uint32_t base;                         /* as in SET_VRING_BASE */
    void *inflight;                        /* the queue's region, or NULL */
};

/* One request, as the guest has put it into the ring. */
struct ring_chain {
    uint16_t id;          /* split: of its first descriptor */
    uint16_t descriptors; /* packed: places in the ring */
    uint16_t entry;       /* packed: its record in the region */
    unsigned out, in;     /* how many of iov are read, and how many after them are written */
    uint64_t out_bytes, in_bytes;
    struct iovec iov[RING_IOV_MAX];
};

struct ring {
    struct ring_config config;
    const struct ring_ops *ops;
    const char *broken; /* what was wrong with the guest's ring; nothing more is taken from it or put into it */

    uint16_t next_available, next_used; /* split: free-running; packed: places */
    bool available_wrap, used_wrap;     /* packed */
    unsigned unsignalled;               /* places used since ring_wants_call() was asked */
    union {
        struct {
            struct vring_desc *descriptors;
            struct vring_avail *available;
            struct vring_used *used;
        } split;
        struct {
            struct vring_packed_desc *descriptors;
            struct vring_packed_desc_event *driver, *device;
        } packed;
    };

    /* The region, and what of it we must be able to rely on. */
    uint64_t counter;
    uint16_t free_entry, *next_entry; /* packed */
    uint16_t *resubmit;               /* what was in flight when we came, in order: heads or entries */
    unsigned resubmit_at, resubmit_count;

    struct vring_desc table[RING_CHAIN_MAX]; /* an indirect table */
};

/* What differs between the layouts. */
struct ring_ops {
    int (*start)(struct ring *ring);
    int (*pop)(struct ring *ring, struct ring_chain *ret);
    int (*resubmit)(struct ring *ring, unsigned what, struct ring_chain *ret);
    void (*push)(struct ring *ring, const struct ring_chain *chain, uint32_t written);
    bool (*enable_kicks)(struct ring *ring);
    void (*disable_kicks)(struct ring *ring);
    bool (*wants_call)(struct ring *ring, unsigned pushed);
};
extern const struct ring_ops ring_split_ops, ring_packed_ops;

/* Bytes that a queue's region takes, for both layouts. */
uint64_t ring_inflight_bytes(unsigned size);

/* 0; -EFAULT: the ring is not in memory; -EINVAL: a size that no ring has. */
int ring_start(struct ring *ring, const struct ring_config *config);
void ring_stop(struct ring *ring);
/* Where the next request will be: for GET_VRING_BASE. Nothing is in flight. */
uint32_t ring_base(const struct ring *ring);

/* The next request: 1, and *ret is set; 0: there is none; -EPROTO: the ring is broken. What was in flight when the
 * ring was started comes first. */
int ring_pop(struct ring *ring, struct ring_chain *ret);
/* Gives a request back, of whose memory so many bytes were written. Nothing when the ring is broken. */
void ring_push(struct ring *ring, const struct ring_chain *chain, uint32_t written);
/* Shall the guest be called because of what was pushed since this was asked last? */
bool ring_wants_call(struct ring *ring);
/* The guest shall kick when it adds requests. True: there are some already. */
bool ring_enable_kicks(struct ring *ring);
void ring_disable_kicks(struct ring *ring);

/* For the layouts. */
int ring_break(struct ring *ring, const char *reason); /* returns -EPROTO */
/* Adds one buffer to the chain. */
int ring_add_buffer(struct ring *ring, struct ring_chain *chain, uint64_t address, uint32_t bytes, bool write);
/* Copies an indirect table to ring->table; returns its length. */
int ring_read_table(struct ring *ring, uint64_t address, uint32_t bytes);
void ring_sort_resubmission(struct ring *ring, const uint64_t *counters);
static inline bool ring_event_is_due(uint16_t event, uint16_t now, uint16_t before)
{
    return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

#endif
