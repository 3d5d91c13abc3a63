/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The header cluster. Parsing trusts nothing: every field is checked against the format, against this driver's limits,
 * and against the size of the file, so that a small file can never make the driver take much memory. A feature that
 * is not supported is refused by the name that the image itself (its feature name table) or the specification gives.
 *
 * Writing. The fixed fields are patched in place, each group by one write inside the first sector. Only a change of
 * the backing file moves things, and it is one sector's write that makes it, so that a crash leaves the old or the
 * new: the fixed header and the extensions are laid out inside the first 512 bytes (dropping names from the feature
 * name table, which is a courtesy, if they do not fit), and the backing string goes to a place that neither the old
 * string nor the old extensions occupy and is flushed first. Where unknown extensions, which are preserved, are too
 * long for that, the cluster is written in one go.
 */
#include "driver/format/qcow2_header.h"
#include "base/size.h"
#include "block/request.h"
#include <endian.h>
#include <errno.h>
#include <glib.h>
#include <string.h>

void qcow2_header_clear(struct qcow2_header *header)
{
    g_free(header->backing_file);
    g_free(header->backing_format);
    g_free(header->data_file);
    for (unsigned i = 0; i < header->extension_count; i++) {
        g_free(header->extensions[i].data);
    }
    g_free(header->extensions);
    memset(header, 0, sizeof(*header));
}

/* The fixed part, into host byte order; no checks but those of version and length. */
static int parse_fixed(const uint8_t *data, uint64_t bytes, struct qcow2_header *header, struct error **err)
{
    struct qcow2_disk_header disk;
    memset(&disk, 0, sizeof(disk));
    memcpy(&disk, data, min_u64(bytes, sizeof(disk)));
    if (bytes < QCOW2_HEADER_SIZE_V2) {
        return error_set(err, -EINVAL, "Image is not in qcow2 format: the file is too small for a header");
    }
    if (be32toh(disk.magic) != QCOW2_MAGIC) {
        return error_set(err, -EINVAL, "Image is not in qcow2 format");
    }
    header->version = be32toh(disk.version);
    if (header->version != 2 && header->version != 3) {
        return error_set(err, -ENOTSUP, "Unsupported qcow2 version %u", header->version);
    }
    header->cluster_bits = be32toh(disk.cluster_bits);
    header->size = be64toh(disk.size);
    header->l1_size = be32toh(disk.l1_size);
    header->l1_offset = be64toh(disk.l1_table_offset);
    header->refcount_table_offset = be64toh(disk.refcount_table_offset);
    header->refcount_table_clusters = be32toh(disk.refcount_table_clusters);
    header->snapshot_count = be32toh(disk.snapshot_count);
    header->snapshots_offset = be64toh(disk.snapshots_offset);
    header->backing_offset = be64toh(disk.backing_file_offset);
    header->backing_length = be32toh(disk.backing_file_size);
    header->crypt_method = be32toh(disk.crypt_method);
    if (header->crypt_method > QCOW2_CRYPT_LUKS) {
        return error_set(err, -ENOTSUP, "qcow2 image is encrypted by an unknown method (%u)", header->crypt_method);
    }
    header->refcount_order = 4;
    header->length = QCOW2_HEADER_SIZE_V2;
    if (header->version == 2) {
        return 0;
    }
    if (bytes < QCOW2_HEADER_SIZE_V3) {
        return error_set(err, -EINVAL, "qcow2 header is truncated");
    }
    header->incompatible = be64toh(disk.incompatible_features);
    header->compatible = be64toh(disk.compatible_features);
    header->autoclear = be64toh(disk.autoclear_features);
    header->refcount_order = be32toh(disk.refcount_order);
    header->length = be32toh(disk.header_length);
    if (header->length < QCOW2_HEADER_SIZE_V3 || header->length % 8) {
        return error_set(err, -EINVAL, "qcow2 header length %u is invalid", header->length);
    }
    header->compression_type = header->length > offsetof(struct qcow2_disk_header, compression_type)
                                   ? disk.compression_type
                                   : QCOW2_COMPRESSION_ZLIB;
    return 0;
}

