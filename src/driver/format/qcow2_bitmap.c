/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Dirty bitmaps that the image keeps: loading, storing, and the mark "in use" between.
 *
 * 1. On disk a bitmap is right, or marked in use. The mark is set, and stable, before anything can make it wrong: for
 *    those that record (AUTO) before the first write of a guest; for one that a command changes, before the command
 *    does; for all before the size changes. A crash from then on leaves a bitmap that says of itself that it is not to
 * be believed. Marking is a write within a sector each: power going between two leaves one marked and not the other,
 *    while both are right.
 * 2. Storing writes the bits and tables of those that are marked (or new) to new clusters, and then a new directory
 *    without the marks, shown by one write (qcow2_bitmap_directory.c). Clusters of the old ones are freed after that.
 *    Power going before that write: the marks are there, what was written is leaked. After it: all are right.
 * 3. What was not touched is not written: its entry is copied.
 * 4. Entries that we do not know (type, flags, extra data) are kept as they are, with their clusters; if they claim to
 *    record all writes they are marked too. A bitmap that was in use when it was found, or whose tables make no sense,
 *    is inconsistent: it can be removed. None of this keeps an image from being opened.
 * 5. If the directory itself makes no sense it is left alone until the first write, which voids it (autoclear bit).
 *
 * All bits of an image take 1 GiB of address space at most, and what a file can make us fill with ones 128 MiB.
 */
#include "driver/format/qcow2_bitmap.h"
#include "base/size.h"
#include "block/bitmap.h"
#include "block/dirty.h"
#include "block/driver.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_bitmap_directory.h"
#include "driver/format/qcow2_bitmap_trust.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_refcount.h"
#include <endian.h>
#include <errno.h>
#include <string.h>

#define BITS_BYTES_MAX (1 * GiB)
#define FILLED_BYTES_MAX (128 * MiB)
#define ENTRY_ONES UINT64_C(1)
#define ENTRY_RESERVED (~(QCOW2_OFFSET_MASK | ENTRY_ONES))

/* What loading has taken so far. */
struct budget {
    uint64_t bits, filled;
};

static uint64_t saved_bytes(const struct qcow2 *image, uint64_t granularity)
{
    return div_up(div_up(atomic_load(&image->node->size), granularity), 8);
}

static struct qcow2_bitmap_record *record_of(const struct qcow2 *image, const struct bitmap *bitmap)
{
    for (unsigned i = 0; i < image->bitmaps->len; i++) {
        struct qcow2_bitmap_record *record = image->bitmaps->pdata[i];
        if (record->bitmap == bitmap) {
            return record;
        }
    }
    return NULL;
}

/* --- loading --- */

/* The table of a record, host byte order; NULL with *ret_code: it makes no sense, or cannot be read. */
static uint64_t *coroutine_fn read_table(struct qcow2 *image, const struct qcow2_bitmap_record *record, int *ret_code)
{
    uint64_t bytes = (uint64_t)record->table_entries * 8;
    uint64_t end = align_up(edge_size(image->node->file), image->cluster_size);
    *ret_code = -EINVAL;
    if (qcow2_in_cluster(image, record->table_offset) || record->table_offset > end ||
        bytes > end - record->table_offset || record->table_entries > QCOW2_BITMAP_TABLE_ENTRIES_MAX) {
        return NULL;
    }
    g_autofree uint64_t *table = g_try_malloc(MAX(bytes, 8));
    *ret_code = table ? 0 : -ENOMEM;
    if (table && bytes) {
        *ret_code = edge_read_memory(image->node->file, record->table_offset, table, bytes);
    }
    for (uint32_t i = 0; *ret_code == 0 && i < record->table_entries; i++) {
        table[i] = be64toh(table[i]);
        uint64_t offset = table[i] & QCOW2_OFFSET_MASK;
        if (table[i] & ENTRY_RESERVED || (offset && table[i] & ENTRY_ONES) || qcow2_in_cluster(image, offset) ||
            offset >= end) {
            *ret_code = -EINVAL;
        }
    }
    return *ret_code == 0 ? g_steal_pointer(&table) : NULL;
}

