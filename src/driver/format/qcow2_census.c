/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The census: header, L1 tables, L2 tables; what else there is counts qcow2_census_tables.c. The refcounts on disk are
 * loaded first, so that one pass over the L2 tables sees everything: places, flags, fragmentation.
 *
 * 1. Each L2 table is read once, however many L1 tables show it, and its entries count as often as it is shown. Tables
 *    that lie side by side are read in one piece, several pieces at a time; counting is done by whoever has read.
 * 2. A hostile image costs neither memory nor time out of proportion. Memory: a fixed amount, and a share of the bytes
 *    that the file has on disk. Time: metadata are bytes on disk and are read once, so what is read beyond that many
 *    bytes and a fixed amount is refused, and is an error of the check.
 * 3. What is found is named as the peer counts it: an entry with reserved bits, a place that is none, a place behind
 *    the end of the file, a COPIED flag that contradicts the refcount: one corruption each. A place behind the end
 *    is one that lies there by a cluster or more, for the file's last cluster may be cut short.
 */
#include "driver/format/qcow2_census.h"
#include "base/size.h"
#include "block/driver.h"
#include "driver/format/qcow2_census_private.h"
#include "loop/loop.h"
#include <errno.h>
#include <stdarg.h>
#include <string.h>

enum { READERS = 6, PIECE_BYTES = 1 << 20, TABLE_COST = 128 };
#define MEMORY_BASE (UINT64_C(96) << 20)
#define READS_BASE (UINT64_C(512) << 20)

/* --- findings --- */

void qcow2_findings_init(struct qcow2_findings *findings)
{
    *findings = (struct qcow2_findings){.lines = g_ptr_array_new_with_free_func(g_free)};
}

void qcow2_findings_finish(struct qcow2_findings *findings)
{
    g_ptr_array_unref(findings->lines);
}

static void add_line(struct qcow2_findings *findings, const char *format, va_list arguments)
{
    if (findings->lines->len < QCOW2_FINDINGS_SHOWN) {
        g_ptr_array_add(findings->lines, g_strdup_vprintf(format, arguments));
    }
}

void qcow2_findings_add(struct qcow2_findings *findings, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    add_line(findings, format, arguments);
    va_end(arguments);
}

void census_corruption(struct qcow2_census *census, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    census->findings->corruptions++;
    add_line(census->findings, format, arguments);
    va_end(arguments);
}

void census_error(struct qcow2_census *census, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    census->findings->errors++;
    add_line(census->findings, format, arguments);
    va_end(arguments);
}

/* --- the file --- */

bool qcow2_census_inside(const struct qcow2_census *census, uint64_t offset, uint64_t bytes)
{
    uint64_t end = census->file_bytes + census->image->cluster_size; /* not to be reached */
    return offset < end && bytes < end - offset;
}

bool coroutine_fn census_read(struct qcow2_census *census, uint64_t offset, void *to, uint64_t bytes, const char *what)
{
    if (census->reads < bytes) {
        census_error(census, "%s at 0x%" G_GINT64_MODIFIER "x is not read: there are more metadata than the file holds",
                     what, offset);
        return false;
    }
    census->reads -= bytes;
    uint64_t inside = offset < census->file_bytes ? min_u64(bytes, census->file_bytes - offset) : 0;
    int code = inside ? edge_read_memory(census->file, offset, to, inside) : 0;
    if (code < 0) {
        census_error(census, "%s at 0x%" G_GINT64_MODIFIER "x could not be read: %s", what, offset, g_strerror(-code));
        return false;
    }
    memset((uint8_t *)to + inside, 0, bytes - inside);
    return true;
}

uint64_t *coroutine_fn census_read_table(struct qcow2_census *census, uint64_t offset, uint64_t entries,
                                         const char *what)
{
    uint64_t *table = g_try_new(uint64_t, MAX(entries, 1));
    if (!table) {
        census_error(census, "%s is too large for the memory that there is", what);
        return NULL;
    }
    if (!census_read(census, offset, table, entries * 8, what)) {
        g_free(table);
        return NULL;
    }
    for (uint64_t i = 0; i < entries; i++) {
        table[i] = be64toh(table[i]);
    }
    return table;
}