/* Whether a table of `bytes` at `offset` can be: aligned, not the header cluster, inside the file. */
static int check_table(const char *what, uint64_t offset, uint64_t bytes, uint64_t cluster_size, uint64_t file_size,
                       struct error **err)
{
    if (!is_aligned(offset, cluster_size)) {
        return error_set(err, -EINVAL, "qcow2 %s offset 0x%" G_GINT64_MODIFIER "x is not aligned to the cluster size",
                         what, offset);
    }
    if (offset == 0) {
        return error_set(err, -EINVAL, "qcow2 %s overlaps the header", what);
    }
    uint64_t end = align_up(file_size, cluster_size);
    if (offset > end || bytes > end - offset) {
        return error_set(err, -EINVAL,
                         "qcow2 %s (0x%" G_GINT64_MODIFIER "x, %" G_GUINT64_FORMAT
                         " bytes) lies behind the end of the file",
                         what, offset, bytes);
    }
    return 0;
}

static bool ranges_overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes)
{
    return a < b + b_bytes && b < a + a_bytes;
}

static int check_l1(const struct qcow2_header *header, uint64_t cluster_size, uint64_t file_size, struct error **err)
{
    uint64_t l1_bytes = (uint64_t)header->l1_size * 8;
    bool extended = header->incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2;
    unsigned l2_span_bits = header->cluster_bits + header->cluster_bits - (extended ? 4 : 3);
    if (header->size > INT64_MAX - cluster_size) {
        return error_set(err, -EFBIG, "qcow2 virtual size %" G_GUINT64_FORMAT " is too large", header->size);
    }
    uint64_t wanted = (header->size >> l2_span_bits) + !is_aligned(header->size, (uint64_t)1 << l2_span_bits);
    if (wanted > QCOW2_L1_BYTES_MAX / 8) {
        return error_set(err, -EFBIG,
                         "qcow2 virtual size %" G_GUINT64_FORMAT " is too large for clusters of %" G_GUINT64_FORMAT
                         " bytes",
                         header->size, cluster_size);
    }
    if (l1_bytes > QCOW2_L1_BYTES_MAX) {
        return error_set(err, -EFBIG, "qcow2 active L1 table is too large (%u entries)", header->l1_size);
    }
    if (wanted > header->l1_size) {
        return error_set(err, -EINVAL,
                         "qcow2 L1 table is too small (%u entries) for the virtual size %" G_GUINT64_FORMAT,
                         header->l1_size, header->size);
    }
    return header->l1_size ? check_table("L1 table", header->l1_offset, l1_bytes, cluster_size, file_size, err) : 0;
}

/* Refcounts and snapshots: what a repair can make anew. */
static int check_repairable(const struct qcow2_header *header, uint64_t file_size, struct error **err)
{
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    uint64_t refcount_bytes = (uint64_t)header->refcount_table_clusters << header->cluster_bits;
    if (header->refcount_table_clusters == 0) {
        return error_set(err, -EINVAL, "qcow2 image does not contain a reference count table");
    }
    if (refcount_bytes > QCOW2_REFCOUNT_TABLE_BYTES_MAX) {
        return error_set(err, -EFBIG, "qcow2 reference count table is too large (%u clusters)",
                         header->refcount_table_clusters);
    }
    int code = check_table("reference count table", header->refcount_table_offset, refcount_bytes, cluster_size,
                           file_size, err);
    if (code < 0) {
        return code;
    }
    if (header->l1_size && ranges_overlap(header->l1_offset, (uint64_t)header->l1_size * 8,
                                          header->refcount_table_offset, refcount_bytes)) {
        return error_set(err, -EINVAL, "qcow2 L1 table overlaps the reference count table");
    }
    if (header->snapshot_count > QCOW2_SNAPSHOTS_MAX) {
        return error_set(err, -EFBIG, "qcow2 snapshot table is too large (%u snapshots)", header->snapshot_count);
    }
    if (header->snapshot_count) {
        uint64_t least = header->snapshot_count * (uint64_t)sizeof(struct qcow2_disk_snapshot);
        return check_table("snapshot table", header->snapshots_offset, least, cluster_size, file_size, err);
    }
    return 0;
}

