/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_AMEND_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_AMEND_H

#include "block/image.h"

/* image_driver.amend: the version, the width of refcounts, the flag for lazy refcounts, the size, the name of the data
 * file. -ENOTSUP or -EINVAL, with nothing changed, for what cannot be. */
int coroutine_fn qcow2_amend(struct node *node, const struct image_amendment *amendment,
                             const struct image_progress *progress, struct error **err);

#endif