/* What one entry of the table stands for: `bytes` of bits from `first` on. */
static int coroutine_fn load_part(struct qcow2 *image, struct dirty *dirty, uint64_t entry, uint64_t first,
                                  uint64_t bytes, uint8_t *room)
{
    if (entry == ENTRY_ONES) {
        memset(room, 0xff, bytes);
    } else if (entry) {
        int code = edge_read_memory(image->node->file, entry & QCOW2_OFFSET_MASK, room, bytes);
        if (code < 0) {
            return code;
        }
    } else {
        return 0;
    }
    dirty_load(dirty, first, bytes, room);
    return 0;
}

static int coroutine_fn load_bits(struct qcow2 *image, const struct qcow2_bitmap_record *record, struct budget *budget)
{
    struct dirty *dirty = record->bitmap->dirty;
    uint64_t all = dirty_saved_bytes(dirty);
    int code = -EINVAL;
    g_autofree uint64_t *table = NULL;
    g_autofree uint8_t *room = g_try_malloc(image->cluster_size);
    if (record->table_entries == div_up(all, image->cluster_size)) {
        table = read_table(image, record, &code);
    }
    if (!table || !room) {
        return code < 0 ? code : -ENOMEM;
    }
    for (uint32_t i = 0; code == 0 && i < record->table_entries; i++) {
        uint64_t first = (uint64_t)i << image->cluster_bits;
        uint64_t bytes = min_u64(all - first, image->cluster_size);
        budget->filled += table[i] ? bytes : 0;
        code = budget->filled > FILLED_BYTES_MAX ? -ENOMEM : load_part(image, dirty, table[i], first, bytes, room);
    }
    return code;
}

static void coroutine_fn load_record(struct qcow2 *image, struct qcow2_bitmap_record *record, const char *name,
                                     struct budget *budget)
{
    struct node *node = image->node;
    uint64_t granularity = UINT64_C(1) << record->granularity_bits;
    bool inconsistent = record->flags & QCOW2_BITMAP_IN_USE;
    uint64_t bytes = inconsistent ? 0 : saved_bytes(image, granularity);
    bool fits = bytes <= BITS_BYTES_MAX - budget->bits;
    int code = bitmap_restore(node, name, granularity, record->flags & QCOW2_BITMAP_AUTO, inconsistent || !fits,
                              &record->bitmap);
    if (inconsistent) {
        return;
    }
    if (code == 0 && fits) {
        budget->bits += bytes;
        code = load_bits(image, record, budget);
    } else if (code == 0) {
        code = -ENOMEM;
    }
    if (code < 0) {
        g_message("qcow2 image of node '%s': bitmap '%s' cannot be used: %s", node->name, name, g_strerror(-code));
        dirty_destroy(g_steal_pointer(&record->bitmap->dirty));
    }
}

void coroutine_fn qcow2_bitmaps_load(struct qcow2 *image)
{
    GPtrArray *records = NULL;
    struct budget budget = {0};
    int code = qcow2_bitmap_directory_read(image, &records);
    if (code < 0) {
        g_message("qcow2 image of node '%s': its bitmaps cannot be read: %s", image->node->name, g_strerror(-code));
        image->bitmaps = g_ptr_array_new_with_free_func(qcow2_bitmap_record_free);
        return;
    }
    image->bitmaps = records;
    image->autoclear_kept |= records->len ? QCOW2_AUTOCLEAR_BITMAPS : 0; /* the bit is true, and stays so */
    g_autoptr(GHashTable) names = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    for (unsigned i = 0; i < records->len && !image->node->check_only; i++) {
        struct qcow2_bitmap_record *record = records->pdata[i];
        /* Nobody can ask for a name that is no text, so it is known by its legible form. */
        g_autofree char *name = g_utf8_make_valid(record->name, -1);
        /* Of two with one name the second is only kept. */
        if (qcow2_bitmap_record_is_known(record) && strlen(name) <= BITMAP_NAME_MAX &&
            g_hash_table_add(names, g_strdup(name))) {
            load_record(image, record, name, &budget);
        }
    }
}

void qcow2_bitmaps_unload(struct qcow2 *image)
{
    g_clear_pointer(&image->bitmaps, g_ptr_array_unref);
}

