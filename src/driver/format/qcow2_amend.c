/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Changing options of an image that exists. First everything that was asked for is compared with what is there and with
 * what can be, and refused as a whole or not at all; then the steps, each of which is shown by one write of the header:
 *
 *     version 3 (snapshots get the extra data that it wants first)
 *     the width of refcounts, by new refcount structures
 *     the flag for lazy refcounts, the name of the data file, data-file-raw off
 *     the size
 *     version 2 (zero clusters are expanded first; bitmaps go, for it has no way to say that they are true)
 *
 * 1. A crash leaves the image with some of the steps done, and leaks. What a step leaves behind (old structures,
 *    places of zero clusters) is freed at its end, by counting what is in use.
 * 2. Steps that count begin with a clean image: one with leaks is freed of them, one with corruptions is refused.
 * 3. What a format or the peer knows no way for is refused: other clusters, subclusters, compression, a backing file
 *    (that is rebase's), making a data file raw.
 */
#include "driver/format/qcow2_amend.h"
#include "base/size.h"
#include "block/driver.h"
#include "driver/format/qcow2_bitmap.h"
#include "driver/format/qcow2_crypto.h"
#include "driver/format/qcow2_expand.h"
#include "driver/format/qcow2_flush.h"
#include "driver/format/qcow2_resize.h"
#include <errno.h>
#include <string.h>

/* What is to be, resolved. */
struct amend {
    struct node *node;
    struct qcow2 *image;
    const struct image_progress *progress;
    struct error **err;
    uint64_t size;
    unsigned version, order;
    bool lazy;
    const char *data_file; /* NULL: as it is */
    bool data_raw;
    unsigned steps, done;
};

static void step_done(struct amend *amend)
{
    amend->done++;
    if (amend->progress && amend->progress->report) {
        amend->progress->report(amend->done, amend->steps, amend->progress->argument);
    }
}

/* --- what is asked for --- */

static int refuse_fixed(const struct amend *amend, const struct blockdev_create_options_qcow2 *wanted)
{
    const struct qcow2 *image = amend->image;
    bool extended = image->header.incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2;
    bool zstd = image->header.compression_type == QCOW2_COMPRESSION_ZSTD;
    const char *what = NULL;
    if (wanted->has_cluster_size && wanted->cluster_size != image->cluster_size) {
        what = "The cluster size";
    } else if (wanted->has_preallocation) {
        what = "Preallocation";
    } else if (wanted->has_extended_l2 && wanted->extended_l2 != extended) {
        what = "The kind of L2 entries";
    } else if (wanted->has_compression_type && (wanted->compression_type == QCOW2_COMPRESSION_TYPE_ZSTD) != zstd) {
        what = "The compression type";
    } else if (wanted->encrypt) {
        what = "Encryption";
    }
    return what ? error_set(amend->err, -ENOTSUP, "%s is only chosen when an image is created", what) : 0;
}

static int refuse_backing(const struct amend *amend, const struct blockdev_create_options_qcow2 *wanted)
{
    const struct qcow2_header *header = &amend->image->header;
    const char *format = wanted->has_backing_fmt ? blockdev_driver_name(wanted->backing_fmt) : header->backing_format;
    const char *file = wanted->backing_file ? wanted->backing_file : header->backing_file;
    if (g_strcmp0(file, header->backing_file) == 0 && g_strcmp0(format, header->backing_format) == 0) {
        return 0;
    }
    error_set(amend->err, -ENOTSUP, "Cannot amend the backing file");
    error_hint(amend->err, "\"img rebase\" changes it");
    return -ENOTSUP;
}

static const char *data_file_name(const struct blockdev_ref *ref)
{
    return ref->kind == BLOCKDEV_REF_DEFINITION && ref->u.definition->driver == BLOCKDEV_DRIVER_FILE
               ? ref->u.definition->u.file.filename
               : NULL;
}

static int resolve_data_file(struct amend *amend, const struct blockdev_create_options_qcow2 *wanted)
{
    const struct qcow2_header *header = &amend->image->header;
    bool external = header->incompatible & QCOW2_INCOMPATIBLE_DATA_FILE;
    bool raw = header->autoclear & QCOW2_AUTOCLEAR_RAW_DATA_FILE;
    amend->data_raw = wanted->has_data_file_raw ? wanted->data_file_raw : raw;
    if (amend->data_raw && !raw) {
        return error_set(amend->err, -EINVAL, "data-file-raw cannot be set on existing images");
    }
    if (!wanted->data_file) {
        return 0;
    }
    if (!external) {
        return error_set(amend->err, -EINVAL, "data-file can only be set for images that use an external data file");
    }
    amend->data_file = data_file_name(wanted->data_file);
    if (!amend->data_file || !*amend->data_file || strlen(amend->data_file) > QCOW2_DATA_NAME_MAX) {
        return error_set(amend->err, -EINVAL, "data-file must be the name of a file, of at most %d bytes",
                         QCOW2_DATA_NAME_MAX);
    }
    return 0;
}

static int resolve_version(struct amend *amend, const struct blockdev_create_options_qcow2 *wanted)
{
    const struct qcow2_header *header = &amend->image->header;
    amend->version = wanted->has_version ? (wanted->version == BLOCKDEV_QCOW2_VERSION_V2 ? 2 : 3) : header->version;
    int64_t bits = wanted->has_refcount_bits ? wanted->refcount_bits : INT64_C(1) << header->refcount_order;
    if (bits < 1 || bits > 64 || !is_power_of_two(bits)) {
        return error_set(amend->err, -EINVAL, "Refcount width must be a power of two and may not exceed 64 bits");
    }
    amend->order = __builtin_ctzll(bits);
    amend->lazy = wanted->has_lazy_refcounts ? wanted->lazy_refcounts
                                             : (header->compatible & QCOW2_COMPATIBLE_LAZY_REFCOUNTS) != 0;
    if (amend->version >= 3) {
        return 0;
    }
    if (header->version < 3 && amend->order != 4) {
        return error_set(amend->err, -EINVAL,
                         "Refcount widths other than 16 bits require compatibility level 1.1 or above");
    }
    if (amend->order != 4) {
        return error_set(amend->err, -EINVAL, "compat=0.10 requires refcount_bits=16");
    }
    if (wanted->has_lazy_refcounts && wanted->lazy_refcounts) {
        return error_set(amend->err, -EINVAL, "Lazy refcounts only supported with compatibility level 1.1 and above");
    }
    amend->lazy = false;
    if (header->incompatible & QCOW2_INCOMPATIBLE_DATA_FILE) {
        return error_set(amend->err, -ENOTSUP, "Cannot downgrade an image with a data file");
    }
    uint64_t features = header->incompatible & ~(uint64_t)QCOW2_INCOMPATIBLE_DIRTY;
    if (features) {
        return error_set(amend->err, -ENOTSUP,
                         "Cannot downgrade an image with incompatible features 0x%" G_GINT64_MODIFIER "x set",
                         features);
    }
    return 0;
}

static int coroutine_fn resolve(struct amend *amend, const struct blockdev_create_options_qcow2 *wanted)
{
    int code = refuse_fixed(amend, wanted);
    if (code == 0) {
        code = refuse_backing(amend, wanted);
    }
    if (code == 0) {
        code = resolve_data_file(amend, wanted);
    }
    if (code == 0) {
        code = resolve_version(amend, wanted);
    }
    amend->size = wanted->size ? wanted->size : amend->image->header.size;
    if (code == 0 && amend->size % QCOW2_SECTOR) {
        code = error_set(amend->err, -EINVAL, "The new size must be a multiple of 512");
    }
    return code;
}

/* --- counting --- */

/* The census of an image without corruptions. */
static int coroutine_fn count(struct amend *amend, struct qcow2_census *census)
{
    struct qcow2_findings findings;
    qcow2_findings_init(&findings);
    int code = qcow2_census_take(census, amend->image, &findings, amend->err);
    if (code == 0 && (findings.errors || findings.corruptions)) {
        qcow2_census_finish(census);
        code = error_set(amend->err, -EIO, "The image is corrupt: %s", (const char *)findings.lines->pdata[0]);
        error_hint(amend->err, "\"img check -r all\" repairs it");
    }
    census->findings = NULL;
    qcow2_findings_finish(&findings);
    return code;
}

/* Makes refcounts and flags what is in use. */
static int coroutine_fn free_leaks(struct amend *amend)
{
    struct qcow2_census census;
    struct qcow2_repair repair;
    int code = count(amend, &census);
    if (code < 0) {
        return code;
    }
    qcow2_repair_init(&repair, &census, amend->err);
    code = qcow2_repair_refcounts(&repair, false);
    if (code == 0) {
        code = qcow2_repair_flags(&repair);
    }
    qcow2_repair_finish(&repair);
    qcow2_census_finish(&census);
    return code;
}

/* A step that needs the census, and changes what is on disk beneath the tables in memory. */
static int coroutine_fn with_census(struct amend *amend,
                                    int coroutine_fn (*work)(struct amend *amend, struct qcow2_repair *repair))
{
    struct qcow2_census census;
    struct qcow2_repair repair;
    int code = qcow2_flush_all(amend->image);
    if (code < 0) {
        return error_set_errno(amend->err, code, "Could not write the metadata of node '%s'", amend->node->name);
    }
    code = count(amend, &census);
    if (code == 0) {
        qcow2_repair_init(&repair, &census, amend->err);
        code = work(amend, &repair);
        qcow2_repair_finish(&repair);
        qcow2_census_finish(&census);
    }
    if (code == 0) {
        code = free_leaks(amend);
    }
    if (code < 0) {
        /* What is in memory may not be what is on disk: nothing is written any more until the image is opened again. */
        amend->image->frozen = true;
        atomic_store(&amend->image->corrupt, true);
        return code;
    }
    return qcow2_reload_tables(amend->image, amend->err);
}

/* --- steps --- */

/* The header as it is in memory, whole, by one write (qcow2_header.c). */
static int coroutine_fn write_header(struct amend *amend)
{
    struct qcow2_header *header = &amend->image->header;
    g_autofree char *file = g_strdup(header->backing_file);
    g_autofree char *format = g_strdup(header->backing_format);
    return qcow2_header_change_backing(amend->node->file, header, file, format, amend->err);
}

static void drop_extension(struct qcow2_header *header, uint32_t type)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < header->extension_count; i++) {
        if (header->extensions[i].type == type) {
            g_free(header->extensions[i].data);
        } else {
            header->extensions[kept++] = header->extensions[i];
        }
    }
    header->extension_count = kept;
}

