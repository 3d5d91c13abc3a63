/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Owns the making of an empty image, over an edge to its file. The layout, in clusters:
 *
 *     header | refcount table | refcount blocks | L1 table | L2 tables | encryption header | places for the data
 *
 * L2 tables and places are there with preallocation only, and the places not with an external data file.
 *
 * 1. The blocks count these clusters and nothing else.
 * 2. The header is written last, behind a flush, so that an interrupted creation leaves a file that is not an image
 *    rather than a bad one.
 * 3. Preallocated clusters read as zeroes: as holes at the end of the file, as reserved space, or written. With
 *    extended L2 entries no subcluster of them is allocated, so that a backing file shows through.
 * 4. A data file that is valid as a raw image keeps its content, and all of it is mapped from the beginning; any other
 *    one is emptied.
 *
 * Which options go together is resolve's; opening the files is qcow2_image_create()'s.
 */
#include "driver/format/qcow2_create.h"
#include "base/size.h"
#include "block/graph.h"
#include "block/request.h"
#include "block/user.h"
#include "driver/format/image_place.h"
#include "driver/format/qcow2_crypto.h"
#include "driver/format/qcow2_header.h"
#include "driver/format/qcow2_refcount.h"
#include <endian.h>
#include <errno.h>
#include <glib.h>
#include <string.h>

/* Headers with room for it name their features. */
#define NAMES_CLUSTER_MIN (8 * KiB)
#define L2_CHUNK (1 * MiB)

/* In clusters. */
struct plan {
    uint64_t table, blocks, l1, l2, crypto, data;
    uint64_t per_block; /* refcounts */
    uint64_t guest;     /* clusters of the disk that L2 tables show */
};

static uint64_t plan_total(const struct plan *plan)
{
    return 1 + plan->table + plan->blocks + plan->l1 + plan->l2 + plan->crypto + plan->data;
}

static void plan_layout(struct plan *plan, uint64_t cluster_size)
{
    plan->table = plan->blocks = 1;
    for (;;) {
        uint64_t blocks = div_up(plan_total(plan), plan->per_block);
        uint64_t table = div_up(blocks * 8, cluster_size);
        if (blocks <= plan->blocks && table <= plan->table) {
            return;
        }
        plan->blocks = max_u64(blocks, plan->blocks);
        plan->table = max_u64(table, plan->table);
    }
}

/* --- options --- */

bool qcow2_create_maps_all(const struct qcow2_create_options *options)
{
    return options->preallocation != PREALLOCATION_MODE_OFF || options->data_raw;
}

/* What version 2 has not. */
static int check_version(const struct qcow2_create_options *options, struct error **err)
{
    const char *what = options->lazy_refcounts                                  ? "Lazy refcounts"
                       : options->extended_l2                                   ? "Extended L2 entries"
                       : options->data_name                                     ? "External data files"
                       : options->compression_type                              ? "Compression types other than zlib"
                       : options->refcount_bits && options->refcount_bits != 16 ? "Refcount widths other than 16 bits"
                                                                                : NULL;
    if (!what) {
        return 0;
    }
    int r = error_set(err, -EINVAL, "%s need version 3 of qcow2", what);
    error_hint(err, "Version 3 is compat=1.1 (or version=v3), which is the default");
    return r;
}