void qcow2_bitmaps_forget(struct qcow2 *image)
{
    g_ptr_array_set_size(image->bitmaps, 0);
    list_for_each_safe (link, &image->node->bitmaps) {
        struct bitmap *bitmap = container_of(link, struct bitmap, link);
        if (bitmap->persistent) {
            bitmap_forget(bitmap);
        }
    }
}

/* --- in use --- */

static int coroutine_fn mark_in_use(struct qcow2 *image, struct qcow2_bitmap_record *record)
{
    if (record->flags & QCOW2_BITMAP_IN_USE) {
        return 0;
    }
    record->flags |= QCOW2_BITMAP_IN_USE;
    image->bitmaps_unstable = true;
    int code = qcow2_bitmap_record_write_flags(image, record);
    if (code < 0) {
        record->flags &= ~(uint32_t)QCOW2_BITMAP_IN_USE; /* if it is there all the same it does no harm */
    }
    return code;
}

/* What comes next may lean on the marks. One flush that fails does not make the next one needless. */
static int coroutine_fn settle_marks(struct qcow2 *image)
{
    int code = image->bitmaps_unstable ? edge_flush(image->node->file) : 0;
    image->bitmaps_unstable &= code < 0;
    return code;
}

static int coroutine_fn mark_all(struct qcow2 *image, bool recording_only)
{
    int code = 0;
    for (unsigned i = 0; code == 0 && i < image->bitmaps->len; i++) {
        struct qcow2_bitmap_record *record = image->bitmaps->pdata[i];
        const struct bitmap *bitmap = record->bitmap;
        bool wanted = record->flags & QCOW2_BITMAP_AUTO || (bitmap && (!recording_only || bitmap->changed));
        code = wanted ? mark_in_use(image, record) : 0;
    }
    return code == 0 ? settle_marks(image) : code;
}

int coroutine_fn qcow2_bitmaps_begin_writing(struct qcow2 *image)
{
    return mark_all(image, true);
}

int coroutine_fn qcow2_bitmaps_begin_resize(struct qcow2 *image)
{
    co_mutex_lock(&image->lock);
    int code = mark_all(image, false);
    co_mutex_unlock(&image->lock);
    return code;
}

int coroutine_fn qcow2_bitmap_change(struct node *node, struct bitmap *bitmap, struct error **err)
{
    struct qcow2 *image = node->state;
    struct qcow2_bitmap_record *record = record_of(image, bitmap);
    int code = qcow2_prepare_write(image);
    co_mutex_lock(&image->lock);
    if (code == 0 && record) {
        code = mark_in_use(image, record);
    }
    if (code == 0) {
        code = settle_marks(image);
    }
    co_mutex_unlock(&image->lock);
    return code < 0 ? error_set_errno(err, code, "Could not mark bitmap '%s' of node '%s' as in use", bitmap->name,
                                      node->name)
                    : 0;
}

/* --- freeing what a record leads to --- */

/* Clusters that stand in a directory which is not shown any more, or never was. */
static void coroutine_fn drop_clusters(struct qcow2 *image, uint64_t offset, uint64_t bytes, bool shown)
{
    uint64_t clusters = div_up(bytes, image->cluster_size);
    if (clusters && shown) {
        qcow2_free(image, offset, clusters, image->options.pass_discard_other);
    } else if (clusters) {
        qcow2_release(image, offset, clusters);
    }
}

/* `table` NULL, or one that lies: what it leads to leaks. */
static void coroutine_fn drop_bits(struct qcow2 *image, const struct qcow2_bitmap_record *record, const uint64_t *table,
                                   bool shown)
{
    if (shown && (!table || !qcow2_bitmap_may_be_freed(image, record, table))) {
        g_message("qcow2 image of node '%s': what bitmap '%s' had used is not free", image->node->name,
                  record->bitmap ? record->bitmap->name : "");
        return;
    }
    for (uint32_t i = 0; table && i < record->table_entries; i++) {
        uint64_t offset = table[i] & QCOW2_OFFSET_MASK;
        drop_clusters(image, offset, offset ? image->cluster_size : 0, shown);
    }
    if (record->table_offset) {
        drop_clusters(image, record->table_offset, (uint64_t)record->table_entries * 8, shown);
    }
}

/* --- storing --- */

