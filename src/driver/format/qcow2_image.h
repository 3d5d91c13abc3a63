/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_IMAGE_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_IMAGE_H

#include "block/image.h"

/* What can be done with a qcow2 image besides I/O. */
extern const struct image_driver qcow2_image;

#endif
