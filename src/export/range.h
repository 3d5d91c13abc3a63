/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_RANGE_H
#define INTERLOCK_EXPORT_RANGE_H

#include "loop/coroutine.h"
#include <stdbool.h>
#include <stdint.h>

struct backend;

/*
 * Zeroing and discarding as much as a client likes at once. A backend is drained when no request is inside, and one
 * over terabytes of a format's metadata is inside for minutes: so it is many requests, each of which is soon done.
 */
struct range_work {
    struct backend *backend;
    uint64_t offset, bytes;
    unsigned flags; /* REQUEST_FUA; of zeroes also REQUEST_MAY_UNMAP and REQUEST_NO_FALLBACK */
    /* May be NULL. Asked between two pieces: is anybody still interested? */
    bool (*goes_on)(const void *argument);
    const void *argument;
};

/* 0, or the first error: what came before it is done. -ESHUTDOWN: nobody was interested any more. */
int coroutine_fn range_write_zeroes(const struct range_work *work);
int coroutine_fn range_discard(const struct range_work *work);

#endif
