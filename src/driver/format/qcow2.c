/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The qcow2 driver: its table, opening and closing. qcow2.h has the state and the rules that keep an image whole. In
 * reading order: qcow2_format.h (what is on disk), qcow2_header.c, qcow2_cache.c, qcow2_refcount.c, qcow2_entry.c
 * (what an L2 entry says), qcow2_map.c (L1 and L2), qcow2_data.c (guest bytes, qcow2_crypto.c), qcow2_read.c,
 * qcow2_status.c, qcow2_write.c with qcow2_step.c, qcow2_zero.c, qcow2_compressed.c with qcow2_codec.c and
 * qcow2_deflate.c, qcow2_flush.c (the order of writing metadata). Then what is done with a whole image (qcow2_image.c
 * has the table): qcow2_create.c, qcow2_preallocate.c, qcow2_measure.c, qcow2_resize.c, qcow2_amend.c with
 * qcow2_expand.c; qcow2_check.c with qcow2_census*.c, qcow2_tally.c and qcow2_repair_*.c; qcow2_switch.c (changing
 * everything at once) under qcow2_snapshot*.c and qcow2_bitmap*.c; qcow2_overlap.c.
 *
 * 1. open, close, set_writable, change_backing and truncate run alone: the node is drained.
 * 2. An image with the corrupt bit is opened for reading only; one with the dirty bit is repaired before it is opened
 *    for writing, and read as it is otherwise.
 * 3. What is not supported is refused at open, by name: whatever incompatible feature or method of encryption is
 *    unknown. Lazy refcounts are accepted and kept eagerly.
 * 4. A data file that the options do not give is opened by open.c after `open`, by the name in the header: until then
 *    nothing looks at guest data.
 */
#include "driver/format/qcow2.h"
#include "base/size.h"
#include "block/graph.h"
#include "driver/drivers.h"
#include "driver/format/qcow2_bitmap.h"
#include "driver/format/qcow2_check.h"
#include "driver/format/qcow2_codec.h"
#include "driver/format/qcow2_crypto.h"
#include "driver/format/qcow2_entry.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_image.h"
#include "driver/format/qcow2_overlap.h"
#include "driver/format/qcow2_read.h"
#include "driver/format/qcow2_resize.h"
#include "driver/format/qcow2_status.h"
#include "driver/format/qcow2_write.h"
#include <endian.h>
#include <errno.h>
#include <string.h>

enum { SLICE_BITS_MAX = 12, SLICES_MIN = 16, L2_CACHE_BYTES_MAX = 32 << 20, TRIM_INTERVAL_S = 600 };

static void read_options(struct node *node, const struct blockdev_options_qcow2 *from, struct qcow2_options *to)
{
    to->pass_discard = from->has_pass_discard_request ? from->pass_discard_request : node->discard;
    to->pass_discard_snapshot = !from->has_pass_discard_snapshot || from->pass_discard_snapshot;
    to->discard_no_unref = from->has_discard_no_unref && from->discard_no_unref;
    to->l2_entry_bytes = from->has_l2_cache_entry_size ? from->l2_cache_entry_size : 0;
    to->pass_discard_other = from->has_pass_discard_other && from->pass_discard_other;
    to->trim_interval_ns =
        (from->has_cache_clean_interval ? from->cache_clean_interval : TRIM_INTERVAL_S) * INT64_C(1000000000);
    to->cache_bytes = from->has_cache_size ? from->cache_size : 0;
    to->l2_cache_bytes = from->has_l2_cache_size ? from->l2_cache_size : 0;
    to->refcount_cache_bytes = from->has_refcount_cache_size ? from->refcount_cache_size : 0;
}

static const char *const reopenable[] = {"pass-discard-request",
                                         "pass-discard-snapshot",
                                         "pass-discard-other",
                                         "discard-no-unref",
                                         "overlap-check",
                                         "lazy-refcounts",
                                         NULL};

static int coroutine_fn qcow2_reopen(struct node *node, const struct blockdev_options *options, struct error **err)
{
    struct qcow2 *image = node->state;
    read_options(node, &options->u.qcow2, &image->options);
    qcow2_overlap_forget(image);
    image->overlap_places = 0;
    qcow2_overlap_configure(image, &options->u.qcow2);
    qcow2_overlap_forget(image);
    return 0;
}

