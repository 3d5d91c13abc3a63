/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_ENGINE_H
#define INTERLOCK_LOOP_ENGINE_H

#include "base/buffers.h"
#include "base/error.h"
#include "loop/connection.h"
#include "loop/coroutine.h"
#include "loop/file.h"
#include "loop/loop.h"
#include "loop/stream.h"
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

/*
 * What an engine is: everything of the outer world that a loop uses. Internal to src/loop. The real
 * engines (uring, epoll) share their files (file_native.c), sockets (stream_native.c), clock and
 * threads (engine.c), and differ in how a loop waits; a virtual one replaces all of these tables.
 * The loop's own logic (queues, timers, locks) is above this line and the same for every engine.
 */
struct engine;
struct engine_thread;

/* Files. `struct file` is what the implementation embeds first. Calls are made in a coroutine; a transfer may be short.
 */
struct file_ops {
    int (*open)(const char *path, unsigned flags, struct file **ret, struct error **err);
    void (*close)(struct file *file);
    int (*info)(struct file *file, struct file_info *ret);
    /* Returns how many bytes were moved: 0 is the end of the file; negative errno. */
    ssize_t (*read)(struct file *file, uint64_t offset, const struct iovec *iov, unsigned count);
    ssize_t (*write)(struct file *file, uint64_t offset, const struct iovec *iov, unsigned count, bool fua);
    /* Copies between files of these ops, away from the loop. -ENOTSUP, some of it done or nothing: not these two, or
     * not all of it. NULL: the same. */
    int (*copy)(struct file *from, uint64_t offset, struct file *to, uint64_t to_offset, uint64_t bytes,
                const struct copy_aid *aid);
    /* Both NULL: nothing can be seen so. */
    const void *(*peek)(struct file *file, uint64_t offset, size_t bytes);
    bool (*is_sound)(struct file *file, const void *at, size_t bytes);
    int (*sync)(struct file *file);
    int (*allocate)(struct file *file, enum file_allocate_mode mode, uint64_t offset, uint64_t bytes);
    int (*truncate)(struct file *file, uint64_t size);
    int (*set_layout)(struct file *file, bool no_cow, uint64_t extent_bytes); /* NULL: -EOPNOTSUPP */
    int (*extent)(struct file *file, uint64_t offset, bool *ret_data, uint64_t *ret_end);
    int (*lock)(struct file *file, bool shared, uint64_t offset, uint64_t bytes);
    int (*lock_test)(struct file *file, uint64_t offset, uint64_t bytes, uint64_t *ret_offset);
    int (*unlink)(const char *path);
    int (*slurp)(const char *path, size_t max, char **ret, size_t *ret_size);
};
struct file {
    const struct file_ops *ops;
};

/* A descriptor on which coroutines of one loop wait: one for input, one for output, or one for any of both.
 * Zero-initialise, then set fd. */
struct native_stream {
    int fd;
    bool registered;            /* epoll knows it */
    bool drained;               /* the last receive left nothing behind, as far as one can tell */
    struct native_wait *input;  /* who waits, on his stack */
    struct native_wait *output; /* who waits, on his stack */
};
struct native_wait {
    struct coroutine *waiter; /* NULL: nobody to wake */
    int result;
};
enum native_direction { NATIVE_INPUT, NATIVE_OUTPUT };