/* One that is being written: what its record becomes. */
struct storing {
    struct qcow2_bitmap_record *old; /* or NULL */
    uint64_t *old_table;             /* or NULL */
    struct qcow2_bitmap_record *new; /* in the new directory */
    uint64_t *table;                 /* host byte order */
};

static void storing_clear(void *item)
{
    struct storing *storing = item;
    g_free(storing->old_table);
    g_free(storing->table);
}

static int coroutine_fn store_part(struct qcow2 *image, const struct dirty *dirty, uint64_t first, uint64_t bytes,
                                   uint8_t *room, uint64_t *ret_entry)
{
    uint64_t clusters;
    bool clean;
    memset(room, 0, image->cluster_size);
    if (!dirty_save(dirty, first, bytes, room)) {
        return 0;
    }
    uint64_t offset;
    int code = qcow2_allocate(image, 1, &offset, &clusters, &clean);
    if (code < 0) {
        return code;
    }
    *ret_entry = offset;
    return edge_write_memory(image->node->file, offset, room, image->cluster_size, 0);
}

static int coroutine_fn store_table(struct qcow2 *image, struct storing *storing)
{
    uint32_t entries = storing->new->table_entries;
    uint64_t bytes = (uint64_t)entries * 8;
    if (entries == 0) {
        return 0;
    }
    g_autofree uint64_t *disk = g_try_malloc(bytes);
    int code =
        disk ? qcow2_allocate_exactly(image, div_up(bytes, image->cluster_size), &storing->new->table_offset) : -ENOMEM;
    for (uint32_t i = 0; code == 0 && i < entries; i++) {
        disk[i] = htobe64(storing->table[i]);
    }
    return code == 0 ? edge_write_memory(image->node->file, storing->new->table_offset, disk, bytes, 0) : code;
}

/* Writes bits and table of one bitmap to new clusters. */
static int coroutine_fn store_bits(struct qcow2 *image, struct storing *storing)
{
    const struct bitmap *bitmap = storing->new->bitmap;
    uint64_t all = dirty_saved_bytes(bitmap->dirty);
    uint64_t entries = div_up(all, image->cluster_size);
    uint64_t span = bitmap->granularity * 8 << image->cluster_bits; /* of the disk, to an entry */
    g_autofree uint8_t *room = g_try_malloc(image->cluster_size);
    uint64_t offset;
    uint64_t bytes;
    int code = 0;
    if (entries > QCOW2_BITMAP_TABLE_ENTRIES_MAX) {
        return -EFBIG;
    }
    storing->table = g_try_new0(uint64_t, MAX(entries, 1));
    if (!room || !storing->table) {
        return -ENOMEM;
    }
    storing->new->table_entries = entries;
    for (uint64_t at = 0; code == 0 && dirty_next(bitmap->dirty, at, &offset, &bytes);) {
        uint64_t i = offset / span;
        uint64_t first = i << image->cluster_bits;
        code = store_part(image, bitmap->dirty, first, min_u64(all - first, image->cluster_size), room,
                          &storing->table[i]);
        at = (i + 1) * span;
    }
    return code == 0 ? store_table(image, storing) : code;
}

static struct qcow2_bitmap_record *record_copy(const struct qcow2_bitmap_record *from)
{
    struct qcow2_bitmap_record *copy = g_new(struct qcow2_bitmap_record, 1);
    *copy = *from;
    copy->name = g_strdup(from->name);
    copy->extra = g_memdup2(from->extra, from->extra_size);
    return copy;
}

/* Does the image lack what this one says? */
static bool wants_storing(const struct bitmap *bitmap, const struct qcow2_bitmap_record *record)
{
    return bitmap->persistent && bitmap->dirty && (bitmap->changed || !record || record->flags & QCOW2_BITMAP_IN_USE);
}

static void coroutine_fn add_storing(struct qcow2 *image, GArray *list, struct bitmap *bitmap,
                                     struct qcow2_bitmap_record *old, struct qcow2_bitmap_record *new)
{
    int unused;
    struct storing storing = {.old = old, .new = new};
    storing.old_table = old ? read_table(image, old, &unused) : NULL;
    new->ours = true;
    new->bitmap = bitmap;
    new->table_offset = new->table_entries = 0;
    new->granularity_bits = __builtin_ctzll(bitmap->granularity);
    new->flags &= ~(uint32_t)(QCOW2_BITMAP_IN_USE | QCOW2_BITMAP_AUTO);
    new->flags |= bitmap->enabled ? QCOW2_BITMAP_AUTO : 0;
    g_array_append_val(list, storing);
}