/* Bytes of cache for L2 tables and refcount blocks; memory is taken as they are used. */
static int size_caches(const struct qcow2 *image, uint64_t *ret_l2, uint64_t *ret_refcounts, struct error **err)
{
    const struct qcow2_options *options = &image->options;
    uint64_t enough = div_up(image->header.size, image->cluster_size) << image->entry_bits;
    uint64_t l2 = min_u64(enough, L2_CACHE_BYTES_MAX);
    uint64_t refcounts = max_u64(4 * image->cluster_size, l2 / 4);
    uint64_t l2_given = options->l2_cache_bytes;
    uint64_t refcounts_given = options->refcount_cache_bytes;
    if (options->cache_bytes) {
        uint64_t all = options->cache_bytes;
        if (l2_given > all || refcounts_given > all || (l2_given && refcounts_given)) {
            return error_set(err, -EINVAL,
                             "cache-size is the sum of l2-cache-size and refcount-cache-size: give two "
                             "of them at most, and neither part larger than the sum");
        }
        if (refcounts_given) {
            l2 = all - refcounts_given;
        } else if (!l2_given) {
            l2 = min_u64(enough, all - min_u64(all, 4 * image->cluster_size));
        }
        refcounts = all - (l2_given ? l2_given : l2);
    }
    *ret_l2 = l2_given ? l2_given : l2;
    *ret_refcounts = refcounts_given ? refcounts_given : refcounts;
    return 0;
}

static unsigned slices_of(uint64_t bytes, unsigned slice_bits)
{
    return MIN(MAX(bytes >> slice_bits, SLICES_MIN), 1u << 24);
}

static int init_caches(struct qcow2 *image, struct error **err)
{
    uint64_t l2 = 0;
    uint64_t refcounts = 0;
    int code = size_caches(image, &l2, &refcounts, err);
    if (code < 0) {
        return code;
    }
    struct edge *file = image->node->file;
    unsigned slice_bits = MIN(image->cluster_bits, SLICE_BITS_MAX);
    unsigned l2_slice_bits = slice_bits;
    uint64_t entry_bytes = image->options.l2_entry_bytes;
    if (entry_bytes) {
        if (!is_power_of_two(entry_bytes) || entry_bytes < QCOW2_SECTOR || entry_bytes > image->cluster_size) {
            return error_set(
                err, -EINVAL,
                "L2 cache entry size must be a power of two between %d and the cluster size (%" G_GUINT64_FORMAT ")",
                QCOW2_SECTOR, image->cluster_size);
        }
        l2_slice_bits = __builtin_ctzll(entry_bytes);
    }
    qcow2_cache_init(&image->l2_cache, file, l2_slice_bits, slices_of(l2, l2_slice_bits));
    image->l2_cache.on_load = BLKDEBUG_EVENT_L2_LOAD;
    image->l2_cache.on_write = BLKDEBUG_EVENT_L2_UPDATE;
    image->l2_cache.make_clean = qcow2_make_clean;
    image->l2_cache.argument = image;
    qcow2_cache_init(&image->refcount_cache, file, slice_bits, slices_of(refcounts, slice_bits));
    image->refcount_cache.on_load = BLKDEBUG_EVENT_REFBLOCK_LOAD;
    image->refcount_cache.on_write = BLKDEBUG_EVENT_REFBLOCK_UPDATE_PART;
    return 0;
}

/* A table of big-endian 64-bit entries into memory in host byte order. */
static int coroutine_fn load_table(struct qcow2 *image, const char *what, uint64_t offset, uint64_t entries,
                                   uint64_t **ret, struct error **err)
{
    uint64_t *table = g_try_new(uint64_t, MAX(entries, 1));
    int code = table ? 0 : -ENOMEM;
    if (code == 0 && entries) {
        code = edge_read_memory(image->node->file, offset, table, entries * 8);
    }
    if (code < 0) {
        g_free(table);
        return error_set_errno(err, code, "Could not read the qcow2 %s of node '%s'", what, image->node->name);
    }
    for (uint64_t i = 0; i < entries; i++) {
        table[i] = be64toh(table[i]);
    }
    *ret = table;
    return 0;
}

