/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_VHOST_USER_BED_TESTING_H
#define INTERLOCK_EXPORT_VHOST_USER_BED_TESTING_H

#include "export/vhost_user/front_testing.h"
#include <stdbool.h>

/*
 * For tests and fuzzing only: exports "rw" (writable, 4 queues) and "ro" (blocks of 4 KiB) of a file of BED_SIZE bytes,
 * and a client on a thread of its own, which may block.
 */
#define BED_SIZE (1024u * 1024)

/* Runs a client against fresh exports. */
void bed_run(void (*client)(void *argument), void *argument, bool with_iothreads);
/* The client's thread: a connection to an export. */
int bed_connect(const char *name);
/* The client's thread: makes the node longer. */
void bed_resize(uint64_t size);

#endif
