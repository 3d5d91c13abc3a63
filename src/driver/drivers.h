/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_DRIVERS_H
#define INTERLOCK_DRIVER_DRIVERS_H

/* The tables of drivers that need no other face; src/tool registers them (driver_register()). */
struct driver;
extern const struct driver driver_blkdebug;
extern const struct driver driver_blklogwrites;
extern const struct driver driver_blkverify;
extern const struct driver driver_compress;
extern const struct driver driver_copy_on_read;
extern const struct driver driver_file;
extern const struct driver driver_luks;
extern const struct driver driver_nbd; /* INTERLOCK_NBD */
extern const struct driver driver_null_co;
extern const struct driver driver_preallocate;
extern const struct driver driver_qcow2;
extern const struct driver driver_raw;

#endif