static int check_fields(const struct qcow2_header *header, uint64_t file_size, bool for_check, struct error **err)
{
    if (header->cluster_bits < QCOW2_CLUSTER_BITS_MIN || header->cluster_bits > QCOW2_CLUSTER_BITS_MAX) {
        return error_set(err, -EINVAL, "Unsupported qcow2 cluster size: 2^%u bytes", header->cluster_bits);
    }
    if (header->incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2 &&
        header->cluster_bits < QCOW2_EXTENDED_CLUSTER_BITS_MIN) {
        return error_set(err, -EINVAL, "qcow2 extended L2 entries need clusters of 16 KiB at least, not 2^%u bytes",
                         header->cluster_bits);
    }
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    if (header->length > cluster_size) {
        return error_set(err, -EINVAL, "qcow2 header exceeds the cluster size");
    }
    if (header->refcount_order > QCOW2_REFCOUNT_ORDER_MAX) {
        return error_set(err, -EINVAL, "qcow2 reference count entry width too large: 2^%u bits",
                         header->refcount_order);
    }
    int code = check_l1(header, cluster_size, file_size, err);
    return code == 0 && !for_check ? check_repairable(header, file_size, err) : code;
}

static int parse_extension(struct qcow2_header *header, uint32_t type, const uint8_t *data, uint32_t length,
                           struct error **err)
{
    if (type == QCOW2_EXTENSION_BACKING_FORMAT) {
        if (length >= 16) {
            return error_set(err, -EINVAL, "qcow2 backing format name is too long (%u bytes)", length);
        }
        g_free(header->backing_format);
        header->backing_format = length ? g_strndup((const char *)data, length) : NULL;
        return 0;
    }
    if (type == QCOW2_EXTENSION_BITMAPS) {
        if (length != sizeof(header->bitmaps)) {
            return error_set(err, -EINVAL, "qcow2 bitmaps extension has an invalid length (%u bytes)", length);
        }
        memcpy(&header->bitmaps, data, sizeof(header->bitmaps));
        header->bitmaps.bitmap_count = be32toh(header->bitmaps.bitmap_count);
        header->bitmaps.directory_size = be64toh(header->bitmaps.directory_size);
        header->bitmaps.directory_offset = be64toh(header->bitmaps.directory_offset);
    } else if (type == QCOW2_EXTENSION_DATA_FILE) {
        if (length == 0 || length > QCOW2_DATA_NAME_MAX || memchr(data, 0, length)) {
            return error_set(err, -EINVAL, "qcow2 external data file name is invalid (%u bytes)", length);
        }
        g_free(header->data_file);
        header->data_file = g_strndup((const char *)data, length);
    } else if (type == QCOW2_EXTENSION_ENCRYPTION) {
        uint64_t words[2];
        if (length != sizeof(words)) {
            return error_set(err, -EINVAL, "qcow2 encryption header extension has an invalid length (%u bytes)",
                             length);
        }
        memcpy(words, data, sizeof(words));
        header->crypto_offset = be64toh(words[0]);
        header->crypto_length = be64toh(words[1]);
    }
    header->extensions = g_renew(struct qcow2_extension, header->extensions, header->extension_count + 1);
    header->extensions[header->extension_count++] = (struct qcow2_extension){type, length, g_memdup2(data, length)};
    return 0;
}

/* The list of extensions between the fixed part and the backing string (or the cluster's end). */
static int parse_extensions(const uint8_t *data, uint64_t bytes, struct qcow2_header *header, struct error **err)
{
    uint64_t end = (uint64_t)1 << header->cluster_bits;
    if (header->backing_offset >= header->length) { /* right behind it: there are none */
        end = min_u64(end, header->backing_offset);
    }
    end = min_u64(end, bytes);
    uint64_t at = header->length;
    for (;;) {
        struct qcow2_disk_extension disk;
        if (end < at || end - at < sizeof(disk)) {
            break; /* the list may end where its space ends */
        }
        memcpy(&disk, data + at, sizeof(disk));
        uint32_t type = be32toh(disk.type);
        uint32_t length = be32toh(disk.length);
        at += sizeof(disk);
        if (type == QCOW2_EXTENSION_END) {
            break;
        }
        if (length > end - at) {
            return error_set(err, -EINVAL, "qcow2 header extension 0x%08x is too long (%u bytes)", type, length);
        }
        if (header->extension_count >= 1024) {
            return error_set(err, -EINVAL, "qcow2 header has too many extensions");
        }
        int code = parse_extension(header, type, data + at, length, err);
        if (code < 0) {
            return code;
        }
        at += align_up(length, 8);
    }
    header->extensions_end = min_u64(at, (uint64_t)1 << header->cluster_bits);
    return 0;
}

