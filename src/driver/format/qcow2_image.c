/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The table of what can be done with a qcow2 image besides I/O (block/image.h). It owns nothing else: each member
 * stands in the file that its name leads to (qcow2_create.c, qcow2_check.c, qcow2_amend.c, qcow2_snapshot.c,
 * qcow2_resize.c).
 */
#include "driver/format/qcow2_image.h"
#include "driver/format/qcow2_amend.h"
#include "driver/format/qcow2_bitmap.h"
#include "driver/format/qcow2_check.h"
#include "driver/format/qcow2_create.h"
#include "driver/format/qcow2_resize.h"
#include "driver/format/qcow2_snapshot.h"

const struct image_driver qcow2_image = {
    .options = qcow2_image_options,
    .create = qcow2_image_create,
    .measure = qcow2_measure,
    .check = qcow2_check,
    .amend = qcow2_amend,
    .empty = qcow2_empty,
    .grow = qcow2_grow,
    .snapshot_list = qcow2_snapshot_list,
    .snapshot_create = qcow2_snapshot_make,
    .snapshot_apply = qcow2_snapshot_apply,
    .snapshot_delete = qcow2_snapshot_delete,
    .snapshot_load = qcow2_snapshot_load,
    .bitmap_may_add = qcow2_bitmap_may_add,
    .bitmap_change = qcow2_bitmap_change,
    .bitmap_remove = qcow2_bitmap_remove,
    .bitmaps_store = qcow2_bitmaps_store,
};
