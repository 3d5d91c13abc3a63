/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_VHOST_USER_QUEUE_H
#define INTERLOCK_EXPORT_VHOST_USER_QUEUE_H

#include "export/vhost_user/ring.h"
#include "loop/loop.h"
#include <stdatomic.h>

/*
 * A queue of the device: a ring that is served on a loop of its own choice. What the front end says of it is kept here
 * by the control loop, which changes it only while the queue does not run (but for the two events that are signalled).
 */
struct backend;
struct coroutine;
struct event;

/* What all queues of a device share, while they run. */
struct vhost_device {
    struct backend *backend;
    const atomic_uint_fast64_t *size; /* of the export, bytes; may change */
    uint32_t block_bytes;             /* logical block size */
    bool writable;
    atomic_bool write_back; /* else each write is on stable storage before it is answered */
    char name[VIRTIO_BLK_ID_BYTES];
};

struct vhost_block_request;

struct vhost_queue {
    const struct vhost_device *device;
    unsigned index;
    struct loop *loop, *control;

    /* The control loop's. */
    struct ring_config config;
    bool has_addresses, enabled;
    bool running;
    struct event *kick;
    struct coroutine *pauser; /* waits for it to stop */

    /* The queue's loop's. */
    struct event *call, *error;
    struct ring ring;
    struct coroutine *runner;
    bool stopping, sleeping; /* the runner's: until a request has ended */
    unsigned in_flight;
    struct vhost_block_request *unused;
    struct loop_task notify; /* at the turn's end */

    /* Why it does not run any more, or NULL. Written by the queue's loop, any thread may read. */
    _Atomic(const char *) broken;
};

void vhost_queue_init(struct vhost_queue *queue, unsigned index, const struct vhost_device *device, struct loop *loop);
/* It does not run. */
void vhost_queue_finish(struct vhost_queue *queue);

/* The control loop. It has a size, addresses and a kick. */
void vhost_queue_start(struct vhost_queue *queue);
/* Returns when nothing is in flight any more and nothing more is taken. config.base says where to go on. Nothing when
 * it does not run. */
void coroutine_fn vhost_queue_pause(struct vhost_queue *queue);
/* Puts `event` (or NULL) in the place of what is signalled to the front end, running or not. */
void coroutine_fn vhost_queue_set_call(struct vhost_queue *queue, struct event *event);
void coroutine_fn vhost_queue_set_error(struct vhost_queue *queue, struct event *event);

/* request.c: what a request asks for. */
struct vhost_block_request {
    struct vhost_queue *queue;
    struct vhost_block_request *next_unused;
    struct ring_chain chain; /* big, and filled as far as it is used */
};
/* Runs it; how many bytes of its memory were written. -EPROTO: it is no request. */
int coroutine_fn vhost_block_run(const struct vhost_device *device, struct ring_chain *chain);

#endif