static int parse_backing(const uint8_t *data, uint64_t bytes, struct qcow2_header *header, struct error **err)
{
    if (header->backing_offset == 0) {
        header->backing_length = 0;
        return 0;
    }
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    if (header->backing_length > QCOW2_BACKING_NAME_MAX) {
        return error_set(err, -EINVAL, "qcow2 backing file name is too long (%u bytes)", header->backing_length);
    }
    if (header->backing_offset < header->length || header->backing_offset > cluster_size ||
        header->backing_length > cluster_size - header->backing_offset ||
        header->backing_offset + header->backing_length > bytes) {
        return error_set(err, -EINVAL, "qcow2 backing file name lies outside of the header cluster");
    }
    if (header->backing_length) {
        header->backing_file = g_strndup((const char *)data + header->backing_offset, header->backing_length);
    }
    return 0;
}

/* The image's own name of a feature bit, or the specification's, or NULL; g_free() */
static char *feature_name(const struct qcow2_header *header, unsigned type, unsigned bit)
{
    static const char *const known[] = {"dirty bit", "corrupt bit", "external data file", "compression type",
                                        "extended L2 entries"};
    for (unsigned i = 0; i < header->extension_count; i++) {
        const struct qcow2_extension *extension = &header->extensions[i];
        if (extension->type != QCOW2_EXTENSION_FEATURE_NAMES) {
            continue;
        }
        for (uint32_t at = 0; at + sizeof(struct qcow2_disk_feature_name) <= extension->length;
             at += sizeof(struct qcow2_disk_feature_name)) {
            struct qcow2_disk_feature_name name;
            memcpy(&name, extension->data + at, sizeof(name));
            if (name.type == type && name.bit == bit && name.name[0]) {
                char *text = g_strndup(name.name, sizeof(name.name));
                for (char *c = text; *c; c++) {
                    *c = g_ascii_isprint(*c) ? *c : '?';
                }
                return text;
            }
        }
    }
    return type == 0 && bit < array_size(known) ? g_strdup(known[bit]) : NULL;
}

static int check_features(const struct qcow2_header *header, struct error **err)
{
    const uint64_t supported = QCOW2_INCOMPATIBLE_DIRTY | QCOW2_INCOMPATIBLE_CORRUPT | QCOW2_INCOMPATIBLE_DATA_FILE |
                               QCOW2_INCOMPATIBLE_COMPRESSION | QCOW2_INCOMPATIBLE_EXTENDED_L2;
    uint64_t unsupported = header->incompatible & ~supported;
    if (unsupported) {
        g_autoptr(GString) names = g_string_new(NULL);
        for (unsigned bit = 0; bit < 64; bit++) {
            if (unsupported >> bit & 1) {
                g_autofree char *name = feature_name(header, 0, bit);
                g_string_append_printf(names, "%s", names->len ? ", " : "");
                if (name) {
                    g_string_append(names, name);
                } else {
                    g_string_append_printf(names, "unknown incompatible feature (bit %u)", bit);
                }
            }
        }
        return error_set(err, -ENOTSUP, "Unsupported qcow2 feature(s): %s", names->str);
    }
    bool compression = header->incompatible & QCOW2_INCOMPATIBLE_COMPRESSION;
    if (compression != (header->compression_type != QCOW2_COMPRESSION_ZLIB)) {
        return error_set(err, -EINVAL, "qcow2 compression type %u contradicts the compression type feature bit",
                         header->compression_type);
    }
    if (header->compression_type > QCOW2_COMPRESSION_ZSTD) {
        return error_set(err, -ENOTSUP, "Unknown qcow2 compression type %u", header->compression_type);
    }
    return 0;
}

