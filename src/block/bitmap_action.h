/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_BLOCK_BITMAP_ACTION_H
#define INTERLOCK_BLOCK_BITMAP_ACTION_H

#include "block/action.h"
#include "schema/types.h"

/*
 * The commands block-dirty-bitmap-add, -remove, -clear, -enable, -disable and -merge as actions (block/action.h): alone
 * or several as one. They claim nothing: a bitmap has its own rule, busy. Each makes *ret an action; the arguments are
 * borrowed until its clean.
 */
void bitmap_add_action(struct action *ret, const struct block_dirty_bitmap_add *args);
void bitmap_remove_action(struct action *ret, const struct block_dirty_bitmap *args);
void bitmap_clear_action(struct action *ret, const struct block_dirty_bitmap *args);
void bitmap_enable_action(struct action *ret, const struct block_dirty_bitmap *args);
void bitmap_disable_action(struct action *ret, const struct block_dirty_bitmap *args);
void bitmap_merge_action(struct action *ret, const struct block_dirty_bitmap_merge *args);

#endif