/* Which options exclude each other. */
static int check_together(const struct qcow2_create_options *options, struct error **err)
{
    bool preallocates = options->preallocation != PREALLOCATION_MODE_OFF;
    if (options->data_raw && !options->data_name) {
        return error_set(err, -EINVAL,
                         "data-file-raw says how the external data file is kept, but there is no "
                         "data-file");
    }
    if (options->data_raw && options->backing_file) {
        return error_set(err, -EINVAL,
                         "Backing file and data-file-raw cannot be used at the same time: a raw data "
                         "file shows all of the disk by itself");
    }
    if (options->encrypt && options->data_raw) {
        return error_set(err, -EINVAL, "An encrypted image cannot have a data file that is valid as a raw image");
    }
    if (options->encrypt && preallocates && options->version == 2) {
        return error_set(err, -EINVAL,
                         "Encryption and preallocation need version 3 of qcow2: version 2 has no mark for zeroes");
    }
    if (preallocates && options->backing_file && !options->extended_l2) {
        int r = error_set(err, -EINVAL,
                          "Backing file and preallocation can only be used at the same time if "
                          "extended-l2 is on: allocated clusters would hide the backing file");
        error_hint(err, "Use extended_l2=on, or no preallocation");
        return r;
    }
    if (options->backing_format && !options->backing_file) {
        return error_set(err, -EINVAL, "Backing format '%s' cannot be used without a backing file",
                         options->backing_format);
    }
    if (options->data_name && strlen(options->data_name) > QCOW2_DATA_NAME_MAX) {
        return error_set(err, -EINVAL, "The name of the external data file is too long for qcow2 (at most %d bytes)",
                         QCOW2_DATA_NAME_MAX);
    }
    if (options->backing_file && strlen(options->backing_file) > QCOW2_BACKING_NAME_MAX) {
        return error_set(err, -EINVAL, "Backing file name is too long for qcow2 (at most %d bytes)",
                         QCOW2_BACKING_NAME_MAX);
    }
    if (options->backing_format && strlen(options->backing_format) >= 16) {
        return error_set(err, -EINVAL, "Backing format name '%s' is too long for qcow2", options->backing_format);
    }
    return 0;
}

static int resolve_size(const struct qcow2_create_options *options, struct qcow2_header *header, struct error **err)
{
    unsigned span_bits = 2 * header->cluster_bits - (options->extended_l2 ? 4 : 3);
    uint64_t l1_size = (options->size >> span_bits) + !is_aligned(options->size, (uint64_t)1 << span_bits);
    if (options->size > INT64_MAX - (2u << 20) || l1_size * 8 > QCOW2_L1_BYTES_MAX) {
        int r = error_set(err, -EFBIG, "Image size is too large for clusters of %u bytes", 1u << header->cluster_bits);
        if (header->cluster_bits < QCOW2_CLUSTER_BITS_MAX) {
            error_hint(err, "Use larger clusters (cluster_size, up to 2M)");
        }
        return r;
    }
    if (options->size % QCOW2_SECTOR) {
        return error_set(err, -EINVAL, "Image size must be a multiple of %d bytes", QCOW2_SECTOR);
    }
    header->size = options->size;
    header->l1_size = max_u64(1, l1_size);
    return 0;
}

