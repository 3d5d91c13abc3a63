/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Snapshots inside an image: making one, going back to it, deleting it, showing it. A snapshot is an L1 table of its
 * own. A cluster's refcount counts the ways to it from all L1 tables, and a COPIED flag in the active tables says that
 * there is one.
 *
 * 1. Each change is one switch (qcow2_switch.c): new L1 and L2 tables, refcounts and snapshot table are written where
 *    nothing leads to, and then shown by one write. If power goes before it, the old state is there and nothing else;
 *    after it, the new one. There is no state between, not even leaks.
 * 2. L2 tables are not changed in place. An active one whose flags are to change is written anew, and the old one is
 *    dropped; making a snapshot lets both share the new one.
 * 3. What a snapshot's own L2 tables say in COPIED flags does not matter while they are not active, and is cleared when
 *    they become so.
 * 4. An image with an external data file has no snapshots: its data would not be kept. One with dirty bitmaps is not
 *    switched to a snapshot: they would not tell what changed.
 *
 * A snapshot's disk may have another size than the present one: going back to it changes the size in the same write.
 */
#include "driver/format/qcow2_snapshot.h"
#include "base/size.h"
#include "block/driver.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_bitmap.h"
#include "driver/format/qcow2_entry.h"
#include "driver/format/qcow2_snapshot_table.h"
#include "driver/format/qcow2_switch.h"
#include <errno.h>
#include <string.h>

enum { NAME_MAX_BYTES = 255 };

/* One change on its way. */
struct work {
    struct qcow2 *image;
    struct qcow2_switch change;
    struct qcow2_snapshot_table table;
    struct qcow2_switch_target target;
    uint64_t *l1;  /* the active one as it will be */
    void *entries; /* room for an L2 table */
};

static uint64_t l1_clusters(const struct qcow2 *image, uint64_t entries)
{
    return div_up(entries * 8, image->cluster_size);
}

static uint64_t l1_entries_for(const struct qcow2 *image, uint64_t size)
{
    unsigned span_bits = image->l2_bits + image->cluster_bits;
    return (size >> span_bits) + !is_aligned(size, (uint64_t)1 << span_bits);
}

/* Begins a change; on success work_end() or work_commit() ends it. */
static int coroutine_fn work_begin(struct qcow2 *image, struct work *work, struct error **err)
{
    if (image->external) {
        return error_set(err, -ENOTSUP, "Node '%s' has an external data file: snapshots in it are not possible",
                         image->node->name);
    }
    *work = (struct work){.image = image};
    int code = qcow2_switch_begin(image, &work->change);
    if (code < 0) {
        return error_set_errno(err, code, "Could not write to node '%s'", image->node->name);
    }
    work->entries = g_try_malloc(image->cluster_size);
    work->target = (struct qcow2_switch_target){.size = image->header.size,
                                                .l1_offset = image->header.l1_offset,
                                                .l1_size = image->header.l1_size,
                                                .snapshot_count = image->header.snapshot_count,
                                                .snapshots_offset = image->header.snapshots_offset};
    code = work->entries ? qcow2_snapshot_table_read(image, &work->table, err)
                         : error_set_errno(err, -ENOMEM, "Could not read node '%s'", image->node->name);
    if (code < 0) {
        qcow2_switch_abort(&work->change);
        g_free(work->entries);
    }
    return code;
}

static void work_clear(struct work *work)
{
    qcow2_snapshot_table_clear(&work->table);
    g_free(work->l1);
    g_free(work->entries);
}

static void coroutine_fn work_abort(struct work *work)
{
    qcow2_switch_abort(&work->change);
    work_clear(work);
}

/* Shows it, if all went well so far (`code`). */
static int coroutine_fn work_end(struct work *work, int code)
{
    if (code < 0) {
        work_abort(work);
        return code;
    }
    struct qcow2 *image = work->image;
    code = qcow2_switch_commit(&work->change, &work->target, g_steal_pointer(&work->l1),
                               image->options.pass_discard_snapshot);
    work_clear(work);
    return code;
}

static uint64_t *copy_l1(const struct qcow2 *image, uint64_t entries)
{
    uint64_t *l1 = g_try_new0(uint64_t, MAX(entries, 1));
    if (l1) {
        memcpy(l1, image->l1, MIN(entries, image->header.l1_size) * sizeof(*l1));
    }
    return l1;
}

