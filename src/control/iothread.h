/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CONTROL_IOTHREAD_H
#define INTERLOCK_CONTROL_IOTHREAD_H

#include "loop/loop.h"

/* The I/O threads of a daemon (objects of type iothread), by id. Control thread only. */
struct iothreads;

struct iothreads *iothreads_create(enum engine_kind engine);
/* Stops and joins all of them: what they served is gone. */
void iothreads_destroy(struct iothreads *iothreads);
int iothreads_add(struct iothreads *iothreads, const char *id, int64_t busy_poll_ns, struct error **err);
/* -EBUSY while something is served there. */
int iothreads_remove(struct iothreads *iothreads, const char *id, struct error **err);
/* NULL: none of that name. Whoever takes the loop says so: an I/O thread in use is not removed. */
struct loop *iothreads_find(struct iothreads *iothreads, const char *id);
void iothreads_set_busy(struct iothreads *iothreads, bool (*is_busy)(void *argument, struct loop *loop),
                        void *argument);
/* query-iothreads: an array in order of creation; a new reference. */
json_t *iothreads_query(struct iothreads *iothreads);

#endif
