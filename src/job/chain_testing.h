/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_JOB_CHAIN_TESTING_H
#define INTERLOCK_JOB_CHAIN_TESTING_H

#include "block/graph.h"
#include "block/operation.h"
#include "block/user.h"
#include "job/job.h"
#include "loop/loop.h"
#include <glib.h>

/*
 * For tests of jobs: chains of images in memory (a format driver with clusters, backing files and strings, that yields
 * at every chance and fails when told to), guests that write and verify, and a record of events.
 */
#define TEST_CLUSTER ((uint64_t)65536)
#define TEST_CHAIN_MAX 8

struct memory_faults {
    int read_error, write_error, header_error, flush_error; /* negative errno, or 0 */
    bool header_written;                                    /* the next header error comes after the change */
    bool header_once;                                       /* there is one header error only */
    int status_error;                                       /* of asking what lies where */
    uint64_t at;                                            /* reads, writes and questions fail in this cluster only */
    int64_t write_ns;                                  /* one write after the other takes so long for each cluster */
    void (*header)(struct node *node, void *argument); /* called before and after a header changes, or NULL */
    void *argument;
};

struct test_bench {
    struct graph *graph;
    struct jobs *jobs;
    GPtrArray *events;                  /* one line each: "JOB_STATUS_CHANGE j running" */
    struct node *nodes[TEST_CHAIN_MAX]; /* 0: the base; a reference each; NULL once closed by the test */
    unsigned count;
};

/* A chain of `count` images named base, a, b, ... of `size` bytes, with random content. */
void coroutine_fn bench_open(struct test_bench *bench, unsigned count, uint64_t size);
/* One more, named after the next letter: of the base's size, empty, writable, without a backing image. */
struct node *coroutine_fn bench_add_overlay(struct test_bench *bench);
unsigned bench_snapshots(struct node *node); /* how many are inside the image */
/* One more image, empty, writable, over nothing: the next of the nodes. */
struct node *coroutine_fn bench_add(struct test_bench *bench, uint64_t size);
/* Cancels jobs, closes everything. */
void coroutine_fn bench_close(struct test_bench *bench);
struct memory_faults *bench_faults(struct node *node);
const char *bench_disk_backing(struct node *node);   /* the string "on disk", or NULL */
void bench_resize(struct node *node, uint64_t size); /* before anything is attached */
/* Makes [offset, offset + bytes) of the image its own, filled with `value`; 0: zero clusters. Whole clusters. */
void bench_fill(struct node *node, uint64_t offset, uint64_t bytes, unsigned char value);
/* Whole clusters that the image has nothing in. */
void bench_forget(struct node *node, uint64_t offset, uint64_t bytes);
/* What node shows, from its own point of view, straight from memory. */
void bench_view(struct node *node, unsigned char *to, uint64_t bytes);
/* One byte of what it has itself. */
unsigned char bench_byte(struct node *node, uint64_t offset);
bool bench_allocated(struct node *node, uint64_t offset);
/* The events since the last call, joined by "; "; g_free(). */
char *bench_events(struct test_bench *bench);
/* Runs the loop's other work until the job has reached the state, or is gone. */
void coroutine_fn bench_await(struct test_bench *bench, const char *job, enum job_status status);
void coroutine_fn bench_sleep_ms(unsigned ms);

/* A client of the node, as an export is one: its coroutines write, zero, read and compare, until told to stop. */
#define GUEST_WORKERS 3
struct guest {
    struct backend *backend;
    struct operation *operation;
    unsigned char *model; /* what must be read */
    uint64_t size;
    atomic_bool stop;
    atomic_uint running;
    atomic_uint requests;
    bool read_only;
};
struct guest *coroutine_fn guest_start(struct test_bench *bench, struct node *node, struct loop *loop, bool read_only);
/* The same with workers on several loops. */
struct guest *coroutine_fn guest_start_on(struct test_bench *bench, struct node *node, struct loop *const *loops,
                                          unsigned count);
/* Stops it, compares everything once more, and lets it leave. */
void coroutine_fn guest_finish(struct guest *guest);
/* Its first and its last step alone. */
void coroutine_fn guest_stop(struct guest *guest);
void coroutine_fn guest_leave(struct guest *guest);

#endif