static int coroutine_fn load_tables(struct qcow2 *image, struct error **err)
{
    const struct qcow2_header *header = &image->header;
    int code = load_table(image, "L1 table", header->l1_offset, header->l1_size, &image->l1, err);
    if (code == 0 && !image->node->check_only) { /* else it may be anything */
        image->refcount_table_entries = (uint64_t)header->refcount_table_clusters << (header->cluster_bits - 3);
        code = load_table(image, "refcount table", header->refcount_table_offset, image->refcount_table_entries,
                          &image->refcount_table, err);
    }
    if (code == 0) {
        image->l1_dirty = g_try_malloc0(header->l1_size / 64 + 1);
        code = image->l1_dirty ? 0 : error_set_errno(err, -ENOMEM, "Could not open node '%s'", image->node->name);
    }
    return code;
}

int coroutine_fn qcow2_reload_tables(struct qcow2 *image, struct error **err)
{
    qcow2_cache_clear(&image->l2_cache);
    qcow2_cache_clear(&image->refcount_cache);
    g_clear_pointer(&image->l1, g_free);
    g_clear_pointer(&image->l1_dirty, g_free);
    g_clear_pointer(&image->refcount_table, g_free);
    image->l1_dirty_count = 0;
    image->refcount_table_entries = 0;
    image->refcount_dirty_first = image->refcount_dirty_end = 0;
    image->free_hint = 0;
    image->slice_checked = 0;
    g_array_set_size(image->known_free, 0);
    image->clean_from = max_u64(image->clean_from, align_up(edge_size(image->node->file), image->cluster_size));
    return load_tables(image, err);
}

/* What has to be true, or is made so, before anything is written. */
static int coroutine_fn begin_writing(struct qcow2 *image, struct error **err)
{
    if (image->shows_snapshot) {
        return error_set(err, -EROFS, "Node '%s' shows a snapshot and cannot be written to", image->node->name);
    }
    if (image->header.incompatible & QCOW2_INCOMPATIBLE_CORRUPT || atomic_load(&image->corrupt)) {
        error_set(err, -EACCES, "qcow2 image of node '%s' is corrupt; it cannot be opened for writing",
                  image->node->name);
        error_hint(err, "open it read-only to rescue its data, or repair it with \"qemu-img check -r all\"");
        return -EACCES;
    }
    if (image->header.incompatible & QCOW2_INCOMPATIBLE_DIRTY) {
        return qcow2_repair_dirty(image, err);
    }
    return 0;
}

static void free_state(struct qcow2 *image)
{
    qcow2_cache_finish(&image->l2_cache);
    qcow2_cache_finish(&image->refcount_cache);
    g_free(image->l1);
    g_free(image->l1_dirty);
    g_free(image->refcount_table);
    g_array_free(image->freed, TRUE);
    g_array_free(image->known_free, TRUE);
    if (image->overlap_runs) {
        g_array_free(image->overlap_runs, TRUE);
    }
    qcow2_bitmaps_unload(image);
    qcow2_codecs_destroy(image->codecs);
    qcow2_crypto_close(image->crypto);
    qcow2_header_clear(&image->header);
    co_mutex_destroy(&image->lock);
}

static void describe_node(struct qcow2 *image)
{
    struct node *node = image->node;
    atomic_store(&node->size, image->header.size);
    node->limits.alignment = image->crypto ? QCOW2_SECTOR : 1;
    node->limits.memory_alignment = 1;
    node->limits.cluster_size = image->cluster_size;
    node->limits.zero_alignment = image->subcluster_size;
    node->limits.max_transfer = 0;
    node->dirty = image->header.incompatible & QCOW2_INCOMPATIBLE_DIRTY;
    node->filename = g_strdup(node_beneath_filters(node->file->child)->filename);
    node->header_backing = g_strdup(image->header.backing_file);
    node->header_backing_format = g_strdup(image->header.backing_format);
    if (image->external && !node->data) {
        node->header_data = g_strdup(image->header.data_file);
    }
}