static int parse_header(const uint8_t *data, uint64_t bytes, uint64_t file_size, bool for_check,
                        struct qcow2_header *ret, struct error **err)
{
    struct qcow2_header header;
    memset(&header, 0, sizeof(header));
    int code = parse_fixed(data, min_u64(bytes, file_size), &header, err);
    /* Features may change what the other fields mean, so they come first; their names are in the extensions. */
    if (code == 0 && header.incompatible & ~(uint64_t)(QCOW2_INCOMPATIBLE_DIRTY | QCOW2_INCOMPATIBLE_CORRUPT)) {
        bool sane = header.cluster_bits >= QCOW2_CLUSTER_BITS_MIN && header.cluster_bits <= QCOW2_CLUSTER_BITS_MAX;
        if (sane) {
            parse_extensions(data, bytes, &header, NULL);
        }
        code = check_features(&header, err);
        qcow2_header_clear(&header);
        if (code == 0) {
            code = parse_fixed(data, min_u64(bytes, file_size), &header, err);
        }
    }
    if (code == 0) {
        code = check_fields(&header, file_size, for_check, err);
    }
    if (code == 0) {
        code = parse_backing(data, bytes, &header, err);
    }
    if (code == 0) {
        code = parse_extensions(data, bytes, &header, err);
    }
    if (code == 0) {
        code = check_features(&header, err);
    }
    if (code < 0) {
        qcow2_header_clear(&header);
        return code;
    }
    *ret = header;
    return 0;
}

int qcow2_header_parse(const uint8_t *data, uint64_t bytes, uint64_t file_size, struct qcow2_header *ret,
                       struct error **err)
{
    return parse_header(data, bytes, file_size, false, ret, err);
}

int coroutine_fn qcow2_header_read(struct edge *file, bool for_check, struct qcow2_header *ret, struct error **err)
{
    uint64_t file_size = edge_size(file);
    uint64_t bytes = 4 * KiB;
    g_autofree uint8_t *data = g_malloc(bytes);
    int code = edge_read_memory(file, 0, data, bytes);
    if (code < 0) {
        return error_set_errno(err, code, "Could not read the qcow2 header");
    }
    /* The cluster size decides how much is the header cluster; a field out of range is for the parser to refuse. */
    unsigned cluster_bits = be32toh(((struct qcow2_disk_header *)data)->cluster_bits);
    bool magic = be32toh(((struct qcow2_disk_header *)data)->magic) == QCOW2_MAGIC;
    if (magic && cluster_bits > 12 && cluster_bits <= QCOW2_CLUSTER_BITS_MAX) {
        bytes = (uint64_t)1 << cluster_bits;
        g_free(data);
        data = g_try_malloc(bytes);
        code = data ? edge_read_memory(file, 0, data, bytes) : -ENOMEM;
        if (code < 0) {
            return error_set_errno(err, code, "Could not read the qcow2 header");
        }
    }
    return parse_header(data, bytes, file_size, for_check, ret, err);
}

static void append_extension(uint8_t *to, uint64_t *at, uint32_t type, const void *data, uint32_t length)
{
    struct qcow2_disk_extension disk = {htobe32(type), htobe32(length)};
    memcpy(to + *at, &disk, sizeof(disk));
    if (length) {
        memcpy(to + *at + sizeof(disk), data, length);
    }
    *at += sizeof(disk) + align_up(length, 8);
}