int qcow2_create_resolve(const struct qcow2_create_options *options, struct qcow2_header *header, struct error **err)
{
    unsigned refcount_bits = options->refcount_bits ? options->refcount_bits : 16;
    memset(header, 0, sizeof(*header));
    header->version = options->version ? options->version : 3;
    header->cluster_bits = options->cluster_bits ? options->cluster_bits : 16;
    if (header->version != 2 && header->version != 3) {
        return error_set(err, -EINVAL, "qcow2 has the versions 2 and 3, not %u", header->version);
    }
    if (header->cluster_bits < QCOW2_CLUSTER_BITS_MIN || header->cluster_bits > QCOW2_CLUSTER_BITS_MAX) {
        return error_set(err, -EINVAL, "Cluster size must be a power of two between 512 and 2048k");
    }
    if (!is_power_of_two(refcount_bits) || refcount_bits > 64) {
        return error_set(err, -EINVAL, "Refcount width must be a power of two and may not exceed 64 bits");
    }
    int code = header->version == 2 ? check_version(options, err) : 0;
    if (code == 0) {
        code = check_together(options, err);
    }
    if (code == 0 && options->extended_l2 && header->cluster_bits < QCOW2_EXTENDED_CLUSTER_BITS_MIN) {
        code =
            error_set(err, -EINVAL,
                      "Extended L2 entries need clusters of at least %u bytes, not %u: a subcluster is a 32nd of one",
                      1u << QCOW2_EXTENDED_CLUSTER_BITS_MIN, 1u << header->cluster_bits);
    }
    if (code == 0) {
        code = resolve_size(options, header, err);
    }
    if (code == 0) {
        code = qcow2_crypto_new_bytes(options->encrypt, false, &header->crypto_length, err);
    }
    if (code < 0) {
        return code;
    }
    header->refcount_order = __builtin_ctz(refcount_bits);
    header->length = header->version == 2 ? QCOW2_HEADER_SIZE_V2 : sizeof(struct qcow2_disk_header);
    header->compatible = options->lazy_refcounts ? QCOW2_COMPATIBLE_LAZY_REFCOUNTS : 0;
    header->incompatible = (options->data_name ? QCOW2_INCOMPATIBLE_DATA_FILE : 0) |
                           (options->compression_type ? QCOW2_INCOMPATIBLE_COMPRESSION : 0) |
                           (options->extended_l2 ? QCOW2_INCOMPATIBLE_EXTENDED_L2 : 0);
    header->crypt_method = !options->encrypt                                ? QCOW2_CRYPT_NONE
                           : options->encrypt->format == CRYPTO_FORMAT_LUKS ? QCOW2_CRYPT_LUKS
                                                                            : QCOW2_CRYPT_AES;
    header->autoclear = options->data_raw ? QCOW2_AUTOCLEAR_RAW_DATA_FILE : 0;
    header->compression_type =
        options->compression_type == QCOW2_COMPRESSION_TYPE_ZSTD ? QCOW2_COMPRESSION_ZSTD : QCOW2_COMPRESSION_ZLIB;
    return 0;
}

/* --- the header cluster --- */

static void add_extension(struct qcow2_header *header, uint32_t type, const void *data, uint32_t length)
{
    header->extensions = g_renew(struct qcow2_extension, header->extensions, header->extension_count + 1);
    header->extensions[header->extension_count++] = (struct qcow2_extension){type, length, g_memdup2(data, length)};
}