static int coroutine_fn complete_snapshots(struct amend *amend, struct qcow2_repair *repair)
{
    repair->complete_extra = true;
    qcow2_repair_prepare_snapshots(repair);
    int code = qcow2_repair_refcounts(repair, true);
    return code == 0 ? qcow2_repair_snapshots(repair) : code;
}

static int coroutine_fn upgrade(struct amend *amend)
{
    struct qcow2_header *header = &amend->image->header;
    int code = header->snapshot_count ? with_census(amend, complete_snapshots) : 0;
    if (code == 0) {
        header->version = 3;
        header->length = sizeof(struct qcow2_disk_header);
        code = write_header(amend);
    }
    return code;
}

static int coroutine_fn change_width(struct amend *amend, struct qcow2_repair *repair)
{
    return qcow2_repair_refcount_width(repair, amend->order);
}

/* Does every refcount fit into the new width? Asked before anything is written. */
static int coroutine_fn check_width(struct amend *amend)
{
    struct qcow2_census census;
    uint64_t most = amend->order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << amend->order)) - 1;
    int code = qcow2_flush_all(amend->image);
    if (code < 0) {
        return error_set_errno(amend->err, code, "Could not write the metadata of node '%s'", amend->node->name);
    }
    code = count(amend, &census);
    for (uint64_t i = 0; code == 0 && i < census.clusters; i++) {
        if (i % (1u << QCOW2_TALLY_CHUNK_BITS) == 0) {
            i = qcow2_tally_skip(&census.uses, NULL, i, census.clusters);
        }
        uint64_t uses = qcow2_tally_get(&census.uses, i);
        if (uses > most) {
            code = error_set(amend->err, -ERANGE,
                             "Cannot decrease refcount entry width to %u bits: Cluster at offset 0x%" G_GINT64_MODIFIER
                             "x has a refcount of %" G_GUINT64_FORMAT,
                             1u << amend->order, i << amend->image->cluster_bits, uses);
            qcow2_census_finish(&census);
            return code;
        }
    }
    if (code == 0) {
        qcow2_census_finish(&census);
    }
    return code;
}