/* Writes an L1 table to a new place. */
static int coroutine_fn write_l1(struct work *work, const uint64_t *l1, uint64_t entries, uint64_t *ret_offset)
{
    struct qcow2 *image = work->image;
    uint64_t clusters = l1_clusters(image, entries);
    *ret_offset = 0;
    if (clusters == 0) {
        return 0;
    }
    uint64_t bytes = clusters << image->cluster_bits;
    g_autofree uint64_t *disk = g_try_malloc0(bytes);
    int code = disk ? qcow2_switch_take(&work->change, clusters, ret_offset) : -ENOMEM;
    for (uint64_t i = 0; code == 0 && i < entries; i++) {
        disk[i] = htobe64(l1[i]);
    }
    return code == 0 ? edge_write_memory(image->node->file, *ret_offset, disk, bytes, 0) : code;
}

/* Gives the active L1 table that is in work->l1 a new place, and drops the old one. */
static int coroutine_fn replace_l1(struct work *work)
{
    struct qcow2 *image = work->image;
    int code = write_l1(work, work->l1, work->target.l1_size, &work->target.l1_offset);
    if (code == 0) {
        code = qcow2_switch_add(&work->change, image->header.l1_offset,
                                l1_clusters(image, image->header.l1_size) << image->cluster_bits, -1);
    }
    return code;
}

/* Gives the snapshot table a new place, and drops the old one. */
static int coroutine_fn replace_table(struct work *work)
{
    struct qcow2 *image = work->image;
    g_autoptr(GByteArray) bytes = NULL;
    int code = qcow2_snapshot_table_build(&work->table, &bytes);
    work->target.snapshot_count = work->table.snapshots->len;
    work->target.snapshots_offset = 0;
    if (code == 0 && bytes->len) {
        uint64_t clusters = div_up(bytes->len, image->cluster_size);
        code = qcow2_switch_take(&work->change, clusters, &work->target.snapshots_offset);
    }
    if (code == 0 && bytes->len) {
        code = edge_write_memory(image->node->file, work->target.snapshots_offset, bytes->data, bytes->len, 0);
    }
    return code == 0 ? qcow2_switch_add(&work->change, image->header.snapshots_offset, work->table.bytes, -1) : code;
}

/* --- L2 tables --- */

/* Reads the table that an L1 entry leads to into work->entries; *ret 0: there is none. */
static int coroutine_fn read_l2(struct work *work, uint64_t entry, uint64_t *ret)
{
    struct qcow2 *image = work->image;
    *ret = entry & QCOW2_OFFSET_MASK;
    if (entry & QCOW2_L1_RESERVED || qcow2_in_cluster(image, *ret) ||
        (*ret && qcow2_overlaps_metadata(image, *ret, image->cluster_size))) {
        return qcow2_mark_corrupt(image, "an L1 entry is 0x%" G_GINT64_MODIFIER "x", entry);
    }
    return *ret ? edge_read_memory(image->node->file, *ret, work->entries, image->cluster_size) : 0;
}

/* Changes the refcounts of all clusters that work->entries show. */
static int coroutine_fn add_shown(struct work *work, int delta)
{
    struct qcow2 *image = work->image;
    int code = 0;
    for (uint64_t i = 0; code == 0 && i < (uint64_t)1 << image->l2_bits; i++) {
        struct qcow2_entry entry = qcow2_entry_load(image, work->entries, i);
        enum qcow2_kind kind = qcow2_entry_kind(image, entry);
        uint64_t offset = entry.descriptor & QCOW2_OFFSET_MASK;
        if (kind == QCOW2_INVALID) {
            return qcow2_mark_corrupt(image, "an L2 entry is 0x%" G_GINT64_MODIFIER "x", entry.descriptor);
        }
        if (kind == QCOW2_COMPRESSED_DATA) {
            uint64_t bytes;
            qcow2_compressed_place(image->cluster_bits, entry.descriptor, &offset, &bytes);
            code = qcow2_switch_add(&work->change, offset, bytes, delta);
        } else if (qcow2_kind_has_place(kind)) {
            code = qcow2_switch_add(&work->change, offset, image->cluster_size, delta);
        }
    }
    return code;
}

