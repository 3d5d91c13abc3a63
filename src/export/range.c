/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Long ranges in pieces. Invariants:
 * 1. pieces end where their offset is a multiple of PIECE: what a format deallocates as a whole (a cluster) is not cut
 *    in two, if the range does not;
 * 2. what is to be stable is so in the end: one piece by itself, several by one flush after them.
 * Between two pieces others of the loop get their turn. Used by the exports whose clients may ask for any length.
 */
#include "export/range.h"
#include "base/size.h"
#include "block/user.h"
#include <errno.h>

#define PIECE (256 * MiB)

static int coroutine_fn range_run(const struct range_work *work, bool discard)
{
    uint64_t end = work->offset + work->bytes;
    bool several = align_down(work->offset, PIECE) + PIECE < end;
    unsigned flags = several ? work->flags & ~(unsigned)REQUEST_FUA : work->flags;

    for (uint64_t at = work->offset; at < end;) {
        uint64_t next = min_u64(align_down(at, PIECE) + PIECE, end);
        int r = discard ? backend_discard(work->backend, at, next - at)
                        : backend_write_zeroes(work->backend, at, next - at, flags);

        if (r < 0) {
            return r;
        }
        at = next;
        if (at < end) {
            if (work->goes_on && !work->goes_on(work->argument)) {
                return -ESHUTDOWN;
            }
            coroutine_pause();
        }
    }
    return work->flags & REQUEST_FUA && (discard || several) ? backend_flush(work->backend) : 0;
}

int coroutine_fn range_write_zeroes(const struct range_work *work)
{
    return range_run(work, false);
}

int coroutine_fn range_discard(const struct range_work *work)
{
    return range_run(work, true);
}
