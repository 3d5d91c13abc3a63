/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_DESCRIPTOR_H
#define INTERLOCK_LOOP_DESCRIPTOR_H

#include "base/error.h"
#include "loop/coroutine.h"

/*
 * Descriptors of libraries that do their own non-blocking I/O, and want to be told when to go on. The simulated world
 * has no descriptors: there nothing of this can be made (-ENOTSUP).
 */
struct connection;
struct descriptor_wait;

enum descriptor_ready { DESCRIPTOR_READABLE = 1 << 0, DESCRIPTOR_WRITABLE = 1 << 1 };

/* What a coroutine of the calling loop waits on `fd` with: one at a time. The caller keeps `fd`, and keeps it open
 * until descriptor_wait_destroy(), which is called on the same loop, with nobody waiting; accepts NULL. */
int descriptor_wait_create(int fd, struct descriptor_wait **ret);
void descriptor_wait_destroy(struct descriptor_wait *wait);
/*
 * Waits until one of the `directions` is ready: those that are, DESCRIPTOR_ bits; a descriptor that is at its end or
 * broken is ready in all of them. 0: descriptor_wait_wake(), of now or of a moment ago. Negative errno: it cannot be
 * waited for.
 */
int coroutine_fn descriptor_wait_ready(struct descriptor_wait *wait, unsigned directions);
/* The loop of the one who waits: he goes on. Nothing when nobody waits. */
void descriptor_wait_wake(struct descriptor_wait *wait);

/* Which of the directions are ready now; does not wait. */
unsigned descriptor_is_ready(int fd, unsigned directions);
void descriptor_close(int fd);

/* Ends an idle connection of the calling loop and hands its socket over, open and in blocking mode. -ENOTSUP: it is
 * none of its own (a layer, pipes), and stays as it is. */
int coroutine_fn connection_take_descriptor(struct connection *connection);
/* Two ends of a stream: one as a connection of the calling loop, one as a socket that the caller closes. */
int connection_pair(struct connection **ret, int *ret_fd);

#endif
