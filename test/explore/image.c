/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A second, small opinion on qcow2: builds the images that an exploration begins with, and reads what is on the disks
 * at its end, or after a power cut. It shares no code with the driver, so that the driver cannot agree with itself.
 *
 * Layout of what it builds: header, refcount table, refcount block, L1 table, L2 tables, data; a cluster or more each.
 * Section names are those of the specification.
 */
#include "test/explore/image.h"
#include <glib.h>
#include <string.h>

#define MAGIC 0x514649fbu
#define HEADER_BYTES 104u
#define EXTENSION_BACKING_FORMAT 0xe2792acau
#define COPIED (UINT64_C(1) << 63)
#define COMPRESSED (UINT64_C(1) << 62)
#define READS_AS_ZERO UINT64_C(1)
#define OFFSET_MASK UINT64_C(0x00fffffffffffe00)
#define DEPTH_MAX 32

/* --- bytes --- */

static void put(unsigned char *to, unsigned bytes, uint64_t value)
{
    for (unsigned i = bytes; i > 0; i--, value >>= 8) {
        to[i - 1] = (unsigned char)value;
    }
}

static uint64_t get(const unsigned char *from, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes; i++) {
        value = value << 8 | from[i];
    }
    return value;
}

static uint64_t divide_up(uint64_t value, uint64_t by)
{
    return (value + by - 1) / by;
}

/* --- building --- */

struct layout {
    uint64_t cluster, clusters; /* bytes of one; how many the guest sees */
    uint64_t l2_entries, l1_entries;
    uint64_t refcount_table, refcount_block, l1, l2, data; /* numbers of host clusters */
    uint64_t end;
};

static struct layout layout_of(const struct image_plan *plan)
{
    struct layout layout = {.cluster = UINT64_C(1) << plan->cluster_bits};
    layout.clusters = divide_up(plan->size, layout.cluster);
    layout.l2_entries = layout.cluster / 8;
    layout.l1_entries = divide_up(layout.clusters, layout.l2_entries);
    layout.refcount_table = 1;
    layout.refcount_block = 2;
    layout.l1 = 3;
    layout.l2 = 4;
    layout.data = layout.l2 + layout.l1_entries;
    layout.end = layout.data;
    for (uint64_t i = 0; i < layout.clusters; i++) {
        layout.end += plan->clusters[i] == IMAGE_DATA;
    }
    g_assert(layout.end <= layout.cluster / 2 && layout.l1_entries <= layout.l2_entries);
    return layout;
}

static void build_header(const struct image_plan *plan, const struct layout *layout, unsigned char *image)
{
    unsigned char *extension = image + HEADER_BYTES;
    put(image, 4, MAGIC);
    put(image + 4, 4, 3);
    put(image + 20, 4, plan->cluster_bits);
    put(image + 24, 8, plan->size);
    put(image + 36, 4, layout->l1_entries);
    put(image + 40, 8, layout->l1 * layout->cluster);
    put(image + 48, 8, layout->refcount_table * layout->cluster);
    put(image + 56, 4, 1); /* clusters of the refcount table */
    put(image + 96, 4, 4); /* refcounts of 16 bits */
    put(image + 100, 4, HEADER_BYTES);
    if (plan->backing) {
        put(extension, 4, EXTENSION_BACKING_FORMAT);
        put(extension + 4, 4, 5);
        memcpy(extension + 8, "qcow2", 5);
        extension += 16;
        put(image + 8, 8, (uint64_t)(extension + 8 - image));
        put(image + 16, 4, strlen(plan->backing));
        memcpy(extension + 8, plan->backing, strlen(plan->backing));
    }
}

unsigned char *image_build(const struct image_plan *plan, uint64_t *ret_bytes)
{
    struct layout layout = layout_of(plan);
    unsigned char *image = g_malloc0(layout.end * layout.cluster);
    uint64_t next = layout.data;
    build_header(plan, &layout, image);
    put(image + layout.refcount_table * layout.cluster, 8, layout.refcount_block * layout.cluster);
    for (uint64_t i = 0; i < layout.end; i++) {
        put(image + layout.refcount_block * layout.cluster + 2 * i, 2, 1);
    }
    for (uint64_t i = 0; i < layout.l1_entries; i++) {
        put(image + layout.l1 * layout.cluster + 8 * i, 8, (layout.l2 + i) * layout.cluster | COPIED);
    }
    for (uint64_t i = 0; i < layout.clusters; i++) {
        uint64_t at = i * layout.cluster, entry = plan->clusters[i] == IMAGE_ZERO ? READS_AS_ZERO : 0;
        if (plan->clusters[i] == IMAGE_DATA) {
            memcpy(image + next * layout.cluster, plan->content + at, MIN(layout.cluster, plan->size - at));
            entry = next++ * layout.cluster | COPIED;
        }
        put(image + layout.l2 * layout.cluster + 8 * i, 8, entry); /* L2 tables lie side by side */
    }
    *ret_bytes = layout.end * layout.cluster;
    return image;
}

/* --- reading --- */