/* Makes the COPIED flags in work->entries what the refcounts say; `shared`: all are shared. */
static int coroutine_fn correct_flags(struct work *work, bool shared, bool *ret_changed)
{
    struct qcow2 *image = work->image;
    *ret_changed = false;
    for (uint64_t i = 0; i < (uint64_t)1 << image->l2_bits; i++) {
        struct qcow2_entry entry = qcow2_entry_load(image, work->entries, i);
        uint64_t descriptor = entry.descriptor & ~QCOW2_COPIED;
        if (!shared && qcow2_kind_has_place(qcow2_entry_kind(image, entry))) {
            uint64_t refcount;
            int code = qcow2_switch_get(&work->change, descriptor & QCOW2_OFFSET_MASK, &refcount);
            if (code < 0) {
                return code;
            }
            descriptor |= refcount == 1 ? QCOW2_COPIED : 0;
        }
        if (descriptor != entry.descriptor) {
            entry.descriptor = descriptor;
            qcow2_entry_store(image, work->entries, i, entry);
            *ret_changed = true;
        }
    }
    return 0;
}

/* Writes work->entries to a new place. */
static int coroutine_fn write_l2(struct work *work, uint64_t *ret)
{
    int code = qcow2_switch_take(&work->change, 1, ret);
    return code == 0 ? edge_write_memory(work->image->node->file, *ret, work->entries, work->image->cluster_size, 0)
                     : code;
}

/* Every way from `l1` is gone: drops what it showed. */
static int coroutine_fn drop_shown(struct work *work, const uint64_t *l1, uint64_t entries)
{
    int code = 0;
    for (uint64_t i = 0; code == 0 && i < entries; i++) {
        uint64_t table;
        code = read_l2(work, l1[i], &table);
        if (code == 0 && table) {
            code = add_shown(work, -1);
        }
        if (code == 0 && table) {
            code = qcow2_switch_add(&work->change, table, work->image->cluster_size, -1);
        }
    }
    return code;
}

/* The L1 table of a snapshot, host byte order; g_free(). */
static int coroutine_fn read_snapshot_l1(struct qcow2 *image, const struct qcow2_snapshot *snapshot, uint64_t **ret,
                                         struct error **err)
{
    uint64_t bytes = (uint64_t)snapshot->l1_size * 8;
    uint64_t end = align_up(edge_size(image->node->file), image->cluster_size);
    if (qcow2_in_cluster(image, snapshot->l1_offset) || bytes > QCOW2_L1_BYTES_MAX || snapshot->l1_offset > end ||
        bytes > end - snapshot->l1_offset || (bytes && qcow2_overlaps_metadata(image, snapshot->l1_offset, bytes))) {
        return error_set(err, -EIO, "The L1 table of snapshot '%s' of node '%s' is invalid", snapshot->name,
                         image->node->name);
    }
    uint64_t *l1 = g_try_malloc(MAX(bytes, 8));
    int code = l1 ? 0 : -ENOMEM;
    if (code == 0 && bytes) {
        code = edge_read_memory(image->node->file, snapshot->l1_offset, l1, bytes);
    }
    if (code < 0) {
        g_free(l1);
        return error_set_errno(err, code, "Could not read the L1 table of snapshot '%s'", snapshot->name);
    }
    for (uint64_t i = 0; i < snapshot->l1_size; i++) {
        l1[i] = be64toh(l1[i]);
    }
    *ret = l1;
    return 0;
}

static struct qcow2_snapshot *find(const struct qcow2 *image, const struct qcow2_snapshot_table *table,
                                   const char *name, struct error **err)
{
    struct qcow2_snapshot *snapshot = qcow2_snapshot_find(table, name);
    if (!snapshot) {
        error_set(err, -ENOENT, "Node '%s' has no snapshot with the id or name '%s'", image->node->name, name);
    }
    return snapshot;
}

/* --- the list --- */