/* Everything but the feature names goes first; of the names, those that still fit below `limit`. */
static int build_extensions(const struct qcow2_header *header, const char *backing_format, uint8_t *to, uint64_t *at,
                            uint64_t limit)
{
    const uint64_t mark = sizeof(struct qcow2_disk_extension);
    if (backing_format) {
        if (*at + mark + align_up(strlen(backing_format), 8) + mark > limit) {
            return -ENOSPC;
        }
        append_extension(to, at, QCOW2_EXTENSION_BACKING_FORMAT, backing_format, strlen(backing_format));
    }
    for (unsigned pass = 0; pass < 2; pass++) {
        for (unsigned i = 0; i < header->extension_count; i++) {
            const struct qcow2_extension *extension = &header->extensions[i];
            bool names = extension->type == QCOW2_EXTENSION_FEATURE_NAMES;
            if (names != (pass == 1)) {
                continue;
            }
            uint64_t room = limit > *at + 2 * mark ? limit - *at - 2 * mark : 0;
            uint32_t length = extension->length;
            if (names) {
                length = min_u64(length, room) / sizeof(struct qcow2_disk_feature_name) *
                         sizeof(struct qcow2_disk_feature_name);
                if (length == 0) {
                    continue;
                }
            } else if (align_up(length, 8) > room) {
                return -ENOSPC;
            }
            append_extension(to, at, extension->type, extension->data, length);
        }
    }
    if (*at + mark > limit) {
        return -ENOSPC;
    }
    append_extension(to, at, QCOW2_EXTENSION_END, NULL, 0);
    return 0;
}

static void build_fixed(const struct qcow2_header *header, uint8_t *to)
{
    struct qcow2_disk_header disk = {
        .magic = htobe32(QCOW2_MAGIC),
        .version = htobe32(header->version),
        .cluster_bits = htobe32(header->cluster_bits),
        .size = htobe64(header->size),
        .crypt_method = htobe32(header->crypt_method),
        .l1_size = htobe32(header->l1_size),
        .l1_table_offset = htobe64(header->l1_offset),
        .refcount_table_offset = htobe64(header->refcount_table_offset),
        .refcount_table_clusters = htobe32(header->refcount_table_clusters),
        .snapshot_count = htobe32(header->snapshot_count),
        .snapshots_offset = htobe64(header->snapshots_offset),
        .incompatible_features = htobe64(header->incompatible),
        .compatible_features = htobe64(header->compatible),
        .autoclear_features = htobe64(header->autoclear),
        .refcount_order = htobe32(header->refcount_order),
        .header_length = htobe32(header->length),
        .compression_type = header->compression_type,
    };
    memcpy(to, &disk, min_u64(header->length, sizeof(disk)));
}

/* Where a string of `length` bytes can stand without touching what is in use on disk now; 0: nowhere. */
static uint64_t place_name(const struct qcow2_header *header, uint64_t first, uint64_t length)
{
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    uint64_t candidates[] = {
        first, align_up(max_u64(first, header->extensions_end), 8),
        align_up(max_u64(first, header->backing_offset + header->backing_length), 8),
        align_up(max_u64(max_u64(first, header->extensions_end), header->backing_offset + header->backing_length), 8)};
    for (unsigned i = 0; i < array_size(candidates); i++) {
        uint64_t at = candidates[i];
        bool in_first_sector = at + length <= QCOW2_SECTOR;
        bool clear =
            at >= header->extensions_end &&
            !(header->backing_offset && ranges_overlap(at, length, header->backing_offset, header->backing_length));
        if (at + length <= cluster_size && (in_first_sector || (clear && at >= QCOW2_SECTOR))) {
            return at;
        }
    }
    /* No place that is free now: then one that will be. */
    return first + length <= cluster_size ? first : 0;
}

static void put_name(const char *name, uint64_t length, uint64_t offset, uint8_t *to)
{
    uint64_t disk_offset = htobe64(offset);
    uint32_t disk_length = htobe32(length);
    memcpy(to + offset, name, length);
    memcpy(to + offsetof(struct qcow2_disk_header, backing_file_offset), &disk_offset, 8);
    memcpy(to + offsetof(struct qcow2_disk_header, backing_file_size), &disk_length, 4);
}

int qcow2_header_build_new(const struct qcow2_header *header, const char *backing_file, const char *backing_format,
                           uint8_t *to)
{
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    uint64_t name_length = backing_file ? strlen(backing_file) : 0;
    uint64_t at = header->length;
    build_fixed(header, to);
    int code = build_extensions(header, backing_format, to, &at, cluster_size - MIN(cluster_size, name_length));
    if (code == 0 && backing_file) {
        put_name(backing_file, name_length, at, to);
    }
    return code;
}