/* --- uses --- */

bool census_use(struct qcow2_census *census, uint64_t offset, uint64_t bytes, uint32_t times, const char *what)
{
    if (bytes == 0) {
        return true;
    }
    if (!qcow2_census_inside(census, offset, bytes)) {
        census_corruption(census,
                          "%s at 0x%" G_GINT64_MODIFIER "x (%" G_GUINT64_FORMAT
                          " bytes) lies behind the end of the image file",
                          what, offset, bytes);
        return false;
    }
    unsigned bits = census->image->cluster_bits;
    uint64_t last = min_u64((offset + bytes - 1) >> bits, census->clusters - 1);
    for (uint64_t cluster = offset >> bits; cluster <= last; cluster++) {
        qcow2_tally_add(&census->uses, cluster, times);
    }
    return true;
}

bool census_use_metadata(struct qcow2_census *census, uint64_t offset, uint64_t bytes, enum qcow2_place place,
                         const char *what)
{
    if (bytes == 0 || !census_use(census, offset, bytes, 1, what)) {
        return bytes == 0;
    }
    unsigned bits = census->image->cluster_bits;
    uint64_t first = offset >> bits;
    struct qcow2_metadata_run run = {first, ((offset + bytes - 1) >> bits) - first + 1, 1, place};
    g_array_append_val(census->metadata, run);
    return true;
}

static int compare_runs(const void *a, const void *b)
{
    uint64_t first = ((const struct qcow2_metadata_run *)a)->first;
    uint64_t second = ((const struct qcow2_metadata_run *)b)->first;
    return (first > second) - (first < second);
}