struct reading {
    unsigned char *bytes; /* the whole file */
    uint64_t length;
    const char *path;
    uint64_t cluster, size, l1, l1_entries, refcount_table, refcount_table_bytes;
    char *backing;
    char *problem; /* the first */
};

static bool complain(struct reading *reading, const char *format, ...) G_GNUC_PRINTF(2, 3);
static bool complain(struct reading *reading, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *text = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    if (!reading->problem) {
        reading->problem = g_strdup_printf("%s: %s", reading->path, text);
    }
    return false;
}

static void reading_close(struct reading *reading)
{
    g_clear_pointer(&reading->bytes, g_free);
    g_clear_pointer(&reading->backing, g_free);
    g_clear_pointer(&reading->problem, g_free);
}

static bool lies_inside(const struct reading *reading, uint64_t offset, uint64_t bytes)
{
    return offset <= reading->length && bytes <= reading->length - offset;
}

/* A table's place: whole clusters, and in the file. */
static bool check_place(struct reading *reading, const char *what, uint64_t offset, uint64_t bytes)
{
    if (offset == 0 || offset % reading->cluster || !lies_inside(reading, offset, bytes)) {
        return complain(reading, "%s at %#" G_GINT64_MODIFIER "x does not lie in the file", what, offset);
    }
    return true;
}

static bool reading_open(struct reading *reading, struct sim *sim, const char *path)
{
    *reading = (struct reading){.path = path};
    reading->bytes = sim_disk_get(sim, path, &reading->length);
    const unsigned char *header = reading->bytes;
    if (!header) {
        return complain(reading, "there is no such disk");
    }
    if (reading->length < HEADER_BYTES || get(header, 4) != MAGIC || get(header + 4, 4) != 3) {
        return complain(reading, "is no qcow2 image of version 3");
    }
    unsigned cluster_bits = (unsigned)get(header + 20, 4);
    uint64_t features = get(header + 72, 8), name = get(header + 8, 8), name_bytes = get(header + 16, 4);
    if (cluster_bits < 9 || cluster_bits > 21 || get(header + 96, 4) != 4) {
        return complain(reading, "clusters of %u bits, refcounts of order %u", cluster_bits,
                        (unsigned)get(header + 96, 4));
    }
    if (features) {
        return complain(reading, "incompatible features %#" G_GINT64_MODIFIER "x are set", features);
    }
    reading->cluster = UINT64_C(1) << cluster_bits;
    reading->size = get(header + 24, 8);
    reading->l1_entries = get(header + 36, 4);
    reading->l1 = get(header + 40, 8);
    reading->refcount_table = get(header + 48, 8);
    reading->refcount_table_bytes = get(header + 56, 4) * reading->cluster;
    if (name) {
        if (name_bytes > 1023 || name + name_bytes > reading->cluster || !lies_inside(reading, name, name_bytes)) {
            return complain(reading, "the backing name does not lie in the header's cluster");
        }
        reading->backing = g_strndup((const char *)header + name, name_bytes);
    }
    uint64_t reach = reading->l1_entries * (reading->cluster / 8) * reading->cluster;
    if (reach < reading->size) {
        return complain(reading, "the L1 table is too short for the size");
    }
    return check_place(reading, "the L1 table", reading->l1, reading->l1_entries * 8) &&
           check_place(reading, "the refcount table", reading->refcount_table, reading->refcount_table_bytes);
}

/* One cluster of the guest: where its data lie in the file. */
static bool look_up(struct reading *reading, uint64_t index, enum image_cluster *ret, uint64_t *ret_offset)
{
    uint64_t per_table = reading->cluster / 8;
    uint64_t table = get(reading->bytes + reading->l1 + 8 * (index / per_table), 8) & OFFSET_MASK;
    *ret = IMAGE_NONE;
    if (!table) {
        return true;
    }
    if (!check_place(reading, "an L2 table", table, reading->cluster)) {
        return false;
    }
    uint64_t entry = get(reading->bytes + table + 8 * (index % per_table), 8), offset = entry & OFFSET_MASK;
    if (entry & COMPRESSED) {
        return complain(reading, "cluster %u is compressed", (unsigned)index);
    }
    if (entry & READS_AS_ZERO) {
        *ret = IMAGE_ZERO;
    } else if (offset) {
        *ret = IMAGE_DATA;
        *ret_offset = offset;
        /* The last cluster of a file may be cut. */
        if (offset % reading->cluster || offset >= reading->length) {
            return complain(reading, "cluster %u lies at %#" G_GINT64_MODIFIER "x, not in the file", (unsigned)index,
                            offset);
        }
    }
    return true;
}

/* Disks lie in one directory, the root; a name in a header is relative to it or absolute. */
static char *path_of(const char *name)
{
    return name[0] == '/' ? g_strdup(name) : g_strdup_printf("/%s", name);
}

