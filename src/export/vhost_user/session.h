/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_VHOST_USER_SESSION_H
#define INTERLOCK_EXPORT_VHOST_USER_SESSION_H

#include "export/vhost_user/queue.h"
#include "loop/sync.h"

/*
 * One front end, from its connection to its end. Everything here is the control loop's; the queues run on theirs.
 */
struct connection;
struct shared_memory;

struct vhost_session_config {
    struct connection *connection; /* stays open, and the caller's */
    struct backend *backend;
    const atomic_uint_fast64_t *size; /* of the export, bytes; may change */
    struct loop *const *loops;        /* queue i runs on loops[i % loop_count] */
    unsigned loop_count;
    unsigned queues;
    uint32_t block_bytes;
    bool writable, writethrough;
    const char *name; /* what the guest sees as its serial number */
};

struct vhost_session {
    struct vhost_session_config config;
    struct vhost_device device;
    struct vhost_queue *queues;
    struct vhost_memory memory;
    struct shared_memory *inflight; /* or NULL */
    struct inflight_note *note;     /* in it, or NULL */
    uint64_t inflight_stride;       /* bytes of a queue's region */
    unsigned inflight_queues, inflight_queue_size;
    uint64_t features, protocol_features;
    uint8_t status; /* virtio 1.2, section 2.1 */

    struct connection *backend_channel; /* for our own requests, or NULL */
    bool resized, notifying;
    struct co_group notifiers;
};

/* Serves until the front end leaves or breaks the protocol; then nothing is in flight and no memory is mapped any more.
 */
void coroutine_fn vhost_session_run(struct vhost_session *session, const struct vhost_session_config *config);
/* The export's size has changed: tells the front end. While it runs. */
void vhost_session_resized(struct vhost_session *session);

/* config.c: the configuration space, zeroes behind what we have. */
void vhost_config_read(const struct vhost_session *session, uint8_t ret[VHOST_CONFIG_BYTES_MAX]);
/* Who caches writes, from now on: nobody, if the export is write-through. */
void vhost_set_write_back(struct vhost_session *session, bool write_back);
/* Writes there: the only thing that a driver may change is whether writes are cached. -EINVAL otherwise. */
int vhost_config_write(struct vhost_session *session, const struct vhost_config_message *message);

#endif
