/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_HUGE_PAGE_H
#define INTERLOCK_LOOP_HUGE_PAGE_H

#include "loop/shared_memory.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

/*
 * Makes huge pages of those extents of a file in memory (tmpfs) that are about to be written for the first time, and
 * shows them as memory, for a system call to put the data there. To find, charge and enter 512 small pages takes three
 * times as long as to fill them, and while one writes a file the kernel lets nobody else.
 */
#define HUGE_PAGE_BYTES ((uint64_t)2 << 20)
#define HUGE_PAGE_GUARDS 16
struct huge_pages {
    int fd; /* open for reading and writing, or none is ever made */
    struct {
        pthread_mutex_t mutex;  /* held while a page is made of an extent */
        uint64_t made;          /* where the last such extent begins; UINT64_MAX: none */
    } guards[HUGE_PAGE_GUARDS]; /* by extent */
    atomic_int credit_us;       /* what was won by the last ones, about */
    atomic_uint rest;           /* extents that are left as they are before the next try */
    atomic_uint next_rest;      /* how many that will be the next time */
};

void huge_pages_init(struct huge_pages *pages, int fd);
void huge_pages_destroy(struct huge_pages *pages);
/* Gives back what the last extent holds behind the file's end. Nobody writes the file meanwhile: what somebody had just
 * added there would be lost. */
void huge_pages_trim(struct huge_pages *pages);

/* How much there is from `offset` to the end of its extent. */
static inline uint64_t huge_page_room(uint64_t offset)
{
    return HUGE_PAGE_BYTES - offset % HUGE_PAGE_BYTES;
}

/*
 * [offset, offset + bytes) is going to be written, and nobody else writes there meanwhile. If the extent of `offset`
 * is a new huge page, or can be made one (it is a hole and will be full; or, if the file `grows` by much, lies behind
 * its end), returns a view of the extent as a whole, to be unmapped by the caller; the file is long enough then for all
 * that is to be written in the extent. Otherwise NULL; it is no error. What the file shows does not change, but for its
 * length. *ret_is_new: what is to be written in the extent was a hole until now, and huge_page_undo() makes it one
 * again, once the view is unmapped.
 * Both take up to milliseconds: on the worker pool. Several threads may call them for one file.
 */
struct shared_memory *huge_page_open(struct huge_pages *pages, uint64_t offset, uint64_t bytes, bool grows,
                                     bool *ret_is_new);
void huge_page_undo(struct huge_pages *pages, uint64_t offset, uint64_t bytes);

#endif
