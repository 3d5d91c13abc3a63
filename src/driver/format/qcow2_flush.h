/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_FLUSH_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_FLUSH_H

#include "loop/coroutine.h"
#include <stdbool.h>

struct qcow2;
struct node;

/* Before a request that changes anything: -EIO for a corrupt image; the first one clears autoclear bits on disk. */
int coroutine_fn qcow2_prepare_write(struct qcow2 *image);
/* A barrier: what was written to the image's file and to its data file is on stable storage. */
int coroutine_fn qcow2_flush_files(struct qcow2 *image);
/* Writes all dirty metadata in a safe order, with the barriers between but none behind. The lock is held. */
int coroutine_fn qcow2_write_metadata(struct qcow2 *image);
/* The same as qcow2_cache.make_clean; argument: the image. */
int coroutine_fn qcow2_make_clean(void *argument);
/* The driver's flush: metadata and data are on stable storage; what was freed before is free. Lock not held. */
int coroutine_fn qcow2_flush(struct node *node);
/* After each change of the tables, lock held: sees whether there is more dirty or freed than should be. */
void qcow2_consider_settling(struct qcow2 *image);
/* Flushes if that was so. After each request that changed something, lock not held. */
void coroutine_fn qcow2_settle(struct qcow2 *image);
/* Everything is written, freed and stable; nobody else is in the image. Lock not held. */
int coroutine_fn qcow2_flush_all(struct qcow2 *image);

#endif