/* The directory as it is to be, and which of its bitmaps are to be written. */
static GPtrArray *coroutine_fn plan_directory(struct qcow2 *image, GArray *list)
{
    GPtrArray *records = g_ptr_array_new_with_free_func(qcow2_bitmap_record_free);
    for (unsigned i = 0; i < image->bitmaps->len; i++) {
        struct qcow2_bitmap_record *record = image->bitmaps->pdata[i];
        struct qcow2_bitmap_record *copy = record_copy(record);
        g_ptr_array_add(records, copy);
        if (record->bitmap && wants_storing(record->bitmap, record)) {
            add_storing(image, list, record->bitmap, record, copy);
        }
    }
    list_for_each (link, &image->node->bitmaps) {
        struct bitmap *bitmap = container_of(link, struct bitmap, link);
        if (bitmap->persistent && bitmap->dirty && !record_of(image, bitmap)) {
            struct qcow2_bitmap_record *record = qcow2_bitmap_record_create(bitmap->name);
            g_ptr_array_add(records, record);
            add_storing(image, list, bitmap, NULL, record);
        }
    }
    return records;
}

/* The new directory is shown: the old one's clusters are free, and the records are the new ones. */
static void coroutine_fn adopt(struct qcow2 *image, GArray *list, GPtrArray *records)
{
    for (unsigned i = 0; i < list->len; i++) {
        struct storing *storing = &g_array_index(list, struct storing, i);
        storing->new->bitmap->changed = false;
        if (storing->old) {
            drop_bits(image, storing->old, storing->old_table, true);
        }
    }
    g_ptr_array_unref(image->bitmaps);
    image->bitmaps = records;
    image->autoclear_kept |= QCOW2_AUTOCLEAR_BITMAPS;
    atomic_store(&image->prepared, false); /* the next write marks them again */
}

static int coroutine_fn store_all(struct qcow2 *image)
{
    g_autoptr(GArray) list = g_array_new(FALSE, TRUE, sizeof(struct storing));
    g_array_set_clear_func(list, storing_clear);
    GPtrArray *records = plan_directory(image, list);
    int code = 0;
    if (list->len) {
        qcow2_bitmaps_look_through(image);
    }
    for (unsigned i = 0; code == 0 && i < list->len; i++) {
        code = store_bits(image, &g_array_index(list, struct storing, i));
    }
    if (code == 0 && list->len) {
        code = qcow2_bitmap_directory_write(image, records);
    }
    if (code == 0 && list->len) {
        adopt(image, list, records);
        return 0;
    }
    for (unsigned i = 0; i < list->len && !image->frozen; i++) {
        const struct storing *storing = &g_array_index(list, struct storing, i);
        drop_bits(image, storing->new, storing->table, false);
    }
    g_ptr_array_unref(records);
    return code;
}

int coroutine_fn qcow2_bitmaps_store(struct node *node, struct error **err)
{
    struct qcow2 *image = node->state;
    bool wanted = false;
    list_for_each (link, &node->bitmaps) {
        const struct bitmap *bitmap = container_of(link, struct bitmap, link);
        wanted |= wants_storing(bitmap, record_of(image, bitmap));
    }
    if (!wanted) {
        return 0;
    }
    int code = qcow2_prepare_write(image);
    if (code == 0) {
        code = qcow2_flush_all(image);
    }
    if (code == 0) {
        co_mutex_lock(&image->lock);
        code = store_all(image);
        co_mutex_unlock(&image->lock);
    }
    if (code == 0) {
        code = qcow2_flush_all(image);
    }
    return code < 0 ? error_set_errno(err, code, "Could not store the dirty bitmaps of node '%s'", node->name) : 0;
}

/* --- commands --- */