/* Is there a data file exactly if the image has one? */
static int init_data_file(struct qcow2 *image, struct error **err)
{
    struct node *node = image->node;
    const struct qcow2_header *header = &image->header;
    image->external = header->incompatible & QCOW2_INCOMPATIBLE_DATA_FILE;
    /* A raw reader knows no backing file: then the bit cannot be true, and goes with the first write. */
    image->external_raw = image->external && header->autoclear & QCOW2_AUTOCLEAR_RAW_DATA_FILE && !header->backing_file;
    image->autoclear_kept |= image->external_raw ? QCOW2_AUTOCLEAR_RAW_DATA_FILE : 0;
    if (!image->external && node->data) {
        int code = error_set(err, -EINVAL, "'data-file' can only be set for images with an external data file");
        error_hint(err, "leave the option out: the image keeps its data in its own file");
        return code;
    }
    if (image->external && !node->data && !header->data_file && !node->no_data) {
        int code = error_set(err, -EINVAL, "'data-file' is required for this image");
        error_hint(err, "its header names no data file: give the option data-file of node '%s'", node->name);
        return code;
    }
    if (image->external && header->snapshot_count) {
        return error_set(err, -EINVAL, "qcow2 images with an external data file cannot have internal snapshots");
    }
    return 0;
}

static int coroutine_fn open_image(struct qcow2 *image, const struct blockdev_options_qcow2 *options,
                                   struct error **err)
{
    struct node *node = image->node;
    int code = qcow2_header_read(node->file, node->check_only, &image->header, err);
    if (code < 0) {
        return code;
    }
    image->cluster_bits = image->header.cluster_bits;
    image->cluster_size = (uint64_t)1 << image->cluster_bits;
    bool extended = image->header.incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2;
    image->entry_bits = extended ? 4 : 3;
    image->l2_bits = image->cluster_bits - image->entry_bits;
    image->subcluster_bits = extended ? image->cluster_bits - 5 : image->cluster_bits;
    image->subcluster_size = (uint64_t)1 << image->subcluster_bits;
    code = init_data_file(image, err);
    if (code == 0) {
        code = qcow2_crypto_open(image, options->encrypt, err);
    }
    if (code < 0) {
        return code;
    }
    if (image->options.discard_no_unref && image->header.version < 3) {
        return error_set(err, -EINVAL, "discard-no-unref is not supported by qcow2 images of version 2");
    }
    image->refcount_block_bits = image->cluster_bits + 3 - image->header.refcount_order;
    image->clean_from = align_up(edge_size(node->file), image->cluster_size);
    image->codecs = qcow2_codecs_create(image->header.compression_type, image->cluster_size);
    code = load_tables(image, err);
    if (code == 0) {
        code = init_caches(image, err);
    }
    if (code == 0 && node->writable && !node->check_only) {
        code = begin_writing(image, err);
    }
    return code;
}

static int coroutine_fn qcow2_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    struct qcow2 *image = node->state;
    image->node = node;
    co_mutex_init(&image->lock);
    list_init(&image->allocations);
    image->freed = g_array_new(FALSE, FALSE, sizeof(struct qcow2_freed));
    image->known_free = g_array_new(FALSE, FALSE, sizeof(struct qcow2_free_run));
    image->generation = 1;
    read_options(node, &options->u.qcow2, &image->options);
    qcow2_overlap_configure(image, &options->u.qcow2);
    int code = open_image(image, &options->u.qcow2, err);
    if (code < 0) {
        error_prepend(err, "Could not open '%s'",
                      node->file->child->filename ? node->file->child->filename : node->file->child->name);
        free_state(image);
        return code;
    }
    image->settle_at = (256u << 20) >> image->cluster_bits;
    describe_node(image);
    qcow2_bitmaps_load(image);
    return 0;
}

static void coroutine_fn qcow2_close(struct node *node)
{
    struct qcow2 *image = node->state;
    if (node->writable) {
        struct error *error = NULL;
        if (qcow2_bitmaps_store(node, &error) < 0) {
            g_message("%s; they are inconsistent now", error->message);
            error_free(error);
        }
        int code = qcow2_flush_all(image);
        if (code < 0) {
            g_message("qcow2 image of node '%s': closing could not write its metadata: %s", node->name,
                      g_strerror(-code));
        }
    }
    g_assert(list_is_empty(&image->allocations));
    free_state(image);
}

