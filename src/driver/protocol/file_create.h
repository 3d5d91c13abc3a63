/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_PROTOCOL_FILE_CREATE_H
#define INTERLOCK_DRIVER_PROTOCOL_FILE_CREATE_H

#include "base/error.h"
#include "block/image.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdint.h>

/* Making and lengthening files; in coroutines. */
struct file;
struct graph;

/* The driver's image->create, image->measure and image->options (block/image.h). */
int coroutine_fn file_driver_create(struct graph *graph, const struct blockdev_create_options *options,
                                    struct error **err);
/* A raw image: whole sectors. */
int coroutine_fn file_driver_measure(const struct blockdev_create_options *options, struct backend *source,
                                     struct block_measure_info *ret, struct error **err);
extern const struct image_option file_create_options[];

/* Makes an open file longer, from `from` (its present size) to `to` bytes, with the added space in the state that
 * `mode` says (off, falloc or full); it reads as zeroes. `path` is for messages. On an error it is as long as before.
 */
int coroutine_fn file_extend(struct file *file, const char *path, uint64_t from, uint64_t to,
                             enum preallocation_mode mode, struct error **err);

#endif
