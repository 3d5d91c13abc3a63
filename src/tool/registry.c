/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which drivers this program has, the only place that names them all. Adding one means a line here and one in its
 * folder's meson.build.
 */
#include "tool/registry.h"
#include "block/driver.h"
#include "driver/drivers.h"
#include "driver/filter/copy_before_write.h"

void register_all(void)
{
    static const struct driver *const drivers[] = {
        &driver_file,
        &driver_luks,
        &driver_raw,
        &driver_qcow2,
        &driver_null_co,
        &driver_blkdebug,
        &driver_blkverify,
        &driver_blklogwrites,
        &driver_copy_on_read,
        &driver_compress,
        &driver_preallocate,
        &driver_copy_before_write,
        &driver_snapshot_access,
#ifdef INTERLOCK_NBD
        &driver_nbd,
#endif
    };

    for (unsigned i = 0; i < sizeof(drivers) / sizeof(drivers[0]); i++) {
        driver_register(drivers[i]);
    }
}