int coroutine_fn qcow2_snapshot_list(struct node *node, struct snapshot_info_list **ret, struct error **err)
{
    struct qcow2 *image = node->state;
    struct qcow2_snapshot_table table;
    co_mutex_lock(&image->lock);
    int code = qcow2_snapshot_table_read(image, &table, err);
    co_mutex_unlock(&image->lock);
    if (code < 0) {
        return code;
    }
    struct snapshot_info_list *list = g_new0(struct snapshot_info_list, 1);
    for (unsigned i = 0; i < table.snapshots->len; i++) {
        snapshot_info_list_append(list, qcow2_snapshot_describe(table.snapshots->pdata[i]));
    }
    qcow2_snapshot_table_clear(&table);
    *ret = list;
    return 0;
}

/* --- making one --- */

/* work->l1 and the snapshot's are the same afterwards: all is shared. */
static int coroutine_fn share_active(struct work *work)
{
    int code = 0;
    for (uint64_t i = 0; code == 0 && i < work->target.l1_size; i++) {
        bool changed = false;
        uint64_t table;
        code = read_l2(work, work->l1[i], &table);
        if (code < 0 || table == 0) {
            continue;
        }
        code = add_shown(work, 1);
        if (code == 0) {
            code = correct_flags(work, true, &changed);
        }
        if (code == 0) {
            code = qcow2_switch_add(&work->change, table, work->image->cluster_size, changed ? -1 : 1);
        }
        if (code == 0 && changed) {
            code = write_l2(work, &table);
        }
        if (code == 0 && changed) {
            qcow2_switch_share(&work->change, table);
        }
        work->l1[i] = table;
    }
    return code;
}

/* What a change of snapshots that failed is to say. */
static int explain(const struct qcow2 *image, int code, const char *what, const char *name, struct error **err)
{
    const char *node = image->node->name;
    if (code == -ERANGE) {
        return error_set(err, -EINVAL,
                         "Could not %s snapshot '%s' of node '%s': a cluster has as many uses already as its refcount "
                         "of %u bits can count",
                         what, name, node, 1u << image->header.refcount_order);
    }
    return code < 0 ? error_set_errno(err, code, "Could not %s snapshot '%s' of node '%s'", what, name, node) : 0;
}

static int check_new(const struct work *work, const struct snapshot_info *info, struct error **err)
{
    if (strlen(info->name) > NAME_MAX_BYTES) {
        return error_set(err, -EINVAL, "The name of a snapshot has %d bytes at most", NAME_MAX_BYTES);
    }
    if (work->table.snapshots->len >= QCOW2_SNAPSHOTS_MAX) {
        return error_set(err, -EFBIG, "Node '%s' has %d snapshots already, which is the most that qcow2 has",
                         work->image->node->name, QCOW2_SNAPSHOTS_MAX);
    }
    return 0;
}

int coroutine_fn qcow2_snapshot_make(struct node *node, const struct snapshot_info *info, struct error **err)
{
    struct qcow2 *image = node->state;
    struct work work;
    int code = work_begin(image, &work, err);
    if (code < 0) {
        return code;
    }
    code = check_new(&work, info, err);
    if (code < 0) {
        work_abort(&work);
        return code;
    }
    struct qcow2_snapshot *snapshot =
        qcow2_snapshot_create(info, qcow2_snapshot_new_id(&work.table), image->header.size);
    g_ptr_array_add(work.table.snapshots, snapshot);
    snapshot->l1_size = image->header.l1_size;
    work.l1 = copy_l1(image, image->header.l1_size);
    code = work.l1 ? share_active(&work) : -ENOMEM;
    if (code == 0) {
        code = write_l1(&work, work.l1, snapshot->l1_size, &snapshot->l1_offset);
    }
    if (code == 0) {
        code = replace_l1(&work);
    }
    if (code == 0) {
        code = replace_table(&work);
    }
    return explain(image, work_end(&work, code), "make", info->name, err);
}

/* --- deleting one --- */

