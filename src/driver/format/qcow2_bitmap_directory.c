/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Reading and writing the directory of bitmaps, and switching the header to a new one.
 *
 * 1. A new directory goes to clusters of its own. Everything that it leads to is written and its refcounts are raised;
 *    flush; then the 24 bytes of the header extension change in one write; flush. If power goes before that write the
 *    old directory is shown, and the new clusters are leaked; after it the new one, and the old clusters are leaked.
 * 2. The extension changes in place if it is there. If it has to be added, or its 24 bytes cross a sector, the
 * autoclear bit of bitmaps is off on disk meanwhile: power going then leaves an image whose bitmaps are void.
 * 3. A directory without entries is not allowed: then the bit is cleared, and the extension taken away.
 * 4. Flags are one word inside a sector; they change in place.
 */
#include "driver/format/qcow2_bitmap_directory.h"
#include "base/size.h"
#include "block/bitmap.h"
#include "block/request.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_overlap.h"
#include "driver/format/qcow2_refcount.h"
#include <endian.h>
#include <errno.h>
#include <string.h>

enum { TYPE_DIRTY = 1, FLAG_EXTRA_COMPATIBLE = 1 << 2 };

struct qcow2_bitmap_record *qcow2_bitmap_record_create(const char *name)
{
    struct qcow2_bitmap_record *record = g_new0(struct qcow2_bitmap_record, 1);
    record->name = g_strdup(name);
    record->type = TYPE_DIRTY;
    return record;
}

void qcow2_bitmap_record_free(void *item)
{
    struct qcow2_bitmap_record *record = item;
    if (record) {
        g_free(record->name);
        g_free(record->extra);
        g_free(record);
    }
}

bool qcow2_bitmap_record_is_known(const struct qcow2_bitmap_record *record)
{
    const uint32_t known = QCOW2_BITMAP_IN_USE | QCOW2_BITMAP_AUTO | FLAG_EXTRA_COMPATIBLE;
    bool extra = record->extra_size == 0 || record->flags & FLAG_EXTRA_COMPATIBLE;
    return record->type == TYPE_DIRTY && !(record->flags & ~known) && extra && *record->name &&
           strlen(record->name) <= BITMAP_NAME_MAX &&
           record->granularity_bits >= __builtin_ctz(BITMAP_GRANULARITY_MIN) &&
           record->granularity_bits <= __builtin_ctzll(BITMAP_GRANULARITY_MAX);
}

/* --- reading --- */

/* The entry at `at` of the directory; *at goes behind it. */
static struct qcow2_bitmap_record *parse_entry(const uint8_t *directory, uint64_t bytes, uint64_t *at)
{
    struct qcow2_disk_bitmap disk;
    if (bytes - *at < sizeof(disk)) {
        return NULL;
    }
    memcpy(&disk, directory + *at, sizeof(disk));
    uint64_t extra_size = be32toh(disk.extra_size);
    uint64_t name_size = be16toh(disk.name_size);
    uint64_t length = align_up(sizeof(disk) + extra_size + name_size, 8);
    if (length > bytes - *at) {
        return NULL;
    }
    const uint8_t *extra = directory + *at + sizeof(disk);
    struct qcow2_bitmap_record *record = g_new0(struct qcow2_bitmap_record, 1);
    *record = (struct qcow2_bitmap_record){
        .name = g_strndup((const char *)extra + extra_size, name_size),
        .place = *at,
        .table_offset = be64toh(disk.table_offset),
        .table_entries = be32toh(disk.table_size),
        .flags = be32toh(disk.flags),
        .type = disk.type,
        .granularity_bits = disk.granularity_bits,
        .extra = g_memdup2(extra, extra_size),
        .extra_size = extra_size,
    };
    *at += length;
    return record;
}

int coroutine_fn qcow2_bitmap_directory_read(struct qcow2 *image, GPtrArray **ret)
{
    const struct qcow2_disk_bitmaps *bitmaps = &image->header.bitmaps;
    g_autoptr(GPtrArray) records = g_ptr_array_new_with_free_func(qcow2_bitmap_record_free);
    bool there =
        image->header.version >= 3 && image->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS && bitmaps->bitmap_count;
    uint64_t bytes = there ? bitmaps->directory_size : 0;
    uint64_t end = align_up(edge_size(image->node->file), image->cluster_size);
    if (!there) {
        *ret = g_steal_pointer(&records);
        return 0;
    }
    if (bitmaps->bitmap_count > QCOW2_BITMAPS_MAX || bytes > QCOW2_BITMAP_DIRECTORY_BYTES_MAX ||
        bytes < (uint64_t)bitmaps->bitmap_count * sizeof(struct qcow2_disk_bitmap) ||
        qcow2_in_cluster(image, bitmaps->directory_offset) || bitmaps->directory_offset > end ||
        bytes > end - bitmaps->directory_offset || qcow2_overlaps_metadata(image, bitmaps->directory_offset, bytes)) {
        return -EINVAL;
    }
    g_autofree uint8_t *directory = g_try_malloc(bytes);
    int code = directory ? edge_read_memory(image->node->file, bitmaps->directory_offset, directory, bytes) : -ENOMEM;
    uint64_t at = 0;
    for (uint32_t i = 0; code == 0 && i < bitmaps->bitmap_count; i++) {
        struct qcow2_bitmap_record *record = parse_entry(directory, bytes, &at);
        if (!record) {
            return -EINVAL;
        }
        record->place += bitmaps->directory_offset;
        g_ptr_array_add(records, record);
    }
    if (code == 0) {
        *ret = g_steal_pointer(&records);
    }
    return code;
}