/* How the real engines wait; the loop's thread, in a coroutine unless said. */
struct native_ops {
    /* One transfer at an offset, may be short; may wait as long as the device needs. */
    ssize_t (*transfer)(struct engine *engine, int fd, bool write, const struct iovec *iov, unsigned count,
                        uint64_t offset, int rw_flags);
    int (*sync)(struct engine *engine, int fd);
    /* Waits until the direction is ready. 0, or -ECANCELED by stream_cancel. May return too early. */
    int (*stream_wait)(struct engine *engine, struct native_stream *stream, enum native_direction direction);
    /* Waits until one of several is ready (loop/descriptor.h): DESCRIPTOR_ bits, not too early, or -ECANCELED. */
    int (*stream_wait_any)(struct engine *engine, struct native_stream *stream, unsigned directions);
    /* Sockets. Returns bytes, 0 at the end, or negative errno. `tried`: a direct attempt has just found nothing. */
    ssize_t (*stream_receive)(struct engine *engine, struct native_stream *stream, void *to, size_t bytes, bool all,
                              bool tried);
    /* Sockets: called when a direct attempt found no room. */
    ssize_t (*stream_send)(struct engine *engine, struct native_stream *stream, struct msghdr *message);
    /* Not in a coroutine: whoever waits on the stream gets -ECANCELED soon (or a last result). */
    void (*stream_cancel)(struct engine *engine, struct native_stream *stream);
    /* Not in a coroutine: the engine forgets the descriptor; nobody waits. */
    void (*stream_detach)(struct engine *engine, struct native_stream *stream);
};

struct engine_ops {
    const char *name;
    /* On the thread that will run the loop. Negative errno where the kernel refuses. */
    int (*create)(struct engine **ret);
    void (*destroy)(struct engine *engine);
    /* Submits what was prepared, waits at most timeout_ns (0: only looks, -1: for ever) for something to
     * happen, and puts whoever was waiting for it on the ready queue. */
    void (*turn)(struct engine *engine, int64_t timeout_ns);
    /* NULL, or called after each task that a turn has run, and before a mutex is locked: others may go on meanwhile. */
    void (*step)(struct engine *engine);
    /* Any thread, also a signal handler: ends a waiting turn. */
    void (*interrupt)(struct engine *engine);

    int64_t (*clock_ns)(void);
    int64_t (*realtime_us)(void);
    uint64_t (*random)(void);
    int (*thread_start)(const char *name, void (*entry)(void *argument), void *argument, struct engine_thread **ret);
    void (*thread_join)(struct engine_thread *thread);
    /* In a coroutine: runs work somewhere where it may take its time. */
    int (*work)(int (*work)(void *argument), void *argument);

    const struct file_ops *files;
    const struct stream_ops *streams;
    const struct native_ops *native; /* NULL for an engine that has no descriptors */
};
struct engine {
    const struct engine_ops *ops;
};

extern const struct engine_ops uring_engine_ops, epoll_engine_ops, sim_engine_ops;
extern const struct file_ops file_native_ops;
extern const struct stream_ops stream_native_ops;

/* The engine of the calling thread's loop; there must be one. */
struct engine *engine_self(void);
/* The same, or on a thread without a loop the table of its simulated world, or of the real one. */
const struct engine_ops *engine_ops_self(void);
/* Creates an engine of the kind for the calling thread. */
int engine_create(enum engine_kind kind, struct engine **ret, struct error **err);

/* What the real engines share: their tables begin with how they wait, and end alike. */
int64_t native_clock_ns(void);
int64_t native_realtime_us(void);
uint64_t native_random(void);
int native_thread_start(const char *name, void (*entry)(void *argument), void *argument, struct engine_thread **ret);
void native_thread_join(struct engine_thread *thread);
int coroutine_fn worker_pool_run(int (*work)(void *argument), void *argument);
/* DESCRIPTOR_ bits as poll(2) has them, and back: an end or an error is every direction that was asked for. */
unsigned native_poll_events(unsigned directions);
unsigned native_poll_ready(unsigned events, unsigned directions);
/* Any thread, also a signal handler: makes an eventfd readable. */
void native_event_signal(int event_fd);
#define NATIVE_ENGINE_OPS                                                                            \
    .clock_ns = native_clock_ns, .realtime_us = native_realtime_us, .random = native_random,         \
    .thread_start = native_thread_start, .thread_join = native_thread_join, .work = worker_pool_run, \
    .files = &file_native_ops, .streams = &stream_native_ops

/* A coroutine that did something without waiting says so: after enough of it the others get their turn. */
void coroutine_fn loop_spend(unsigned units);

#endif