int qcow2_header_build(const struct qcow2_header *header, const char *backing_file, const char *backing_format,
                       uint8_t *to, uint64_t *ret_name_offset)
{
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    uint64_t name_length = backing_file ? strlen(backing_file) : 0;
    uint64_t at = header->length;
    build_fixed(header, to);
    int code = build_extensions(header, backing_format, to, &at, min_u64(QCOW2_SECTOR, cluster_size));
    if (code < 0) {
        memset(to, 0, cluster_size);
        build_fixed(header, to);
        at = header->length;
        code = build_extensions(header, backing_format, to, &at, cluster_size - MIN(cluster_size, name_length));
    }
    *ret_name_offset = 0;
    if (code == 0 && backing_file) {
        uint64_t first = at + name_length <= QCOW2_SECTOR ? at : max_u64(at, QCOW2_SECTOR);
        uint64_t place = place_name(header, cluster_size > QCOW2_SECTOR ? first : at, name_length);
        if (place == 0) {
            /* Small clusters: the feature names give way to the backing string. */
            at = header->length;
            memset(to, 0, cluster_size);
            build_fixed(header, to);
            code = build_extensions(header, backing_format, to, &at, cluster_size - MIN(cluster_size, name_length));
            place = at;
        }
        if (code < 0 || place + name_length > cluster_size) {
            return -ENOSPC;
        }
        put_name(backing_file, name_length, place, to);
        *ret_name_offset = place;
    }
    return code;
}

/* What stands behind sector 0 first, flushed; then sector 0, flushed. */
static int coroutine_fn write_cluster(struct edge *file, const struct qcow2_header *header, const uint8_t *data,
                                      uint64_t name_offset, uint64_t name_length, uint64_t extensions_end)
{
    int code = 0;
    if (extensions_end > QCOW2_SECTOR) {
        code = edge_flush(file);
        if (code == 0) {
            code = edge_write_memory(file, 0, data, max_u64(extensions_end, name_offset + name_length), 0);
        }
        return code == 0 ? edge_flush(file) : code;
    }
    if (name_offset + name_length > QCOW2_SECTOR) {
        code = edge_write_memory(file, name_offset, data + name_offset, name_length, 0);
    }
    if (code == 0) {
        code = edge_flush(file);
    }
    if (code == 0) {
        code = edge_write_memory(file, 0, data, QCOW2_SECTOR, 0);
    }
    return code == 0 ? edge_flush(file) : code;
}

/* Where the list of extensions that was built ends. */
static uint64_t built_extensions_end(const struct qcow2_header *header, const uint8_t *data)
{
    uint64_t at = header->length;
    for (;;) {
        struct qcow2_disk_extension disk;
        memcpy(&disk, data + at, sizeof(disk));
        at += sizeof(disk) + align_up(be32toh(disk.length), 8);
        if (be32toh(disk.type) == QCOW2_EXTENSION_END) {
            return at;
        }
    }
}

/* Names that could not be written, or not be flushed, may be on disk all the same: what they were goes there again, as
 * far as the disk takes it. `data` is the cluster that was tried; its fields that we do not know stay. */
static void coroutine_fn put_back(struct edge *file, const struct qcow2_header *header, uint8_t *data)
{
    uint64_t known = MIN(header->length, sizeof(struct qcow2_disk_header)), name_offset = 0;
    g_autofree uint8_t *unknown = g_memdup2(data + known, header->length - known);
    memset(data, 0, (size_t)1 << header->cluster_bits);
    if (qcow2_header_build(header, header->backing_file, header->backing_format, data, &name_offset) == 0) {
        uint64_t name_end = name_offset + (header->backing_file ? strlen(header->backing_file) : 0);
        if (unknown) {
            memcpy(data + known, unknown, header->length - known);
        }
        uint64_t bytes = max_u64(max_u64(built_extensions_end(header, data), name_end), QCOW2_SECTOR);
        (void)edge_write_memory(file, 0, data, bytes, 0);
    }
}

