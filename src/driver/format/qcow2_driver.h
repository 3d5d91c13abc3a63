/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_DRIVER_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_DRIVER_H

#include "block/driver.h"

extern const struct driver driver_qcow2;

#endif