int coroutine_fn qcow2_bitmap_record_write_flags(struct qcow2 *image, const struct qcow2_bitmap_record *record)
{
    uint32_t disk = htobe32(record->flags);
    return edge_write_memory(image->node->file, record->place + offsetof(struct qcow2_disk_bitmap, flags), &disk,
                             sizeof(disk), 0);
}

/* --- the header --- */

static struct qcow2_extension *find_extension(struct qcow2_header *header)
{
    struct qcow2_extension *found = NULL;
    for (unsigned i = 0; i < header->extension_count; i++) {
        if (header->extensions[i].type == QCOW2_EXTENSION_BITMAPS) {
            found = &header->extensions[i];
        }
    }
    return found;
}

/* Where the data of the extension stand on disk; 0: nowhere. */
static int coroutine_fn find_on_disk(struct qcow2 *image, uint64_t *ret)
{
    const struct qcow2_header *header = &image->header;
    uint64_t bytes = header->extensions_end;
    g_autofree uint8_t *data = g_malloc0(bytes + sizeof(struct qcow2_disk_extension));
    int code = edge_read_memory(image->node->file, 0, data, bytes);
    *ret = 0;
    for (uint64_t at = header->length; code == 0 && at + sizeof(struct qcow2_disk_extension) <= bytes;) {
        struct qcow2_disk_extension disk;
        memcpy(&disk, data + at, sizeof(disk));
        at += sizeof(disk);
        if (be32toh(disk.type) == QCOW2_EXTENSION_END) {
            break;
        }
        if (be32toh(disk.type) == QCOW2_EXTENSION_BITMAPS) {
            *ret = at;
        }
        at += align_up(be32toh(disk.length), 8);
    }
    return code;
}

/* Turns the bit of bitmaps on or off on disk, stable. */
static int coroutine_fn write_bit(struct qcow2 *image, bool on)
{
    uint64_t before = image->header.autoclear;
    uint64_t after = on ? before | QCOW2_AUTOCLEAR_BITMAPS : before & ~(uint64_t)QCOW2_AUTOCLEAR_BITMAPS;
    if (before == after) {
        return 0;
    }
    image->header.autoclear = after;
    int code = qcow2_header_write_autoclear(image->node->file, &image->header);
    if (code == 0) {
        code = edge_flush(image->node->file);
    }
    if (code < 0) {
        image->header.autoclear = before;
    }
    return code;
}

static struct qcow2_disk_bitmaps to_disk(const struct qcow2_disk_bitmaps *bitmaps)
{
    return (struct qcow2_disk_bitmaps){.bitmap_count = htobe32(bitmaps->bitmap_count),
                                       .directory_size = htobe64(bitmaps->directory_size),
                                       .directory_offset = htobe64(bitmaps->directory_offset)};
}

/* Writes the header's list of extensions anew, as it is in memory. */
static int coroutine_fn write_extensions(struct qcow2 *image)
{
    struct qcow2_header *header = &image->header;
    g_autofree char *file = g_strdup(header->backing_file);
    g_autofree char *format = g_strdup(header->backing_format);
    auto_error error = NULL;
    return qcow2_header_change_backing(image->node->file, header, file, format, &error);
}

static int coroutine_fn add_extension(struct qcow2 *image, const struct qcow2_disk_bitmaps *disk)
{
    struct qcow2_header *header = &image->header;
    int code = write_bit(image, false);
    if (code < 0) {
        return code;
    }
    header->extensions = g_renew(struct qcow2_extension, header->extensions, header->extension_count + 1);
    header->extensions[header->extension_count++] =
        (struct qcow2_extension){QCOW2_EXTENSION_BITMAPS, sizeof(*disk), g_memdup2(disk, sizeof(*disk))};
    code = write_extensions(image);
    if (code < 0) {
        g_free(header->extensions[--header->extension_count].data);
    }
    return code == 0 ? write_bit(image, true) : code;
}

static int coroutine_fn change_extension(struct qcow2 *image, const struct qcow2_disk_bitmaps *disk, uint64_t at)
{
    struct edge *file = image->node->file;
    bool crosses = at / QCOW2_SECTOR != (at + sizeof(*disk) - 1) / QCOW2_SECTOR;
    int code = crosses ? write_bit(image, false) : 0;
    if (code == 0) {
        code = edge_write_memory(file, at, disk, sizeof(*disk), 0);
    }
    if (code == 0) {
        code = edge_flush(file);
    }
    if (code == 0) {
        memcpy(find_extension(&image->header)->data, disk, sizeof(*disk));
        code = write_bit(image, true);
    }
    return code;
}

