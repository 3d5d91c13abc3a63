/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_VHOST_USER_FRONT_TESTING_H
#define INTERLOCK_EXPORT_VHOST_USER_FRONT_TESTING_H

#include "export/vhost_user/vhost_user_format.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * For tests and measurements only: a front end with a driver, as a virtual machine would have, in plain blocking
 * calls. It ends the process when something fails that it did not expect to. Requests stand in slots; each has a
 * header, a status and a buffer in the shared memory, and, in the ring, a chain of header, buffer and status.
 */
#define FRONT_QUEUES_MAX 8
#define FRONT_GUEST UINT64_C(0x140000000) /* where the memory is in the guest */

struct front_options {
    unsigned queues, size; /* of a ring */
    unsigned slots;        /* requests at the same time; 0: as many as the ring takes */
    size_t buffer;         /* bytes of a slot's */
    bool packed, event_index, indirect, inflight;
    bool one_region;  /* else two, and buffers lie across them */
    bool add_regions; /* memory by ADD_MEM_REG, else in one table */
};

struct front_slot {
    struct virtio_blk_outhdr *header;
    uint8_t *status, *buffer;
    struct vring_desc *table; /* an indirect one */
    bool busy;
    unsigned descriptors; /* that its chain takes */
};

struct front_queue {
    struct front *front;
    unsigned index, size, slots;
    int kick, call, error;
    struct front_slot *slot;
    uint64_t kicks, calls; /* how often */
    /* Split. */
    struct vring_desc *descriptors;
    struct vring_avail *available;
    struct vring_used *used;
    /* Packed. */
    struct vring_packed_desc *packed;
    struct vring_packed_desc_event *driver, *device;
    uint16_t next, taken; /* split: free-running; packed: places */
    bool next_wrap, taken_wrap;
    uint16_t unkicked;
};

struct front {
    struct front_options options;
    int socket, channel; /* channel: where the back end's requests come */
    int memory_fd, inflight_fd;
    struct vhost_inflight inflight;
    uint8_t *memory;
    size_t memory_bytes, memory_used;
    uint64_t offered, features;
    struct virtio_blk_config config;
    struct front_queue queue[FRONT_QUEUES_MAX];
};

int front_connect(const char *path);

/* Messages. */
void front_send(struct front *front, uint32_t request, uint32_t flags, const void *payload, uint32_t bytes,
                const int *fds, unsigned fd_count);
/* The reply's payload; false: the connection was closed. *ret_fd (may be NULL) becomes a descriptor that came, or -1.
 */
bool front_reply(struct front *front, uint32_t request, void *payload, uint32_t bytes, int *ret_fd);
/* With an answer wanted; true: it was taken. */
bool front_tell(struct front *front, uint32_t request, const void *payload, uint32_t bytes, const int *fds,
                unsigned fd_count);
uint64_t front_ask(struct front *front, uint32_t request);

/* Lays out memory and rings, without a back end. */
void front_prepare(struct front *front, const struct front_options *options);
/* The same; negotiates and starts every queue. */
void front_init(struct front *front, int socket, const struct front_options *options);
/* The same memory, rings and requests with another connection: what is in flight goes on, if it is recorded. */
void front_reconnect(struct front *front, int socket);
/* Stops a queue; the base. */
uint32_t front_stop(struct front_queue *queue);
void front_start(struct front_queue *queue, uint32_t base);
void front_finish(struct front *front);
uint64_t front_guest(const struct front *front, const void *at);

/* Driver. `bytes` of data go from or to the slot's buffer. */
void front_submit(struct front_queue *queue, unsigned slot, uint32_t type, uint64_t sector, uint32_t bytes);
void front_kick(struct front_queue *queue); /* if the device wants it, for all that was submitted */
/* A slot that has ended, or -1. */
int front_reap(struct front_queue *queue);
/* The same, and waits for it. */
int front_wait(struct front_queue *queue);
/* One request from begin to end, in slot 0; its status. */
unsigned front_run(struct front_queue *queue, uint32_t type, uint64_t sector, uint32_t bytes);

#endif
