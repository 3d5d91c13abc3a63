/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_SIM_H
#define INTERLOCK_LOOP_SIM_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

/*
 * A simulated world, for tests: several loops interleaved on one thread, disks in memory, a virtual clock. Which loop
 * goes on, how long a transfer takes, in which order transfers end, how much a short one moves and what a power cut
 * leaves is decided by one seed: the same program with the same seed makes the same steps.
 *
 * sim_create() makes the world of the calling thread; then loop_create(ENGINE_SIM) makes its control loop and
 * loop_thread_start(.., ENGINE_SIM) further ones, which run on fibers of this thread. The code above src/loop does not
 * know: ENGINE_AUTO is the simulated engine in such a world. Paths name disks; there are no directories, sockets,
 * signals or locks between processes (file_lock_* say yes). When every loop sleeps and nothing will ever wake one, the
 * program aborts and says so.
 */
struct sim;

/* Without preemption loops change only where they visit the engine: two that poll in lockstep may do so for ever. */
struct sim_config {
    uint64_t seed;
    int64_t latency_min_ns, latency_max_ns; /* of each transfer, sync, piece of work; drawn evenly. 0, 0: 1 to 100 us */
    unsigned short_percent;                 /* of transfers that move only a part of what was asked (whole sectors) */
    unsigned preempt_percent;               /* of ready tasks, and of co_mutex_lock(), at which others may go on */
    int64_t limit_ns;                       /* virtual time after which the program aborts: it hangs. 0: an hour */
    FILE *trace;                            /* every decision is written there, a line each. NULL: nowhere */
};
#define SIM_SECTOR 512u /* what a power cut keeps or loses whole */

struct sim *sim_create(const struct sim_config *config);
void sim_destroy(struct sim *sim); /* its loops are gone */
/*
 * For the main function of a unit test whose loops are of ENGINE_AUTO: when INTERLOCK_SIM=SEED is in the environment,
 * the whole program runs in a world of that seed (preemption and short transfers follow from it too), to its end. Else
 * this does nothing. meson runs such tests on the real engine and in some worlds.
 */
void sim_create_if_asked(void);
int64_t sim_now_ns(const struct sim *sim);
uint64_t sim_random(struct sim *sim); /* from the seed */
/* A hash of all decisions up to now: two runs with the same hash went the same way. */
uint64_t sim_trace(const struct sim *sim);

/* Creates the disk, or gives it this content, durably. */
void sim_disk_set(struct sim *sim, const char *path, const void *data, uint64_t size);
/* A copy of what a reader would see; g_free(). NULL: there is no such disk. */
void *sim_disk_get(struct sim *sim, const char *path, uint64_t *ret_size);
void sim_disk_remove(struct sim *sim, const char *path);
/* No write or allocation may bring the disk over this size: what fits is written, then -ENOSPC. UINT64_MAX, as at the
 * beginning: no limit. */
void sim_disk_set_room(struct sim *sim, const char *path, uint64_t size);

enum sim_access {
    SIM_READ = 1 << 0,
    SIM_WRITE = 1 << 1,
    SIM_SYNC = 1 << 2,
    SIM_ALLOCATE = 1 << 3, /* zero, punch, preallocate, truncate */
    SIM_OPEN = 1 << 4,
};
struct sim_fault {
    const char *path; /* NULL: any disk; copied */
    unsigned access;  /* SIM_ bits */
    uint64_t skip;    /* so many of these succeed before */
    uint64_t count;   /* so many fail, then none any more */
    int error;        /* negative errno. A failed write has written an arbitrary part; a failed sync nothing durably. */
};
void sim_fault_add(struct sim *sim, const struct sim_fault *fault);
void sim_faults_clear(struct sim *sim);

/*
 * What happens to the disks' content, as it happens: for who wants to play it again otherwise. `settled`: a sync (or
 * FUA) has made durable what [offset, offset + bytes) held after the disk's change of that number.
 */
enum sim_record_kind { SIM_RECORD_WRITE, SIM_RECORD_ZERO, SIM_RECORD_RESIZE, SIM_RECORD_SETTLE };
struct sim_record {
    enum sim_record_kind kind;
    const char *path;
    uint64_t change;        /* its number on this disk; SETTLE: of the last change that is settled */
    uint64_t offset, bytes; /* RESIZE: offset is the new size */
    const void *data;       /* WRITE */
};
/* Calls `record` for each from now on; NULL: no more. It does not change the world. */
void sim_set_recorder(struct sim *sim, void (*record)(const struct sim_record *record, void *argument), void *argument);

/* How many changes of disks (SIM_WRITE, SIM_SYNC, SIM_ALLOCATE) have been begun: the places where power can be cut. */
uint64_t sim_changes(const struct sim *sim);
/*
 * When that many changes have been begun the power is cut: no loop ever runs again (their memory is left alone), and
 * `after` is called on a fresh stack of 8 MiB, without a loop, with a new world (this seed + 1; no faults, all room),
 * in which each disk is what its last completed sync made durable, plus any part, by sectors, of what was written
 * since, in any order. A write with FUA is durable when it has completed; that a disk exists is durable at once.
 * `after` does not return: it makes loops and looks, then ends the process. Where so many changes were begun already,
 * the power is cut at once. A failing change counts too, and so does an open that empties a disk.
 */
void sim_cut_power(struct sim *sim, uint64_t at_change, void (*after)(struct sim *world, void *argument),
                   void *argument);

#endif
