/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_SIM_PRIVATE_H
#define INTERLOCK_LOOP_SIM_PRIVATE_H

#include "base/list.h"
#include "loop/context.h"
#include "loop/engine.h"
#include "loop/sim.h"

/* The inside of a simulated world, for sim.c (threads, clock), sim_disk.c (content) and sim_file.c (files, faults). */
struct sim_thread;
struct sim_disk;

/* Something that happens at a moment of virtual time. Embedded; nobody takes one back. */
struct sim_event {
    struct list link;
    int64_t at_ns;
    void (*happen)(struct sim_event *event);
};

struct sim {
    struct sim_config config;
    uint64_t random;
    int64_t start_ns, now_ns;
    struct list events;  /* the earliest first; equal ones in the order in which they were added */
    struct list threads; /* in the order in which they were started */
    unsigned thread_count;
    struct sim_thread *running;
    uint64_t trace; /* a hash of all that was decided */

    struct list disks; /* by name: those that have one */
    uint64_t disk_count;
    struct list faults;
    struct list writes; /* in flight */
    void (*record)(const struct sim_record *record, void *argument);
    void *record_argument;
    uint64_t changes, cut_at;
    void (*after_cut)(struct sim *world, void *argument);
    void *after_argument;
};

/* The world of the calling thread, or NULL. */
struct sim *sim_self(void);
uint64_t sim_below(struct sim *sim, uint64_t limit); /* 0 .. limit - 1 */
bool sim_chance(struct sim *sim, unsigned percent);
/* From now on: how long something takes. */
int64_t sim_draw_latency(struct sim *sim);
void sim_event_add(struct sim *sim, struct sim_event *event, int64_t at_ns);
/* Lets each event that was to come happen now, or never. */
void sim_happen_some(struct sim *sim);
/* Lets others go on until then. */
void coroutine_fn sim_sleep_until(struct sim *sim, int64_t at_ns);
/* Something was decided: goes into the trace. */
void sim_note(struct sim *sim, const char *what, uint64_t a, uint64_t b);
/* A change has been begun, and its moments are among the events. Does not return when the power goes with it. */
void sim_change_begun(struct sim *sim);

/* sim_file.c */
extern const struct file_ops sim_file_ops;
void sim_files_init(struct sim *sim);
void sim_files_finish(struct sim *sim);
/* Fills the world `after` with what a power cut leaves of the disks of `sim`. */
void sim_files_cut(struct sim *sim, struct sim *after);

/*
 * sim_disk.c: what is on a disk, now and as it would be without power. Every change has a number; a sector remembers
 * what it held before each change that no sync has settled yet.
 */
struct sim_disk {
    struct list link; /* sim->disks, while it has its name */
    char *path;
    unsigned references; /* the list's and the open files' */
    uint64_t inode;
    uint64_t size, room;
    uint64_t change; /* the number of the last change */
    struct sim_page ***chunks;
    uint64_t chunk_count, allocated; /* allocated: pages */
    struct list dirty;               /* pages with something unsettled */
    struct list sizes;               /* earlier, unsettled sizes, the newest first */
};
#define SIM_PAGE ((uint64_t)4096) /* what is allocated, or a hole */
#define SIM_DISK_MAX ((uint64_t)16 << 40)

struct sim_disk *disk_create(const char *path, uint64_t inode);
void disk_unref(struct sim_disk *disk);
/* Zeroes behind the end. */
void disk_read(struct sim_disk *disk, uint64_t offset, void *to, uint64_t bytes);
/* These are changes, and grow the disk if need be. The range ends before SIM_DISK_MAX. */
void disk_write(struct sim_disk *disk, uint64_t offset, const void *from, uint64_t bytes);
void disk_allocate(struct sim_disk *disk, enum file_allocate_mode mode, uint64_t offset, uint64_t bytes);
void disk_resize(struct sim_disk *disk, uint64_t size);
/* What the range (its size too) held right after the change of that number, or later, survives from now on. */
void disk_settle(struct sim_disk *disk, uint64_t offset, uint64_t bytes, uint64_t change);
int disk_extent(struct sim_disk *disk, uint64_t offset, bool *ret_data, uint64_t *ret_end);
/* A disk with what a power cut leaves of this one. */
struct sim_disk *disk_cut(struct sim_disk *disk, struct sim *sim);

#endif