bool qcow2_census_is_metadata(const struct qcow2_census *census, uint64_t cluster, bool not_l2)
{
    /* The last run that begins at or before the cluster. Runs overlap only in broken images, and are looked through
     * backwards as far as the longest of them reaches. */
    unsigned low = 0;
    unsigned high = census->metadata->len;
    while (low < high) {
        unsigned middle = low + (high - low) / 2;
        if (g_array_index(census->metadata, struct qcow2_metadata_run, middle).first <= cluster) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    while (low-- > 0) {
        const struct qcow2_metadata_run *run = &g_array_index(census->metadata, struct qcow2_metadata_run, low);
        if (cluster - run->first < run->count && !(not_l2 && run->place == QCOW2_PLACE_L2)) {
            return true;
        }
        if (cluster - run->first > census->longest_run) {
            break;
        }
    }
    return false;
}

/* --- L1 tables --- */

static void add_table(struct qcow2_census *census, uint64_t offset, uint64_t guest, bool active)
{
    gpointer key = GSIZE_TO_POINTER(offset >> 9);
    unsigned known = GPOINTER_TO_UINT(g_hash_table_lookup(census->by_offset, key));
    if (!known) {
        if (census->memory < TABLE_COST) {
            census->uses.out_of_memory = true;
            return;
        }
        census->memory -= TABLE_COST;
        struct qcow2_census_table table = {.offset = offset, .guest = guest};
        g_array_append_val(census->tables, table);
        known = census->tables->len;
        g_hash_table_insert(census->by_offset, key, GUINT_TO_POINTER(known));
    }
    struct qcow2_census_table *table = &g_array_index(census->tables, struct qcow2_census_table, known - 1);
    table->uses += table->uses < UINT32_MAX;
    table->active_uses += active;
}

void census_count_l1(struct qcow2_census *census, const uint64_t *l1, uint64_t entries, bool active)
{
    const struct qcow2 *image = census->image;
    for (uint64_t i = 0; i < entries; i++) {
        uint64_t offset = l1[i] & QCOW2_OFFSET_MASK;
        if (l1[i] == 0) {
            continue;
        }
        bool broken = false;
        if (l1[i] & QCOW2_L1_RESERVED || offset == 0) {
            census_corruption(census, "L1 entry %" G_GUINT64_FORMAT " cannot be: 0x%016" G_GINT64_MODIFIER "x", i,
                              l1[i]);
            broken = true;
        }
        if (offset == 0) {
            census->l1_broken = true;
            continue;
        }
        if (qcow2_in_cluster(image, offset)) {
            census_corruption(census,
                              "L1 entry %" G_GUINT64_FORMAT
                              " shows a table that is not at a cluster: 0x%016" G_GINT64_MODIFIER "x",
                              i, l1[i]);
            broken = true;
        }
        if (census_use(census, offset, image->cluster_size, 1, "an L2 table")) {
            add_table(census, offset, i << (image->l2_bits + image->cluster_bits), active);
        } else {
            broken = true;
        }
        census->l1_broken |= broken;
        uint32_t refcount = qcow2_tally_get(&census->refcounts, offset >> image->cluster_bits);
        if (active && !qcow2_flag_is_right(l1[i], refcount)) {
            census_corruption(census,
                              "L1 entry %" G_GUINT64_FORMAT " (0x%016" G_GINT64_MODIFIER "x) and refcount %u disagree",
                              i, l1[i], refcount);
        }
    }
}

static void coroutine_fn count_active(struct qcow2_census *census)
{
    const struct qcow2_header *header = &census->image->header;
    uint64_t entries = header->l1_size;
    if (!census_use_metadata(census, header->l1_offset, entries * 8, QCOW2_PLACE_L1, "the L1 table")) {
        return;
    }
    census->l1 = census_read_table(census, header->l1_offset, entries, "the L1 table");
    if (census->l1) {
        census_count_l1(census, census->l1, entries, true);
    }
}

/* --- L2 tables --- */

/* What the compressed data of an entry must be; a finding if not. */
static bool compressed_is_sane(const struct qcow2_census *census, uint64_t descriptor)
{
    uint64_t offset;
    uint64_t bytes;
    qcow2_compressed_place(census->image->cluster_bits, descriptor, &offset, &bytes);
    return !(descriptor & QCOW2_COPIED) && qcow2_census_inside(census, offset, bytes);
}

bool qcow2_entry_is_wrong(const struct qcow2_census *census, struct qcow2_entry entry)
{
    const struct qcow2 *image = census->image;
    if (entry.descriptor & QCOW2_COMPRESSED) {
        return entry.subclusters || !compressed_is_sane(census, entry.descriptor);
    }
    if (qcow2_entry_kind(image, entry) == QCOW2_INVALID) {
        return true;
    }
    uint64_t offset = entry.descriptor & QCOW2_OFFSET_MASK;
    return !census->data_file && offset && !qcow2_census_inside(census, offset, image->cluster_size);
}

static void count_compressed(struct qcow2_census *census, struct qcow2_census_table *table, struct qcow2_entry entry)
{
    uint64_t descriptor = entry.descriptor;
    uint64_t offset;
    uint64_t bytes;
    if (entry.subclusters) {
        census_corruption(census, "Compressed data have subclusters: 0x%016" G_GINT64_MODIFIER "x", entry.subclusters);
        table->broken = true;
        return;
    }
    if (descriptor & QCOW2_COPIED) {
        census_corruption(census, "Compressed data at 0x%" G_GINT64_MODIFIER "x have the COPIED flag",
                          descriptor & ~(QCOW2_COPIED | QCOW2_COMPRESSED));
        table->broken = true;
    }
    qcow2_compressed_place(census->image->cluster_bits, descriptor, &offset, &bytes);
    table->broken |= !census_use(census, offset, bytes, table->uses, "compressed data");
    census->allocated += table->active_uses;
    census->compressed += table->active_uses;
    census->fragmented += table->active_uses;
}

/* An entry about which something is wrong or unusual: a finding for each rule that it breaks. */
static void judge_entry(struct qcow2_census *census, struct qcow2_census_table *table, uint64_t index,
                        struct qcow2_entry entry)
{
    uint64_t guest = table->guest + (index << census->image->cluster_bits);
    const char *faults[2] = {NULL, NULL};
    if (entry.descriptor & QCOW2_L2_RESERVED) {
        faults[0] = "has reserved bits set";
    }
    if (qcow2_in_cluster(census->image, entry.descriptor & QCOW2_OFFSET_MASK)) {
        faults[1] = "shows a place that is not at a cluster";
    } else if (!faults[0] && qcow2_entry_kind(census->image, entry) == QCOW2_INVALID) {
        faults[1] = "contradicts itself";
    }
    for (unsigned i = 0; i < 2; i++) {
        if (faults[i]) {
            table->broken = true;
            census_corruption(census,
                              "Entry of guest offset 0x%" G_GINT64_MODIFIER "x (0x%016" G_GINT64_MODIFIER
                              "x 0x%016" G_GINT64_MODIFIER "x) %s",
                              guest, entry.descriptor, entry.subclusters, faults[i]);
        }
    }
}

static void count_place(struct qcow2_census *census, struct qcow2_census_table *table, uint64_t index,
                        uint64_t descriptor)
{
    const struct qcow2 *image = census->image;
    uint64_t offset = descriptor & QCOW2_OFFSET_MASK;
    uint64_t cluster = offset >> image->cluster_bits;
    if (census->data_file) {
        return;
    }
    if (cluster + 1 < census->clusters && !qcow2_in_cluster(image, offset)) {
        qcow2_tally_add(&census->uses, cluster, table->uses);
    } else {
        table->broken |= !census_use(census, offset, image->cluster_size, table->uses, "a cluster of data");
    }
    uint32_t refcount = qcow2_tally_get(&census->refcounts, cluster);
    if (table->active_uses && !qcow2_flag_is_right(descriptor, refcount)) {
        census->wrong_flags++;
        census_corruption(census,
                          "Entry of guest offset 0x%" G_GINT64_MODIFIER "x (0x%016" G_GINT64_MODIFIER
                          "x) and refcount %u disagree",
                          table->guest + (index << image->cluster_bits), descriptor, refcount);
    }
}

static void count_table(struct qcow2_census *census, struct qcow2_census_table *table, const uint8_t *entries)
{
    const struct qcow2 *image = census->image;
    uint64_t corruptions = census->findings->corruptions;
    uint64_t flags = census->wrong_flags;
    uint64_t next = 0;
    uint64_t allocated = 0;
    uint64_t breaks = 0;
    uint64_t unusual = QCOW2_L2_RESERVED | ((image->cluster_size - 1) & QCOW2_OFFSET_MASK) |
                       (image->header.version < 3 || image->entry_bits == 4 ? QCOW2_ZERO : 0);
    for (uint64_t i = 0; i < (uint64_t)1 << image->l2_bits; i++) {
        struct qcow2_entry entry = qcow2_entry_load(image, entries, i);
        if (entry.descriptor & QCOW2_COMPRESSED) {
            count_compressed(census, table, entry);
            continue;
        }
        if (entry.descriptor & unusual || entry.subclusters) {
            judge_entry(census, table, i, entry);
        }
        uint64_t offset = entry.descriptor & QCOW2_OFFSET_MASK;
        if (offset || qcow2_entry_has_place(image, entry)) {
            breaks += next && offset != next;
            next = offset + image->cluster_size;
            allocated++;
            count_place(census, table, i, entry.descriptor);
        }
    }
    /* What is wrong is wrong as often as it is shown; flags matter in the active tables only. */
    flags = census->wrong_flags - flags;
    corruptions = census->findings->corruptions - corruptions - flags;
    census->findings->corruptions += corruptions * (table->uses - 1);
    census->findings->corruptions += flags ? flags * (table->active_uses - 1) : 0;
    census->allocated += allocated * table->active_uses;
    census->fragmented += breaks * table->active_uses;
}

static uint64_t table_offset(const struct qcow2_census *census, uint64_t index)
{
    return g_array_index(census->tables, struct qcow2_census_table, index).offset;
}

static void take_table(struct qcow2_census *census, uint64_t index, const uint8_t *content)
{
    count_table(census, &g_array_index(census->tables, struct qcow2_census_table, index), content);
}

/* --- clusters of metadata, several at a time --- */

struct reading {
    struct qcow2_census *census;
    const struct census_clusters *what;
    struct co_group group;
    uint64_t next;
};

/* How many from `first` on lie side by side. */
static unsigned piece_length(const struct reading *reading, uint64_t first)
{
    const struct qcow2_census *census = reading->census;
    uint64_t cluster_size = census->image->cluster_size;
    uint64_t offset = reading->what->offset(census, first);
    unsigned count = 1;
    while (first + count < reading->what->count && (count + 1) * cluster_size <= PIECE_BYTES &&
           reading->what->offset(census, first + count) == offset + count * cluster_size) {
        count++;
    }
    return count;
}

static void coroutine_fn read_pieces(void *argument)
{
    struct reading *reading = argument;
    struct qcow2_census *census = reading->census;
    uint64_t cluster_size = census->image->cluster_size;
    g_autofree uint8_t *memory = g_try_malloc(MAX(cluster_size, (uint64_t)PIECE_BYTES));
    if (!memory) {
        census_error(census, "There is no memory for reading %s", reading->what->name);
        reading->next = reading->what->count;
    }
    while (reading->next < reading->what->count) {
        uint64_t first = reading->next;
        uint64_t offset = reading->what->offset(census, first);
        unsigned count = offset == CENSUS_NOWHERE ? 1 : piece_length(reading, first);
        reading->next = first + count;
        if (offset == CENSUS_NOWHERE ||
            !census_read(census, offset, memory, count * cluster_size, reading->what->name)) {
            continue;
        }
        for (unsigned i = 0; i < count; i++) {
            reading->what->take(census, first + i, memory + i * cluster_size);
        }
    }
    co_group_leave(&reading->group);
}

void coroutine_fn census_read_clusters(struct qcow2_census *census, const struct census_clusters *what)
{
    struct reading reading = {.census = census, .what = what};
    co_group_init(&reading.group);
    for (unsigned i = 0; i < MIN((uint64_t)READERS, what->count); i++) {
        co_group_enter(&reading.group);
        loop_spawn(loop_self(), read_pieces, &reading);
    }
    co_group_wait(&reading.group);
    co_group_destroy(&reading.group);
}

/* --- all of it --- */

static void note_tables(struct qcow2_census *census)
{
    for (unsigned i = 0; i < census->tables->len; i++) {
        const struct qcow2_census_table *table = &g_array_index(census->tables, struct qcow2_census_table, i);
        uint64_t first = table->offset >> census->image->cluster_bits;
        bool two = qcow2_in_cluster(census->image, table->offset);
        struct qcow2_metadata_run run = {first, two ? 2 : 1, table->uses, QCOW2_PLACE_L2};
        g_array_append_val(census->metadata, run);
    }
    g_array_sort(census->metadata, compare_runs);
}

/* Metadata that something else uses too are about to be overwritten by it, or overwrite it. Where the refcount does
 * not tell that already, it is a finding of its own. */
static void find_overlaps(struct qcow2_census *census)
{
    for (unsigned i = 0; i < census->metadata->len; i++) {
        const struct qcow2_metadata_run *run = &g_array_index(census->metadata, struct qcow2_metadata_run, i);
        census->longest_run = max_u64(census->longest_run, run->count);
        for (uint64_t n = run->first; n < run->first + run->count; n++) {
            uint32_t uses = qcow2_tally_get(&census->uses, n);
            if (uses <= run->uses) {
                continue;
            }
            census->overlaps = true;
            census->l1_misplaced |= run->place == QCOW2_PLACE_L1;
            census->snapshots_misplaced |=
                run->place == QCOW2_PLACE_SNAPSHOT_TABLE || run->place == QCOW2_PLACE_SNAPSHOT_L1;
            census->bitmaps_broken |= run->place == QCOW2_PLACE_BITMAPS;
            if (uses == qcow2_tally_get(&census->refcounts, n) && run->place != QCOW2_PLACE_REFCOUNT_BLOCK) {
                census_corruption(census, "Metadata at 0x%" G_GINT64_MODIFIER "x have other uses too",
                                  n << census->image->cluster_bits);
            }
        }
    }
}

static void count_encryption(struct qcow2_census *census)
{
    const struct qcow2_header *header = &census->image->header;
    for (unsigned i = 0; i < header->extension_count; i++) {
        const struct qcow2_extension *extension = &header->extensions[i];
        if (extension->type == QCOW2_EXTENSION_ENCRYPTION && extension->length == 16) {
            uint64_t words[2];
            memcpy(words, extension->data, sizeof(words));
            census_use_metadata(census, be64toh(words[0]), be64toh(words[1]), QCOW2_PLACE_ENCRYPTION,
                                "the encryption header");
        }
    }
}

/* Bytes that the file takes on disk, as far as anybody can tell. */
static uint64_t coroutine_fn bytes_on_disk(const struct edge *file)
{
    struct node *node = file->child;
    while (!node->driver->allocated_size) {
        const struct edge *below = node->filtered ? node->filtered : node->file;
        if (!below) {
            return edge_size(file);
        }
        node = below->child;
    }
    return node->driver->allocated_size(node);
}

int coroutine_fn qcow2_census_take(struct qcow2_census *census, struct qcow2 *image, struct qcow2_findings *findings,
                                   struct error **err)
{
    *census = (struct qcow2_census){.image = image, .file = image->node->file, .findings = findings};
    census->data_file = image->header.incompatible & QCOW2_INCOMPATIBLE_DATA_FILE;
    census->file_bytes = edge_size(census->file);
    census->clusters = max_u64(1, div_up(census->file_bytes, image->cluster_size));
    uint64_t on_disk = bytes_on_disk(census->file);
    census->memory = MEMORY_BASE + on_disk / 256;
    census->reads = READS_BASE + 2 * on_disk;
    census->tables = g_array_new(FALSE, FALSE, sizeof(struct qcow2_census_table));
    census->metadata = g_array_new(FALSE, FALSE, sizeof(struct qcow2_metadata_run));
    census->snapshots = g_array_new(FALSE, FALSE, sizeof(struct qcow2_census_snapshot));
    census->by_offset = g_hash_table_new(g_direct_hash, g_direct_equal);
    int code = qcow2_tally_init(&census->uses, census->clusters + census->clusters / 8 + QCOW2_CENSUS_SPARE,
                                &census->memory) &&
                       qcow2_tally_init(&census->refcounts, census->clusters, &census->memory)
                   ? census_load_refcounts(census, err)
                   : error_set(err, -EFBIG, "The image file is too large to be checked");
    if (code == 0) {
        census_use_metadata(census, 0, image->cluster_size, QCOW2_PLACE_HEADER, "the header");
        count_active(census);
        census_count_snapshots(census);
        census_count_bitmaps(census);
        count_encryption(census);
        census_read_clusters(census,
                             &(struct census_clusters){"an L2 table", census->tables->len, table_offset, take_table});
        census_count_blocks(census);
        note_tables(census);
        find_overlaps(census);
        if (census->uses.out_of_memory || census->refcounts.out_of_memory) {
            code = error_set(err, -ENOMEM, "There is too little memory to check the image");
        }
    }
    if (code < 0) {
        qcow2_census_finish(census);
    }
    return code;
}

void qcow2_census_finish(struct qcow2_census *census)
{
    if (!census->tables) {
        return;
    }
    qcow2_tally_finish(&census->uses);
    qcow2_tally_finish(&census->refcounts);
    g_free(census->refcount_table);
    g_free(census->l1);
    g_array_free(census->tables, TRUE);
    g_array_free(census->metadata, TRUE);
    g_array_free(census->snapshots, TRUE);
    g_hash_table_unref(census->by_offset);
    *census = (struct qcow2_census){0};
}