int coroutine_fn qcow2_header_change_backing(struct edge *file, struct qcow2_header *header, const char *backing_file,
                                             const char *backing_format, struct error **err)
{
    uint64_t length = backing_file ? strlen(backing_file) : 0;
    if (length > QCOW2_BACKING_NAME_MAX) {
        return error_set(err, -EINVAL,
                         "Backing file name is too long for qcow2 (%" G_GUINT64_FORMAT " bytes; at most %d)", length,
                         QCOW2_BACKING_NAME_MAX);
    }
    if (backing_format && strlen(backing_format) >= 16) {
        return error_set(err, -EINVAL, "Backing format name '%s' is too long for qcow2", backing_format);
    }
    uint64_t cluster_size = (uint64_t)1 << header->cluster_bits;
    g_autofree uint8_t *data = g_try_malloc0(cluster_size);
    uint64_t name_offset = 0;
    int code = data ? qcow2_header_build(header, backing_file, backing_format, data, &name_offset) : -ENOMEM;
    if (code == -ENOSPC) {
        return error_set(err, code,
                         "The qcow2 header cluster (%" G_GUINT64_FORMAT " bytes) has no room for the backing file name",
                         cluster_size);
    }
    if (code == 0 && header->length > sizeof(struct qcow2_disk_header)) { /* fields that we do not know stay */
        code = edge_read_memory(file, sizeof(struct qcow2_disk_header), data + sizeof(struct qcow2_disk_header),
                                header->length - sizeof(struct qcow2_disk_header));
    }
    if (code == 0) {
        code = write_cluster(file, header, data, name_offset, length, built_extensions_end(header, data));
        if (code < 0) {
            put_back(file, header, data);
        }
    }
    if (code < 0) {
        return error_set_errno(err, code, "Could not write the qcow2 header");
    }
    g_free(header->backing_file);
    g_free(header->backing_format);
    header->backing_file = g_strdup(backing_file);
    header->backing_format = g_strdup(backing_format);
    header->backing_offset = name_offset;
    header->backing_length = length;
    header->extensions_end = built_extensions_end(header, data);
    return 0;
}

int coroutine_fn qcow2_header_write_incompatible(struct edge *file, const struct qcow2_header *header)
{
    uint64_t disk = htobe64(header->incompatible);
    return edge_write_memory(file, offsetof(struct qcow2_disk_header, incompatible_features), &disk, 8, 0);
}

int coroutine_fn qcow2_header_write_autoclear(struct edge *file, const struct qcow2_header *header)
{
    uint64_t disk = htobe64(header->autoclear);
    return edge_write_memory(file, offsetof(struct qcow2_disk_header, autoclear_features), &disk, 8, 0);
}

int coroutine_fn qcow2_header_write_refcount_table(struct edge *file, const struct qcow2_header *header)
{
    struct {
        uint64_t offset;
        uint32_t clusters;
    } __attribute__((packed)) disk = {htobe64(header->refcount_table_offset), htobe32(header->refcount_table_clusters)};
    return edge_write_memory(file, offsetof(struct qcow2_disk_header, refcount_table_offset), &disk, sizeof(disk), 0);
}

int coroutine_fn qcow2_header_write_refcounts(struct edge *file, const struct qcow2_header *header)
{
    const size_t first = offsetof(struct qcow2_disk_header, refcount_table_offset);
    const size_t end = offsetof(struct qcow2_disk_header, header_length);
    uint8_t disk[sizeof(struct qcow2_disk_header)];
    if (header->version < 3) {
        return qcow2_header_write_refcount_table(file, header);
    }
    build_fixed(header, disk);
    return edge_write_memory(file, first, disk + first, end - first, 0);
}

int coroutine_fn qcow2_header_write_compatible(struct edge *file, const struct qcow2_header *header)
{
    uint64_t disk = htobe64(header->compatible);
    return edge_write_memory(file, offsetof(struct qcow2_disk_header, compatible_features), &disk, 8, 0);
}

int coroutine_fn qcow2_header_write_size(struct edge *file, const struct qcow2_header *header)
{
    struct {
        uint64_t size;
        uint32_t crypt_method, l1_size;
        uint64_t l1_offset;
    } disk = {htobe64(header->size), htobe32(header->crypt_method), htobe32(header->l1_size),
              htobe64(header->l1_offset)};
    return edge_write_memory(file, offsetof(struct qcow2_disk_header, size), &disk, sizeof(disk), 0);
}
