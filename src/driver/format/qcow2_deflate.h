/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_DEFLATE_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_DEFLATE_H

#include <stddef.h>
#include <stdint.h>

/*
 * A deflate compressor (RFC 1951) for clusters, with a window of 4 KiB: no distance in its streams is longer, so that a
 * reader with the least window that qcow2 readers are known to have can read them. One at a time per packer; no I/O.
 */
struct qcow2_deflate;

struct qcow2_deflate *qcow2_deflate_create(void);          /* NULL: no memory */
void qcow2_deflate_destroy(struct qcow2_deflate *deflate); /* accepts NULL */
/* A whole raw stream for `bytes` (at most 2 MiB) of `from` to `to`. Returns its length; 0 if that is more than `max`.
 */
size_t qcow2_deflate_pack(struct qcow2_deflate *deflate, const uint8_t *from, size_t bytes, uint8_t *to, size_t max);

#endif
