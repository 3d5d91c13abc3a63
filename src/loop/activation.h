/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_ACTIVATION_H
#define INTERLOCK_LOOP_ACTIVATION_H

#include "base/error.h"

/*
 * Descriptors that the service manager opened and passed to the program: the protocol of sd_listen_fds(3), variables
 * LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES. They are numbered from ACTIVATION_FIRST on; whoever uses one takes it
 * over.
 */
#define ACTIVATION_FIRST 3

/* At the program's start, while it has one thread and before it forks. Takes what is meant for this process: the
 * variables leave the environment, and the descriptors are not inherited any further. *ret: how many there are, 0 if
 * none are for us. -EINVAL, -EBADF: the variables say what cannot be. */
int activation_take(unsigned *ret, struct error **err);
/* The number of the descriptor that has this name (FileDescriptorName= of a socket unit), the first if several have
 * it. Negative: there is none. */
int activation_find(const char *name);

#endif