static void add_feature_names(struct qcow2_header *header)
{
    static const struct qcow2_disk_feature_name names[] = {
        {0, 0, "dirty bit"},        {0, 1, "corrupt bit"},         {0, 2, "external data file"},
        {0, 3, "compression type"}, {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"},
        {2, 0, "bitmaps"},          {2, 1, "raw external data"},
    };
    add_extension(header, QCOW2_EXTENSION_FEATURE_NAMES, names, sizeof(names));
}

/* *ret: the first cluster; g_free() it. */
static int build_first_cluster(const struct qcow2_create_options *options, struct qcow2_header *header, uint8_t **ret,
                               struct error **err)
{
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    g_autofree uint8_t *first = g_malloc0(cluster_size);
    if (options->data_name) {
        add_extension(header, QCOW2_EXTENSION_DATA_FILE, options->data_name, strlen(options->data_name));
    }
    if (header->crypto_length) {
        const uint64_t words[] = {htobe64(header->crypto_offset), htobe64(header->crypto_length)};
        add_extension(header, QCOW2_EXTENSION_ENCRYPTION, words, sizeof(words));
    }
    if (header->version >= 3 && cluster_size >= NAMES_CLUSTER_MIN) {
        add_feature_names(header);
    }
    int code = qcow2_header_build_new(header, options->backing_file, options->backing_format, first);
    if (code < 0) {
        return error_set(err, code,
                         "The qcow2 header cluster (%" G_GUINT64_FORMAT " bytes) has no room for the names of backing "
                         "and data files",
                         cluster_size);
    }
    *ret = g_steal_pointer(&first);
    return 0;
}

/* --- tables --- */

static int coroutine_fn write_refcounts(struct edge *file, const struct qcow2_header *header, const struct plan *plan)
{
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    g_autofree uint64_t *table = g_try_malloc0(plan->table * cluster_size);
    g_autofree void *block = g_try_malloc(cluster_size);
    if (!table || !block) {
        return -ENOMEM;
    }
    int code = 0;
    for (uint64_t i = 0; code == 0 && i < plan->blocks; i++) {
        uint64_t offset = (1 + plan->table + i) * cluster_size;
        uint64_t used = min_u64(plan_total(plan) - min_u64(plan_total(plan), i * plan->per_block), plan->per_block);
        if (i == 0 || used < plan->per_block) { /* all full ones are alike */
            memset(block, 0, cluster_size);
            for (uint64_t n = 0; n < used; n++) {
                qcow2_refcount_store(block, header->refcount_order, n, 1);
            }
        }
        table[i] = htobe64(offset);
        code = edge_write_memory(file, offset, block, cluster_size, 0);
    }
    return code == 0 ? edge_write_memory(file, cluster_size, table, plan->table * cluster_size, 0) : code;
}

static int coroutine_fn write_l1(struct edge *file, const struct qcow2_header *header, const struct plan *plan,
                                 uint64_t l2_offset)
{
    uint64_t bytes = plan->l1 << header->cluster_bits;
    if (plan->l2 == 0) {
        return edge_write_zeroes(file, header->l1_offset, bytes, 0);
    }
    g_autofree uint64_t *l1 = g_try_malloc0(bytes);
    if (!l1) {
        return -ENOMEM;
    }
    for (uint64_t i = 0; i < plan->l2; i++) {
        l1[i] = htobe64((l2_offset + (i << header->cluster_bits)) | QCOW2_COPIED);
    }
    return edge_write_memory(file, header->l1_offset, l1, bytes, 0);
}

/* Shows the clusters of the disk one after the other, from `data_offset` on. */
static int coroutine_fn write_l2(struct edge *file, const struct qcow2_header *header, const struct plan *plan,
                                 uint64_t l2_offset, uint64_t data_offset)
{
    unsigned words = header->incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2 ? 2 : 1;
    uint64_t zero = words == 1 && header->crypt_method ? QCOW2_ZERO : 0; /* zeroes do not decrypt to zeroes */
    uint64_t bytes = plan->l2 << header->cluster_bits;
    g_autofree uint64_t *chunk = g_try_malloc(min_u64(bytes, L2_CHUNK));
    int code = chunk || !bytes ? 0 : -ENOMEM;
    uint64_t cluster = 0;
    for (uint64_t done = 0; code == 0 && done < bytes;) {
        uint64_t some = min_u64(bytes - done, L2_CHUNK);
        memset(chunk, 0, some);
        for (uint64_t i = 0; i < some / 8 && cluster < plan->guest; i += words, cluster++) {
            chunk[i] = htobe64((data_offset + (cluster << header->cluster_bits)) | QCOW2_COPIED | zero);
        }
        code = edge_write_memory(file, l2_offset + done, chunk, some, 0);
        done += some;
    }
    return code;
}

/* Makes [from, end) zeroes in the state that `mode` says, the file ending there at least. */
static int coroutine_fn extend(struct edge *edge, uint64_t from, uint64_t end, enum preallocation_mode mode,
                               struct error **err)
{
    auto_error error = NULL;
    uint64_t size = edge_size(edge);
    bool holes = mode == PREALLOCATION_MODE_OFF || mode == PREALLOCATION_MODE_METADATA;
    int code = 0;
    if (size > from && end > from) {
        code = edge_write_zeroes(edge, from, min_u64(size, end) - from, holes ? REQUEST_MAY_UNMAP : 0);
        if (code < 0) {
            return error_set_errno(err, code, "Could not write zeroes to node '%s'", edge->child->name);
        }
    }
    if (end <= size) {
        return 0;
    }
    code = edge_grow(edge, end, holes ? PREALLOCATION_MODE_OFF : mode, &error);
    if (code == -ENOTSUP && mode == PREALLOCATION_MODE_FULL) {
        code = edge_write_zeroes(edge, size, end - size, 0);
    }
    return code < 0 ? error_move(err, g_steal_pointer(&error)) : 0;
}

static int coroutine_fn place_data(struct edge *file, const struct qcow2_create_options *options, uint64_t from,
                                   uint64_t end, struct error **err)
{
    if (!options->data) {
        return qcow2_create_maps_all(options) ? extend(file, from, end, options->preallocation, err) : 0;
    }
    int code = options->data_raw ? 0 : image_place_empty(options->data, err);
    uint64_t kept = options->data_raw ? min_u64(edge_size(options->data), options->size) : 0;
    return code < 0 ? code : extend(options->data, kept, options->size, options->preallocation, err);
}

static int coroutine_fn write_tables(struct edge *file, const struct qcow2_create_options *options,
                                     const struct qcow2_header *header, const struct plan *plan, struct error **err)
{
    uint64_t l2_offset = header->l1_offset + (plan->l1 << header->cluster_bits);
    uint64_t data_offset = options->data_name ? 0 : l2_offset + ((plan->l2 + plan->crypto) << header->cluster_bits);
    int code = write_refcounts(file, header, plan);
    if (code == 0) {
        code = write_l1(file, header, plan, l2_offset);
    }
    if (code == 0) {
        code = write_l2(file, header, plan, l2_offset, data_offset);
    }
    if (code < 0) {
        return error_set_errno(err, code, "Could not write the tables of the new qcow2 image");
    }
    code = qcow2_crypto_create(file, header->crypto_offset, options->encrypt, err);
    if (code < 0) {
        return code;
    }
    return place_data(file, options, data_offset, plan_total(plan) << header->cluster_bits, err);
}

static int coroutine_fn finish(struct edge *file, const struct qcow2_create_options *options,
                               const struct qcow2_header *header, const uint8_t *first)
{
    int code = options->data ? edge_flush(options->data) : 0;
    if (code == 0) {
        code = edge_flush(file);
    }
    if (code == 0) {
        code = edge_write_memory(file, 0, first, (uint64_t)1 << header->cluster_bits, 0);
    }
    return code == 0 ? edge_flush(file) : code;
}

static int plan_image(const struct qcow2_create_options *options, struct qcow2_header *header, struct plan *plan,
                      struct error **err)
{
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    unsigned l2_bits = header->cluster_bits - (options->extended_l2 ? 4 : 3);
    *plan = (struct plan){
        .per_block = cluster_size * 8 >> header->refcount_order,
        .l1 = div_up((uint64_t)header->l1_size * 8, cluster_size),
        .crypto = div_up(header->crypto_length, cluster_size),
    };
    if (qcow2_create_maps_all(options)) {
        plan->guest = div_up(options->size, cluster_size);
        plan->l2 = div_up(plan->guest, (uint64_t)1 << l2_bits);
        plan->data = options->data_name ? 0 : plan->guest;
    }
    plan_layout(plan, cluster_size);
    if (plan->table * cluster_size > QCOW2_REFCOUNT_TABLE_BYTES_MAX) {
        return error_set(err, -EFBIG,
                         "An image of %" G_GUINT64_FORMAT " bytes cannot be preallocated with clusters of "
                         "%" G_GUINT64_FORMAT " bytes: its refcount table would be too large",
                         options->size, cluster_size);
    }
    header->refcount_table_offset = cluster_size;
    header->refcount_table_clusters = plan->table;
    header->l1_offset = (1 + plan->table + plan->blocks) * cluster_size;
    header->crypto_offset = plan->crypto ? header->l1_offset + (plan->l1 + plan->l2) * cluster_size : 0;
    return 0;
}

int coroutine_fn qcow2_create(struct edge *file, const struct qcow2_create_options *options, struct error **err)
{
    struct qcow2_header header;
    struct plan plan;
    g_autofree uint8_t *first = NULL;
    int code = qcow2_create_resolve(options, &header, err);
    if (code == 0) {
        code = plan_image(options, &header, &plan, err);
    }
    if (code == 0) {
        code = build_first_cluster(options, &header, &first, err);
    }
    if (code == 0) {
        code = write_tables(file, options, &header, &plan, err);
    }
    if (code == 0) {
        code = finish(file, options, &header, first);
        if (code < 0) {
            error_set_errno(err, code, "Could not write the new qcow2 image");
        }
    }
    qcow2_header_clear(&header);
    return code;
}

/* --- through the graph --- */

int qcow2_create_options_from(const struct blockdev_create_options_qcow2 *from, struct qcow2_create_options *ret,
                              struct error **err)
{
    uint64_t cluster_size = from->has_cluster_size ? from->cluster_size : 64 * KiB;
    if (!is_power_of_two(cluster_size) || cluster_size < 1u << QCOW2_CLUSTER_BITS_MIN ||
        cluster_size > 1u << QCOW2_CLUSTER_BITS_MAX) {
        return error_set(err, -EINVAL,
                         "Cluster size must be a power of two between 512 and 2048k, not %" G_GUINT64_FORMAT,
                         cluster_size);
    }
    if (from->has_refcount_bits &&
        (from->refcount_bits < 1 || from->refcount_bits > 64 || !is_power_of_two(from->refcount_bits))) {
        return error_set(err, -EINVAL, "Refcount width must be a power of two and may not exceed 64 bits");
    }
    if (from->backing_file && !*from->backing_file) {
        return error_set(err, -EINVAL, "The name of the backing file must not be empty");
    }
    *ret = (struct qcow2_create_options){
        .size = from->size,
        .version = from->has_version && from->version == BLOCKDEV_QCOW2_VERSION_V2 ? 2 : 3,
        .cluster_bits = __builtin_ctzll(cluster_size),
        .refcount_bits = from->has_refcount_bits ? from->refcount_bits : 16,
        .lazy_refcounts = from->has_lazy_refcounts && from->lazy_refcounts,
        .extended_l2 = from->has_extended_l2 && from->extended_l2,
        .compression_type = from->has_compression_type ? from->compression_type : QCOW2_COMPRESSION_TYPE_ZLIB,
        .preallocation = from->has_preallocation ? from->preallocation : PREALLOCATION_MODE_OFF,
        .backing_file = from->backing_file,
        .backing_format = from->has_backing_fmt ? blockdev_driver_name(from->backing_fmt) : NULL,
        .data_raw = from->has_data_file_raw && from->data_file_raw,
        .encrypt = from->encrypt,
    };
    if (from->data_file) {
        ret->data_name = "data";
    }
    return 0;
}

static int coroutine_fn create_in(struct image_place *file, struct image_place *data,
                                  struct qcow2_create_options *options, struct error **err)
{
    if (data->node) {
        options->data = backend_edge(data->backend);
        options->data_name = node_beneath_filters(data->node)->filename;
        if (!options->data_name) {
            return error_set(err, -EINVAL, "Node '%s' has no file name that the header could give for its data file",
                             data->node->name);
        }
        if (data->node == file->node) {
            return error_set(err, -EINVAL, "Node '%s' cannot be both the image and its external data file",
                             data->node->name);
        }
    }
    struct edge *edge = backend_edge(file->backend);
    int code = image_place_empty(edge, err);
    return code < 0 ? code : qcow2_create(edge, options, err);
}

int coroutine_fn qcow2_image_create(struct graph *graph, const struct blockdev_create_options *options,
                                    struct error **err)
{
    const struct blockdev_create_options_qcow2 *own = &options->u.qcow2;
    struct qcow2_create_options resolved;
    struct qcow2_header header;
    struct image_place file = {0}, data = {0};
    int code = qcow2_create_options_from(own, &resolved, err);
    if (code == 0) { /* before anything is touched */
        code = qcow2_create_resolve(&resolved, &header, err);
    }
    if (code == 0) {
        uint64_t bytes;
        code = qcow2_crypto_new_bytes(resolved.encrypt, true, &bytes, err);
    }
    if (code == 0) {
        code = image_place_open(graph, own->file, &file, err);
    }
    if (code == 0 && own->data_file) {
        code = image_place_open(graph, own->data_file, &data, err);
    }
    if (code == 0) {
        code = create_in(&file, &data, &resolved, err);
    }
    image_place_close(&data);
    image_place_close(&file);
    return code;
}

const struct image_option qcow2_image_options[] = {
    {.name = "backing_file", .type = "str", .help = "File name of a base image", .amendable = true},
    {.name = "backing_fmt", .type = "str", .help = "Image format of the base image", .amendable = true},
    {.name = "cluster_size", .type = "size", .help = "qcow2 cluster size"},
    {.name = "compat",
     .type = "str",
     .help = "Compatibility level (v2 [0.10] or v3 [1.1])",
     .member = "version",
     .amendable = true},
    {.name = "compression_type", .type = "str", .help = "Compression method used for image cluster compression"},
    {.name = "data_file", .type = "str", .help = "File name of an external data file", .amendable = true},
    {.name = "data_file_raw",
     .type = "bool (on/off)",
     .help = "The external data file must stay valid as a raw image",
     .amendable = true},
    {.name = "encrypt.cipher-alg", .type = "str", .help = "Name of encryption cipher algorithm"},
    {.name = "encrypt.cipher-mode", .type = "str", .help = "Name of encryption cipher mode"},
    {.name = "encrypt.format", .type = "str", .help = "Encrypt the image, format choices: 'aes', 'luks'"},
    {.name = "encrypt.hash-alg", .type = "str", .help = "Name of encryption hash algorithm"},
    {.name = "encrypt.iter-time", .type = "num", .help = "Time to spend in PBKDF in milliseconds"},
    {.name = "encrypt.ivgen-alg", .type = "str", .help = "Name of IV generator algorithm"},
    {.name = "encrypt.ivgen-hash-alg", .type = "str", .help = "Name of IV generator hash algorithm"},
    {.name = "encrypt.key-secret", .type = "str", .help = "ID of secret providing qcow AES key or LUKS passphrase"},
    {.name = "encrypt.iter-time",
     .type = "num",
     .help = "Time to spend in PBKDF in milliseconds",
     .amend_only = true,
     .keys = true},
    {.name = "encrypt.keyslot",
     .type = "num",
     .help = "Select a single keyslot to modify explicitly",
     .amend_only = true,
     .keys = true},
    {.name = "encrypt.new-secret",
     .type = "str",
     .help = "New secret to set in the matching keyslots. Empty string to erase",
     .amend_only = true,
     .keys = true},
    {.name = "encrypt.old-secret",
     .type = "str",
     .help = "Select all keyslots that match this password",
     .amend_only = true,
     .keys = true},
    {.name = "encrypt.state",
     .type = "str",
     .help = "Select new state of affected keyslots (active/inactive)",
     .amend_only = true,
     .keys = true},
    {.name = "encryption",
     .type = "bool (on/off)",
     .help = "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
     .member = "encrypt.format"},
    {.name = "extended_l2", .type = "bool (on/off)", .help = "Extended L2 tables"},
    {.name = "lazy_refcounts", .type = "bool (on/off)", .help = "Postpone refcount updates", .amendable = true},
    {.name = "preallocation",
     .type = "str",
     .help = "Preallocation mode (allowed values: off, metadata, falloc, full)"},
    {.name = "refcount_bits", .type = "num", .help = "Width of a reference count entry in bits", .amendable = true},
    {.name = "size", .type = "size", .help = "Virtual disk size", .amendable = true},
    {.name = NULL},
};