static int coroutine_fn qcow2_set_writable(struct node *node, bool writable, struct error **err)
{
    struct qcow2 *image = node->state;
    if (writable) {
        qcow2_cache_clear(&image->l2_cache);
        qcow2_cache_clear(&image->refcount_cache);
        qcow2_codecs_forget(image->codecs, 0);
        image->compressed_next = 0;
        image->clean_from = max_u64(image->clean_from, align_up(edge_size(node->file), image->cluster_size));
        if (image->external && node->data) {
            uint64_t end = align_up(edge_size(node->data), image->cluster_size);
            image->data_clean_from = max_u64(image->data_clean_from, end);
        }
        return begin_writing(image, err);
    }
    int code = qcow2_bitmaps_store(node, err);
    if (code < 0) {
        return code;
    }
    code = qcow2_flush_all(image);
    return code < 0 ? error_set_errno(err, code, "Could not write the metadata of node '%s'", node->name) : 0;
}

static int coroutine_fn qcow2_change_backing(struct node *node, const char *file, const char *format,
                                             struct error **err)
{
    struct qcow2 *image = node->state;
    if (file && image->external_raw) {
        return error_set(err, -EINVAL, "Node '%s' has a raw data file: it cannot have a backing file", node->name);
    }
    int code = qcow2_prepare_write(image);
    if (code == 0) {
        code = qcow2_flush(node);
    }
    if (code < 0) {
        return error_set_errno(err, code, "Could not change the backing file of node '%s'", node->name);
    }
    co_mutex_lock(&image->lock);
    code = qcow2_header_change_backing(node->file, &image->header, file, format, err);
    co_mutex_unlock(&image->lock);
    return code;
}

static struct image_info_specific *qcow2_specific_info(struct node *node)
{
    struct qcow2 *image = node->state;
    struct image_info_specific_qcow2 *data = g_new0(struct image_info_specific_qcow2, 1);
    bool v3 = image->header.version >= 3;
    data->compat = g_strdup(v3 ? "1.1" : "0.10");
    data->has_lazy_refcounts = data->has_corrupt = data->has_extended_l2 = v3;
    data->lazy_refcounts = image->header.compatible & QCOW2_COMPATIBLE_LAZY_REFCOUNTS;
    data->corrupt = image->header.incompatible & QCOW2_INCOMPATIBLE_CORRUPT;
    data->extended_l2 = qcow2_has_subclusters(image);
    data->data_file = g_strdup(image->header.data_file);
    data->has_data_file_raw = image->external;
    data->data_file_raw = image->header.autoclear & QCOW2_AUTOCLEAR_RAW_DATA_FILE;
    data->encrypt = image->crypto ? qcow2_crypto_describe(image->crypto) : NULL;
    data->refcount_bits = 1 << image->header.refcount_order;
    data->compression_type = image->header.compression_type == QCOW2_COMPRESSION_ZSTD ? QCOW2_COMPRESSION_TYPE_ZSTD
                                                                                      : QCOW2_COMPRESSION_TYPE_ZLIB;
    qcow2_bitmaps_describe(image, &data->has_bitmaps, &data->bitmaps);
    struct image_info_specific *info = g_new0(struct image_info_specific, 1);
    info->type = IMAGE_INFO_SPECIFIC_KIND_QCOW2;
    info->u.qcow2.data = data;
    return info;
}

const struct driver driver_qcow2 = {
    .name = "qcow2",
    .id = BLOCKDEV_DRIVER_QCOW2,
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct qcow2),
    .backing = true,
    .write_if_unallocated = true,
    .offloads = true,
    .compresses = true,
    .open = qcow2_open,
    .close = qcow2_close,
    .read = qcow2_read,
    .write = qcow2_write,
    .write_zeroes = qcow2_write_zeroes,
    .discard = qcow2_discard,
    .flush = qcow2_flush,
    .block_status = qcow2_block_status,
    .truncate = qcow2_truncate,
    .set_writable = qcow2_set_writable,
    .reopen = qcow2_reopen,
    .reopenable = reopenable,
    .change_backing = qcow2_change_backing,
    .specific_info = qcow2_specific_info,
    .image = &qcow2_image,
};
