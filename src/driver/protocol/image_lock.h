/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_PROTOCOL_IMAGE_LOCK_H
#define INTERLOCK_DRIVER_PROTOCOL_IMAGE_LOCK_H

#include "base/error.h"
#include "loop/file.h"

/*
 * Byte-range locks between processes that use one image: who holds byte 100 + n does n, who holds byte 200 + n does not
 * let others do n. doc/compatibility has the layout; locks are shared open-file-description locks, and a conflict is
 * found by asking whether an exclusive one could be had.
 */
enum image_lock_bit { IMAGE_LOCK_READ, IMAGE_LOCK_WRITE, IMAGE_LOCK_WRITE_UNCHANGED, IMAGE_LOCK_RESIZE };

/* Takes the locks of a reader or a writer on `file`, whose path is for messages; or none, with the error. */
int coroutine_fn image_lock_take(struct file *file, const char *path, bool writable, struct error **err);
/* The same for a file that is opened a second time in place of `old`, which holds locks of its own: they are given up
 * when it works, and kept when it does not. */
int coroutine_fn image_lock_replace(struct file *file, struct file *old, bool old_writable, const char *path,
                                    bool writable, struct error **err);

#endif