/* Clusters of the active tables that are used by nobody else any more may be written in place from now on. */
static int coroutine_fn correct_active(struct work *work, bool *ret_changed)
{
    struct qcow2 *image = work->image;
    int code = 0;
    *ret_changed = false;
    for (uint64_t i = 0; code == 0 && i < work->target.l1_size; i++) {
        bool changed = false;
        uint64_t refcount = 0;
        uint64_t table;
        code = read_l2(work, work->l1[i], &table);
        if (code < 0 || table == 0) {
            continue;
        }
        code = qcow2_switch_get(&work->change, table, &refcount);
        if (code == 0) {
            code = correct_flags(work, refcount != 1, &changed);
        }
        if (code == 0 && changed) {
            code = qcow2_switch_add(&work->change, table, image->cluster_size, -1);
        }
        if (code == 0 && changed) {
            code = write_l2(work, &table);
        }
        uint64_t entry = table | (changed || refcount == 1 ? QCOW2_COPIED : 0);
        *ret_changed |= entry != work->l1[i];
        work->l1[i] = entry;
    }
    return code;
}

static int coroutine_fn drop_snapshot(struct work *work, struct qcow2_snapshot *snapshot, const uint64_t *l1)
{
    struct qcow2 *image = work->image;
    bool changed = false;
    int code = drop_shown(work, l1, snapshot->l1_size);
    if (code == 0) {
        code = qcow2_switch_add(&work->change, snapshot->l1_offset,
                                l1_clusters(image, snapshot->l1_size) << image->cluster_bits, -1);
    }
    if (code == 0) {
        code = correct_active(work, &changed);
    }
    if (code == 0 && changed) {
        code = replace_l1(work);
    }
    g_ptr_array_remove(work->table.snapshots, snapshot);
    return code == 0 ? replace_table(work) : code;
}

int coroutine_fn qcow2_snapshot_delete(struct node *node, const char *name, struct error **err)
{
    struct qcow2 *image = node->state;
    g_autofree uint64_t *l1 = NULL;
    struct work work;
    int code = work_begin(image, &work, err);
    if (code < 0) {
        return code;
    }
    struct qcow2_snapshot *snapshot = find(image, &work.table, name, err);
    code = snapshot ? read_snapshot_l1(image, snapshot, &l1, err) : -ENOENT;
    if (code < 0) {
        work_abort(&work);
        return code;
    }
    work.l1 = copy_l1(image, image->header.l1_size);
    code = work.l1 ? drop_snapshot(&work, snapshot, l1) : -ENOMEM;
    return explain(image, work_end(&work, code), "delete", name, err);
}

/* --- going back to one --- */

/* work->l1 is a copy of the snapshot's, which stays: all is shared. */
static int coroutine_fn share_snapshot(struct work *work, uint64_t entries)
{
    int code = 0;
    for (uint64_t i = 0; code == 0 && i < entries; i++) {
        bool changed = false;
        uint64_t table;
        code = read_l2(work, work->l1[i], &table);
        if (code < 0 || table == 0) {
            continue;
        }
        code = add_shown(work, 1);
        if (code == 0) {
            code = correct_flags(work, true, &changed);
        }
        if (code == 0) {
            code =
                changed ? write_l2(work, &table) : qcow2_switch_add(&work->change, table, work->image->cluster_size, 1);
        }
        work->l1[i] = table | (changed ? QCOW2_COPIED : 0);
    }
    return code;
}

static int coroutine_fn switch_to(struct work *work, const struct qcow2_snapshot *snapshot, const uint64_t *l1)
{
    struct qcow2 *image = work->image;
    uint64_t entries = max_u64(snapshot->l1_size, max_u64(1, l1_entries_for(image, snapshot->disk_size)));
    work->l1 = g_try_new0(uint64_t, entries);
    if (!work->l1) {
        return -ENOMEM;
    }
    memcpy(work->l1, l1, snapshot->l1_size * sizeof(*l1));
    work->target.size = snapshot->disk_size;
    work->target.l1_size = entries;
    /* What the snapshot shows keeps the use that the snapshot makes of it: nothing of it falls to 0 between. */
    int code = drop_shown(work, image->l1, image->header.l1_size);
    if (code == 0) {
        code = share_snapshot(work, snapshot->l1_size);
    }
    return code == 0 ? replace_l1(work) : code;
}

int coroutine_fn qcow2_empty(struct node *node, struct error **err)
{
    struct qcow2 *image = node->state;
    struct work work;
    int code = work_begin(image, &work, err);
    if (code < 0) {
        return code;
    }
    work.l1 = g_try_new0(uint64_t, MAX(image->header.l1_size, 1));
    code = work.l1 ? drop_shown(&work, image->l1, image->header.l1_size) : -ENOMEM;
    if (code == 0) {
        code = replace_l1(&work);
    }
    code = work_end(&work, code);
    return code < 0 ? error_set_errno(err, code, "Could not empty node '%s'", node->name) : 0;
}

