/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Speed limits, as a debt: every admitted byte costs 1/rate seconds, and the next bytes are admitted once the earlier
 * ones are paid for.
 *
 * 1. Over any span of time t, at most rate * t bytes plus one piece are admitted.
 * 2. Idle time is not saved up: after a rest the next piece is admitted at once, the one after that pays in full.
 * 3. No value of rate and bytes overflows: a debt is cut at DEBT_MAX_NS.
 *
 * It does not sleep, knows no job and no loop: copy.c does.
 */
#include "copy/speed.h"
#include "base/size.h"

#define SECOND_NS 1000000000LL
#define DEBT_MAX_NS (365LL * 86400 * SECOND_NS) /* a year: nobody waits for that, and cancel ends it */

static int64_t speed_cost_ns(uint64_t bytes, uint64_t rate)
{
    unsigned __int128 cost = (unsigned __int128)bytes * SECOND_NS / rate;
    return cost > DEBT_MAX_NS ? DEBT_MAX_NS : (int64_t)cost;
}

void speed_set(struct speed_limit *limit, uint64_t rate, int64_t now_ns)
{
    if (limit->rate && limit->paid_ns > now_ns) {
        unsigned __int128 owed = (unsigned __int128)(limit->paid_ns - now_ns) * limit->rate / SECOND_NS;
        limit->paid_ns = rate ? now_ns + speed_cost_ns(owed > UINT64_MAX ? UINT64_MAX : (uint64_t)owed, rate) : now_ns;
    }
    limit->rate = rate;
}

int64_t speed_ask(struct speed_limit *limit, uint64_t bytes, int64_t now_ns)
{
    if (limit->rate == 0) {
        return 0;
    }
    if (limit->paid_ns > now_ns) {
        return limit->paid_ns - now_ns;
    }
    limit->paid_ns = now_ns + speed_cost_ns(bytes, limit->rate);
    return 0;
}

uint64_t speed_piece(const struct speed_limit *limit, uint64_t smallest, uint64_t largest)
{
    if (limit->rate == 0 || smallest >= largest) {
        return largest;
    }
    uint64_t piece = align_down(limit->rate / 10, smallest);
    return piece < smallest ? smallest : min_u64(piece, largest);
}