static int coroutine_fn remove_extension(struct qcow2 *image)
{
    struct qcow2_header *header = &image->header;
    int code = write_bit(image, false);
    if (code < 0) {
        return code;
    }
    unsigned kept = 0;
    for (unsigned i = 0; i < header->extension_count; i++) {
        if (header->extensions[i].type == QCOW2_EXTENSION_BITMAPS) {
            g_free(header->extensions[i].data);
        } else {
            header->extensions[kept++] = header->extensions[i];
        }
    }
    header->extension_count = kept;
    (void)write_extensions(image); /* it is void by now; a later change tries again */
    return 0;
}

static int coroutine_fn write_header(struct qcow2 *image, const struct qcow2_disk_bitmaps *bitmaps)
{
    struct qcow2_disk_bitmaps disk = to_disk(bitmaps);
    uint64_t at = 0;
    int code = 0;
    if (bitmaps->bitmap_count == 0) {
        code = find_extension(&image->header) ? remove_extension(image) : 0;
    } else {
        code = find_extension(&image->header) ? find_on_disk(image, &at) : 0;
        if (code == 0) {
            code = at ? change_extension(image, &disk, at) : add_extension(image, &disk);
        }
    }
    if (code == 0) {
        image->header.bitmaps = *bitmaps;
    }
    return code;
}

/* --- writing --- */

static uint64_t append_entry(GByteArray *to, const struct qcow2_bitmap_record *record)
{
    static const uint8_t zeroes[8];
    uint64_t at = to->len;
    struct qcow2_disk_bitmap disk = {
        .table_offset = htobe64(record->table_offset),
        .table_size = htobe32(record->table_entries),
        .flags = htobe32(record->flags),
        .type = record->type,
        .granularity_bits = record->granularity_bits,
        .name_size = htobe16(strlen(record->name)),
        .extra_size = htobe32(record->extra_size),
    };
    g_byte_array_append(to, (const uint8_t *)&disk, sizeof(disk));
    if (record->extra_size) {
        g_byte_array_append(to, record->extra, record->extra_size);
    }
    g_byte_array_append(to, (const uint8_t *)record->name, strlen(record->name));
    g_byte_array_append(to, zeroes, align_up(to->len, 8) - to->len);
    return at;
}

/* Puts the entries, in order, to a new place; *ret says where, host byte order. */
static int coroutine_fn write_entries(struct qcow2 *image, GPtrArray *records, struct qcow2_disk_bitmaps *ret)
{
    g_autoptr(GByteArray) bytes = g_byte_array_new();
    g_autofree uint64_t *places = g_new(uint64_t, MAX(records->len, 1));
    *ret = (struct qcow2_disk_bitmaps){.bitmap_count = records->len};
    for (unsigned i = 0; i < records->len; i++) {
        places[i] = append_entry(bytes, records->pdata[i]);
        if (bytes->len > QCOW2_BITMAP_DIRECTORY_BYTES_MAX) {
            return -EFBIG;
        }
    }
    ret->directory_size = bytes->len;
    if (records->len == 0) {
        return 0;
    }
    uint64_t clusters = div_up(bytes->len, image->cluster_size);
    int code = qcow2_allocate_exactly(image, clusters, &ret->directory_offset);
    if (code == 0) {
        code = edge_write_memory(image->node->file, ret->directory_offset, bytes->data, bytes->len, 0);
        if (code < 0) {
            qcow2_release(image, ret->directory_offset, clusters);
        }
    }
    for (unsigned i = 0; code == 0 && i < records->len; i++) {
        struct qcow2_bitmap_record *record = records->pdata[i];
        record->place = ret->directory_offset + places[i];
    }
    return code;
}

int coroutine_fn qcow2_bitmap_directory_write(struct qcow2 *image, GPtrArray *records)
{
    struct qcow2_disk_bitmaps old = image->header.bitmaps;
    bool valid = image->header.autoclear & QCOW2_AUTOCLEAR_BITMAPS;
    struct qcow2_disk_bitmaps new;
    int code = write_entries(image, records, &new);
    if (code < 0) {
        return code;
    }
    code = qcow2_write_metadata(image);
    if (code == 0) {
        code = edge_flush(image->node->file);
    }
    if (code < 0) {
        if (new.bitmap_count) {
            qcow2_release(image, new.directory_offset, div_up(new.directory_size, image->cluster_size));
        }
        return code;
    }
    code = write_header(image, &new);
    if (code < 0) {
        /* Nobody knows which directory the header shows now. Both are good, as long as neither changes. */
        image->frozen = true;
        atomic_store(&image->corrupt, true);
        return code;
    }
    qcow2_overlap_forget(image);
    bool ours = image->bitmaps_ours || image->bitmaps_trusted;
    image->bitmaps_ours = true;
    if (valid && old.bitmap_count && ours) {
        qcow2_free(image, old.directory_offset, div_up(old.directory_size, image->cluster_size),
                   image->options.pass_discard_other);
    }
    return 0;
}