static int coroutine_fn change_lazy(struct amend *amend)
{
    struct qcow2_header *header = &amend->image->header;
    struct edge *file = amend->node->file;
    header->compatible = (header->compatible & ~(uint64_t)QCOW2_COMPATIBLE_LAZY_REFCOUNTS) |
                         (amend->lazy ? QCOW2_COMPATIBLE_LAZY_REFCOUNTS : 0);
    int code = qcow2_header_write_compatible(file, header);
    if (code == 0) {
        code = edge_flush(file);
    }
    return code < 0 ? error_set_errno(amend->err, code, "Could not write the qcow2 header") : 0;
}

static int coroutine_fn change_data_file(struct amend *amend)
{
    struct qcow2_header *header = &amend->image->header;
    uint32_t length = strlen(amend->data_file);
    drop_extension(header, QCOW2_EXTENSION_DATA_FILE);
    header->extensions = g_renew(struct qcow2_extension, header->extensions, header->extension_count + 1);
    header->extensions[header->extension_count++] =
        (struct qcow2_extension){QCOW2_EXTENSION_DATA_FILE, length, g_memdup2(amend->data_file, length)};
    g_free(header->data_file);
    header->data_file = g_strdup(amend->data_file);
    return write_header(amend);
}

static int coroutine_fn end_raw(struct amend *amend)
{
    struct qcow2 *image = amend->image;
    struct edge *file = amend->node->file;
    image->header.autoclear &= ~(uint64_t)QCOW2_AUTOCLEAR_RAW_DATA_FILE;
    image->autoclear_kept &= ~(uint64_t)QCOW2_AUTOCLEAR_RAW_DATA_FILE;
    int code = qcow2_header_write_autoclear(file, &image->header);
    if (code == 0) {
        code = edge_flush(file);
    }
    return code < 0 ? error_set_errno(amend->err, code, "Could not write the qcow2 header") : 0;
}