int qcow2_bitmap_may_add(struct node *node, const char *name, uint64_t granularity, struct error **err)
{
    struct qcow2 *image = node->state;
    unsigned count = image->bitmaps->len;
    uint64_t bytes = 0;
    list_for_each (link, &node->bitmaps) {
        const struct bitmap *bitmap = container_of(link, struct bitmap, link);
        bool new = bitmap->persistent && !record_of(image, bitmap);
        count += new;
        bytes += new ? sizeof(struct qcow2_disk_bitmap) + strlen(bitmap->name) + 8 : 0;
    }
    if (image->header.version < 3) {
        return error_set(err, -ENOTSUP, "Cannot store dirty bitmaps in qcow2 v2 files");
    }
    if (image->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS) {
        bytes += image->header.bitmaps.directory_size;
    }
    if (count >= QCOW2_BITMAPS_MAX ||
        bytes + sizeof(struct qcow2_disk_bitmap) + strlen(name) + 8 > QCOW2_BITMAP_DIRECTORY_BYTES_MAX) {
        return error_set(err, -ENOSPC, "The image has as many bitmaps as it can have (%u)", count);
    }
    if (saved_bytes(image, granularity) > BITS_BYTES_MAX) {
        return error_set(err, -EFBIG, "Its granularity is too small for a disk of %" G_GUINT64_FORMAT " bytes",
                         atomic_load(&node->size));
    }
    for (unsigned i = 0; i < image->bitmaps->len; i++) {
        const struct qcow2_bitmap_record *record = image->bitmaps->pdata[i];
        if (g_str_equal(record->name, name)) {
            return error_set(err, -EEXIST, "Bitmap with the same name is already stored");
        }
    }
    return 0;
}

/* A directory without `record`, shown. The lock is held. */
static int coroutine_fn remove_record(struct qcow2 *image, struct qcow2_bitmap_record *record)
{
    int code = 0;
    int unused;
    g_autofree uint64_t *table = read_table(image, record, &unused);
    GPtrArray *records = g_ptr_array_new_with_free_func(qcow2_bitmap_record_free);
    qcow2_bitmaps_look_through(image);
    for (unsigned i = 0; i < image->bitmaps->len; i++) {
        if (image->bitmaps->pdata[i] != record) {
            g_ptr_array_add(records, record_copy(image->bitmaps->pdata[i]));
        }
    }
    code = qcow2_bitmap_directory_write(image, records);
    if (code < 0) {
        g_ptr_array_unref(records);
        return code;
    }
    drop_bits(image, record, table, true);
    g_ptr_array_unref(image->bitmaps);
    image->bitmaps = records;
    return 0;
}

int coroutine_fn qcow2_bitmap_remove(struct node *node, struct bitmap *bitmap, struct error **err)
{
    struct qcow2 *image = node->state;
    struct qcow2_bitmap_record *record = record_of(image, bitmap);
    if (!record) {
        return 0;
    }
    int code = qcow2_prepare_write(image);
    if (code == 0) {
        code = qcow2_flush_all(image);
    }
    if (code == 0) {
        co_mutex_lock(&image->lock);
        code = remove_record(image, record);
        co_mutex_unlock(&image->lock);
    }
    if (code == 0) {
        code = qcow2_flush_all(image);
    }
    return code < 0
               ? error_set_errno(err, code, "Could not remove bitmap '%s' from node '%s'", bitmap->name, node->name)
               : 0;
}

void qcow2_bitmaps_describe(struct qcow2 *image, bool *ret_has, struct qcow2_bitmap_info_list *ret)
{
    *ret_has = image->bitmaps && image->bitmaps->len > 0;
    for (unsigned i = 0; *ret_has && i < image->bitmaps->len; i++) {
        const struct qcow2_bitmap_record *record = image->bitmaps->pdata[i];
        struct qcow2_bitmap_info *info = g_new0(struct qcow2_bitmap_info, 1);
        info->name = g_utf8_make_valid(record->name, -1);
        info->granularity = record->granularity_bits < 63 ? INT64_C(1) << record->granularity_bits : 0;
        if (record->flags & QCOW2_BITMAP_IN_USE) {
            qcow2_bitmap_info_flags_list_append(&info->flags, QCOW2_BITMAP_INFO_FLAGS_IN_USE);
        }
        if (record->flags & QCOW2_BITMAP_AUTO) {
            qcow2_bitmap_info_flags_list_append(&info->flags, QCOW2_BITMAP_INFO_FLAGS_AUTO);
        }
        qcow2_bitmap_info_list_append(ret, info);
    }
}