static int check_size(const struct qcow2 *image, const struct qcow2_snapshot *snapshot, struct error **err)
{
    if (snapshot->disk_size > INT64_MAX - image->cluster_size || snapshot->disk_size % QCOW2_SECTOR ||
        l1_entries_for(image, snapshot->disk_size) > QCOW2_L1_BYTES_MAX / 8) {
        return error_set(err, -EFBIG,
                         "Snapshot '%s' of node '%s' has a disk of %" G_GUINT64_FORMAT " bytes, which cannot be",
                         snapshot->name, image->node->name, snapshot->disk_size);
    }
    return 0;
}

int coroutine_fn qcow2_snapshot_apply(struct node *node, const char *name, struct error **err)
{
    struct qcow2 *image = node->state;
    g_autofree uint64_t *l1 = NULL;
    struct work work;
    if (!list_is_empty(&node->bitmaps)) {
        return error_set(err, -EBUSY, "Node '%s' has dirty bitmaps, which would not tell what a snapshot changes",
                         node->name);
    }
    int code = work_begin(image, &work, err);
    if (code < 0) {
        return code;
    }
    struct qcow2_snapshot *snapshot = find(image, &work.table, name, err);
    code = snapshot ? check_size(image, snapshot, err) : -ENOENT;
    if (code == 0) {
        code = read_snapshot_l1(image, snapshot, &l1, err);
    }
    if (code < 0) {
        work_abort(&work);
        return code;
    }
    uint64_t size = snapshot->disk_size;
    code = explain(image, work_end(&work, switch_to(&work, snapshot, l1)), "apply", name, err);
    if (code < 0) {
        return code;
    }
    atomic_store(&node->size, size);
    return 0;
}

/* --- showing one --- */

static int coroutine_fn show(struct qcow2 *image, const struct qcow2_snapshot *snapshot, struct error **err)
{
    g_autofree uint64_t *l1 = NULL;
    int code = check_size(image, snapshot, err);
    if (code == 0) {
        code = read_snapshot_l1(image, snapshot, &l1, err);
    }
    if (code < 0) {
        return code;
    }
    uint64_t entries = max_u64(snapshot->l1_size, max_u64(1, l1_entries_for(image, snapshot->disk_size)));
    uint64_t *shown = g_try_new0(uint64_t, entries);
    uint8_t *dirty = g_try_malloc0(entries / 64 + 1);
    if (!shown || !dirty) {
        g_free(shown);
        g_free(dirty);
        return error_set_errno(err, -ENOMEM, "Could not show snapshot '%s'", snapshot->name);
    }
    memcpy(shown, l1, snapshot->l1_size * sizeof(*l1));
    g_free(image->l1);
    g_free(image->l1_dirty);
    image->l1 = shown;
    image->l1_dirty = dirty;
    image->header.l1_size = entries;
    image->header.l1_offset = snapshot->l1_offset;
    image->header.size = snapshot->disk_size;
    image->shows_snapshot = true;
    return 0;
}

int coroutine_fn qcow2_snapshot_load(struct node *node, const char *name, struct error **err)
{
    struct qcow2 *image = node->state;
    struct qcow2_snapshot_table table;
    if (node->writable || image->external) {
        return error_set(err, node->writable ? -EINVAL : -ENOTSUP, "Node '%s' %s: a snapshot of it cannot be shown",
                         node->name, node->writable ? "is open for writing" : "has an external data file");
    }
    co_mutex_lock(&image->lock);
    int code = qcow2_snapshot_table_read(image, &table, err);
    if (code == 0) {
        struct qcow2_snapshot *snapshot = find(image, &table, name, err);
        code = snapshot ? show(image, snapshot, err) : -ENOENT;
        qcow2_snapshot_table_clear(&table);
    }
    co_mutex_unlock(&image->lock);
    if (code == 0) {
        atomic_store(&node->size, image->header.size);
        qcow2_bitmaps_forget(image); /* they tell of the active state */
    }
    return code;
}