static int coroutine_fn expand(struct amend *amend, struct qcow2_repair *repair)
{
    return qcow2_expand_zeroes(repair);
}

static int coroutine_fn downgrade(struct amend *amend)
{
    struct qcow2_header *header = &amend->image->header;
    int code = with_census(amend, expand);
    if (code == 0) {
        bool bitmaps = header->bitmaps.bitmap_count;
        header->version = 2;
        header->length = QCOW2_HEADER_SIZE_V2;
        header->incompatible = header->compatible = header->autoclear = 0;
        drop_extension(header, QCOW2_EXTENSION_BITMAPS);
        memset(&header->bitmaps, 0, sizeof(header->bitmaps));
        code = write_header(amend);
        if (code == 0 && bitmaps) {
            qcow2_bitmaps_forget(amend->image);
            code = free_leaks(amend);
        }
    }
    return code == 0 ? qcow2_reload_tables(amend->image, amend->err) : code;
}

/* In version 2 a snapshot does not say how large its disk is. */
static int coroutine_fn check_snapshot_sizes(struct amend *amend)
{
    struct qcow2 *image = amend->image;
    struct qcow2_census census;
    int code = qcow2_flush_all(image);
    if (code < 0) {
        return error_set_errno(amend->err, code, "Could not write the metadata of node '%s'", amend->node->name);
    }
    code = count(amend, &census);
    if (code < 0) {
        return code;
    }
    for (unsigned i = 0; code == 0 && i < census.snapshots->len; i++) {
        uint64_t at = g_array_index(census.snapshots, struct qcow2_census_snapshot, i).at;
        uint64_t size;
        code = edge_read_memory(amend->node->file,
                                image->header.snapshots_offset + at + sizeof(struct qcow2_disk_snapshot) + 8, &size,
                                sizeof(size));
        if (code < 0) {
            error_set_errno(amend->err, code, "Could not read the snapshot table");
        } else if (be64toh(size) != amend->size) {
            code = error_set(amend->err, -ENOTSUP,
                             "Internal snapshots prevent downgrade of image: one has a disk of another size");
        }
    }
    qcow2_census_finish(&census);
    return code;
}

/* --- all of it --- */

struct step {
    bool wanted;
    int coroutine_fn (*work)(struct amend *amend);
};

static int coroutine_fn do_width(struct amend *amend)
{
    return with_census(amend, change_width);
}

static int coroutine_fn do_size(struct amend *amend)
{
    return qcow2_truncate(amend->node, amend->size, amend->err);
}

static int coroutine_fn do_steps(struct amend *amend)
{
    const struct qcow2_header *header = &amend->image->header;
    bool lazy = header->compatible & QCOW2_COMPATIBLE_LAZY_REFCOUNTS;
    bool raw = header->autoclear & QCOW2_AUTOCLEAR_RAW_DATA_FILE;
    bool down = header->version > amend->version;
    bool width = amend->order != header->refcount_order;
    const struct step steps[] = {
        {width, check_width},
        {down && header->snapshot_count, check_snapshot_sizes},
        {header->version < amend->version, upgrade},
        {width, do_width},
        {lazy != amend->lazy && !down, change_lazy},
        {amend->data_file && g_strcmp0(amend->data_file, header->data_file) != 0, change_data_file},
        {raw && !amend->data_raw, end_raw},
        {amend->size != header->size, do_size},
        {down, downgrade},
    };
    for (unsigned i = 0; i < G_N_ELEMENTS(steps); i++) {
        amend->steps += steps[i].wanted;
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(steps); i++) {
        if (steps[i].wanted) {
            int code = steps[i].work(amend);
            if (code < 0) {
                return code;
            }
            step_done(amend);
        }
    }
    return 0;
}

int coroutine_fn qcow2_amend(struct node *node, const struct image_amendment *amendment,
                             const struct image_progress *progress, struct error **err)
{
    struct qcow2 *image = node->state;
    struct amend amend = {.node = node, .image = image, .progress = progress, .err = err};
    int code = amendment->options ? resolve(&amend, &amendment->options->u.qcow2) : 0;
    if (code == 0 && amendment->keys) {
        code = qcow2_crypto_amend(image, amendment, err);
    }
    if (code < 0 || !amendment->options) {
        return code;
    }
    code = qcow2_prepare_write(image);
    if (code < 0) {
        return error_set_errno(err, code, "Could not amend node '%s'", node->name);
    }
    return do_steps(&amend);
}