static unsigned char *show(struct sim *sim, const char *path, unsigned depth, uint64_t *ret_size, char **ret_problem)
{
    struct reading reading;
    g_autofree unsigned char *below = NULL, *shown = NULL;
    uint64_t below_size = 0;
    bool good = reading_open(&reading, sim, path);
    if (good && reading.backing) {
        good = depth < DEPTH_MAX || complain(&reading, "the chain does not end");
        g_autofree char *path_below = path_of(reading.backing);
        below = good ? show(sim, path_below, depth + 1, &below_size, ret_problem) : NULL;
        if (good && !below) {
            reading_close(&reading);
            return NULL;
        }
    }
    shown = g_malloc0(good ? reading.size + 1 : 1);
    for (uint64_t at = 0; good && at < reading.size; at += reading.cluster) {
        uint64_t bytes = MIN(reading.cluster, reading.size - at), offset = 0;
        enum image_cluster kind;
        good = look_up(&reading, at / reading.cluster, &kind, &offset);
        if (good && kind == IMAGE_DATA) {
            memcpy(shown + at, reading.bytes + offset, MIN(bytes, reading.length - offset));
        } else if (good && kind == IMAGE_NONE && at < below_size) {
            memcpy(shown + at, below + at, MIN(bytes, below_size - at));
        }
    }
    *ret_size = reading.size;
    *ret_problem = g_steal_pointer(&reading.problem);
    reading_close(&reading);
    return good ? g_steal_pointer(&shown) : NULL;
}

unsigned char *image_show(struct sim *sim, const char *path, uint64_t *ret_size, char **ret_problem)
{
    return show(sim, path, 0, ret_size, ret_problem);
}

bool image_backing(struct sim *sim, const char *path, char **ret_backing)
{
    struct reading reading;
    bool good = reading_open(&reading, sim, path);
    *ret_backing = reading.backing ? path_of(reading.backing) : NULL;
    reading_close(&reading);
    return good;
}

/* --- checking --- */

struct count {
    struct reading *reading;
    unsigned *used; /* per host cluster */
    uint64_t clusters;
};

static bool count_use(struct count *count, const char *what, uint64_t offset, uint64_t bytes)
{
    for (uint64_t at = offset; at < offset + bytes; at += count->reading->cluster) {
        uint64_t cluster = at / count->reading->cluster;
        if (cluster >= count->clusters) {
            return complain(count->reading, "%s at %#" G_GINT64_MODIFIER "x lies behind the file's end", what, at);
        }
        if (count->used[cluster]++) {
            return complain(count->reading, "host cluster %u is used twice, now by %s", (unsigned)cluster, what);
        }
    }
    return true;
}

static bool count_tables(struct count *count)
{
    struct reading *reading = count->reading;
    bool good = count_use(count, "the header", 0, reading->cluster) &&
                count_use(count, "the refcount table", reading->refcount_table, reading->refcount_table_bytes) &&
                count_use(count, "the L1 table", reading->l1, MAX(reading->l1_entries * 8, 1));
    for (uint64_t i = 0; good && i < reading->refcount_table_bytes / 8; i++) {
        uint64_t block = get(reading->bytes + reading->refcount_table + 8 * i, 8);
        good = !block || (check_place(reading, "a refcount block", block, reading->cluster) &&
                          count_use(count, "a refcount block", block, reading->cluster));
    }
    return good;
}

static bool count_table(struct count *count, uint64_t table)
{
    struct reading *reading = count->reading;
    bool good = check_place(reading, "an L2 table", table, reading->cluster) &&
                count_use(count, "an L2 table", table, reading->cluster);
    for (uint64_t i = 0; good && i < reading->cluster / 8; i++) {
        uint64_t offset = get(reading->bytes + table + 8 * i, 8) & OFFSET_MASK;
        good = !offset || count_use(count, "data", offset, reading->cluster);
    }
    return good;
}

static uint64_t stored_refcount(const struct reading *reading, uint64_t cluster)
{
    uint64_t per_block = reading->cluster / 2, table_at = 8 * (cluster / per_block);
    uint64_t block =
        table_at < reading->refcount_table_bytes ? get(reading->bytes + reading->refcount_table + table_at, 8) : 0;
    return block ? get(reading->bytes + block + 2 * (cluster % per_block), 2) : 0;
}

static bool check_counts(struct count *count, bool exact)
{
    for (uint64_t i = 0; i < count->clusters; i++) {
        uint64_t stored = stored_refcount(count->reading, i);
        if (stored < count->used[i] || (exact && stored > count->used[i])) {
            return complain(count->reading, "host cluster %u is counted %u times and used %u times", (unsigned)i,
                            (unsigned)stored, count->used[i]);
        }
    }
    return true;
}

char *image_check(struct sim *sim, const char *path, bool exact)
{
    struct reading reading;
    bool good = reading_open(&reading, sim, path);
    if (good) {
        struct count count = {.reading = &reading, .clusters = divide_up(reading.length, reading.cluster)};
        count.used = g_new0(unsigned, count.clusters);
        good = count_tables(&count);
        for (uint64_t i = 0; good && i < reading.l1_entries; i++) {
            uint64_t table = get(reading.bytes + reading.l1 + 8 * i, 8) & OFFSET_MASK;
            good = !table || count_table(&count, table);
        }
        good = good && check_counts(&count, exact);
        g_free(g_steal_pointer(&count.used));
    }
    char *problem = g_steal_pointer(&reading.problem);
    reading_close(&reading);
    return problem;
}
