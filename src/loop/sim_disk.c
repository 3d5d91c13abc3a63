/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is on a simulated disk: what a reader sees now, and what a power cut may leave. Sparse: pages come with the
 * first write. Invariants:
 * 1. changes are numbered from 1 on; a sector's version `until` c is what it held before change c (and after the one
 *    before that it was kept for); its versions are kept newest first, and what no version says is as it is now;
 * 2. settling a sector at change c drops its versions until changes <= c: what it held after c, or something later,
 *    is what a power cut leaves. The same goes for the sizes;
 * 3. a page is in `dirty` exactly while one of its sectors has a version; a page that is a hole and not dirty is freed;
 * 4. what lies behind the size is a hole or zeroes;
 * 5. a power cut never leaves a sector as it was before a shrinking of the disk that cut it off and that it leaves.
 * Latency, faults and who may do what are sim_file.c's.
 */
#include "base/size.h"
#include "loop/sim_private.h"
#include <errno.h>
#include <glib.h>
#include <string.h>

#define PAGE_SECTORS (SIM_PAGE / SIM_SECTOR)
#define CHUNK_PAGES ((uint64_t)256)

struct sim_version {
    struct sim_version *older;
    uint64_t until;
    bool hole;
    uint8_t data[SIM_SECTOR];
};

struct sim_page {
    struct list link; /* disk->dirty, or alone */
    uint64_t index;
    bool allocated; /* else it is all zeroes, and there for its versions' sake */
    struct sim_version *older[PAGE_SECTORS];
    uint8_t data[SIM_PAGE];
};

struct sim_size {
    struct list link;
    uint64_t until, size;
    bool shrunk; /* by the change */
    uint64_t next_size;
};

/* ---- pages ---- */

static struct sim_page *page_find(const struct sim_disk *disk, uint64_t index)
{
    uint64_t chunk = index / CHUNK_PAGES;

    return chunk < disk->chunk_count && disk->chunks[chunk] ? disk->chunks[chunk][index % CHUNK_PAGES] : NULL;
}

static struct sim_page *page_get(struct sim_disk *disk, uint64_t index)
{
    uint64_t chunk = index / CHUNK_PAGES;

    if (chunk >= disk->chunk_count) {
        uint64_t count = max_u64(chunk + 1, 2 * disk->chunk_count);

        disk->chunks = g_renew(struct sim_page **, disk->chunks, count);
        memset(disk->chunks + disk->chunk_count, 0, (count - disk->chunk_count) * sizeof(*disk->chunks));
        disk->chunk_count = count;
    }
    if (!disk->chunks[chunk]) {
        disk->chunks[chunk] = g_new0(struct sim_page *, CHUNK_PAGES);
    }
    struct sim_page **slot = &disk->chunks[chunk][index % CHUNK_PAGES];

    if (!*slot) {
        *slot = g_new0(struct sim_page, 1);
        (*slot)->index = index;
        list_init(&(*slot)->link);
    }
    return *slot;
}

static void page_set_allocated(struct sim_disk *disk, struct sim_page *page, bool allocated)
{
    if (page->allocated != allocated) {
        page->allocated = allocated;
        disk->allocated += allocated ? 1 : -UINT64_C(1);
    }
}

static void versions_free(struct sim_version *version)
{
    while (version) {
        struct sim_version *older = version->older;

        g_free(version);
        version = older;
    }
}

static void page_free(struct sim_disk *disk, struct sim_page *page)
{
    page_set_allocated(disk, page, false);
    list_remove(&page->link);
    for (unsigned s = 0; s < PAGE_SECTORS; s++) {
        versions_free(page->older[s]);
    }
    disk->chunks[page->index / CHUNK_PAGES][page->index % CHUNK_PAGES] = NULL;
    g_free(page);
}

/* Off the dirty list, and away, when nothing keeps it there. */
static void page_tidy(struct sim_disk *disk, struct sim_page *page)
{
    for (unsigned s = 0; s < PAGE_SECTORS; s++) {
        if (page->older[s]) {
            return;
        }
    }
    list_remove(&page->link);
    if (!page->allocated) {
        page_free(disk, page);
    }
}

/* The current change is about to touch [from, to) of the page. */
static void page_keep(struct sim_disk *disk, struct sim_page *page, uint64_t from, uint64_t to)
{
    for (uint64_t s = from / SIM_SECTOR; s < div_up(to, SIM_SECTOR); s++) {
        if (page->older[s] && page->older[s]->until == disk->change) {
            continue;
        }
        struct sim_version *version = g_new(struct sim_version, 1);

        version->older = page->older[s];
        version->until = disk->change;
        version->hole = !page->allocated;
        memcpy(version->data, page->data + s * SIM_SECTOR, SIM_SECTOR);
        page->older[s] = version;
    }
    if (list_is_empty(&page->link)) {
        list_append(&disk->dirty, &page->link);
    }
}

/* ---- the disk ---- */

struct sim_disk *disk_create(const char *path, uint64_t inode)
{
    struct sim_disk *disk = g_new0(struct sim_disk, 1);

    list_init(&disk->link);
    list_init(&disk->dirty);
    list_init(&disk->sizes);
    disk->path = g_strdup(path);
    disk->inode = inode;
    disk->room = UINT64_MAX;
    disk->references = 1;
    return disk;
}

void disk_unref(struct sim_disk *disk)
{
    if (--disk->references) {
        return;
    }
    g_assert(list_is_empty(&disk->link));
    for (uint64_t c = 0; c < disk->chunk_count; c++) {
        for (uint64_t p = 0; disk->chunks[c] && p < CHUNK_PAGES; p++) {
            if (disk->chunks[c][p]) {
                page_free(disk, disk->chunks[c][p]);
            }
        }
        g_free(disk->chunks[c]);
    }
    g_free(disk->chunks);
    while (!list_is_empty(&disk->sizes)) {
        struct sim_size *size = container_of(disk->sizes.next, struct sim_size, link);

        list_remove(&size->link);
        g_free(size);
    }
    g_free(disk->path);
    g_free(disk);
}

void disk_read(struct sim_disk *disk, uint64_t offset, void *to, uint64_t bytes)
{
    uint8_t *out = to;

    while (bytes) {
        uint64_t within = offset % SIM_PAGE, step = min_u64(SIM_PAGE - within, bytes);
        struct sim_page *page = page_find(disk, offset / SIM_PAGE);

        if (page) {
            memcpy(out, page->data + within, step);
        } else {
            memset(out, 0, step);
        }
        out += step;
        offset += step;
        bytes -= step;
    }
}

/* Tells who records. `change`: the number that goes with it. */
static void disk_record(const struct sim_disk *disk, enum sim_record_kind kind, uint64_t change, uint64_t offset,
                        uint64_t bytes, const void *data)
{
    const struct sim *sim = sim_self();

    if (sim && sim->record) {
        struct sim_record record = {kind, disk->path, change, offset, bytes, data};

        sim->record(&record, sim->record_argument);
    }
}

/* Part of the current change. */
static void disk_set_size(struct sim_disk *disk, uint64_t size)
{
    if (size != disk->size) {
        struct sim_size *before = g_new0(struct sim_size, 1);

        *before = (struct sim_size){
            .until = disk->change, .size = disk->size, .shrunk = size < disk->size, .next_size = size};
        list_prepend(&disk->sizes, &before->link);
        disk->size = size;
    }
}

void disk_write(struct sim_disk *disk, uint64_t offset, const void *from, uint64_t bytes)
{
    const uint8_t *in = from;
    uint64_t end = offset + bytes;

    g_assert(end <= SIM_DISK_MAX);
    disk->change++;
    disk_record(disk, SIM_RECORD_WRITE, disk->change, offset, bytes, from);
    for (uint64_t at = offset; at < end;) {
        uint64_t within = at % SIM_PAGE, step = min_u64(SIM_PAGE - within, end - at);
        struct sim_page *page = page_get(disk, at / SIM_PAGE);

        page_keep(disk, page, within, within + step);
        memcpy(page->data + within, in, step);
        page_set_allocated(disk, page, true);
        in += step;
        at += step;
    }
    disk_set_size(disk, max_u64(disk->size, end));
}

/* The first byte from `at` on that may lie in a page, if nothing is to be allocated. */
static uint64_t disk_skip_hole(const struct sim_disk *disk, uint64_t at, uint64_t end)
{
    while (at < end && at / SIM_PAGE / CHUNK_PAGES < disk->chunk_count && !page_find(disk, at / SIM_PAGE)) {
        uint64_t step = disk->chunks[at / SIM_PAGE / CHUNK_PAGES] ? SIM_PAGE : SIM_PAGE * CHUNK_PAGES;

        at = align_down(at, step) + step;
    }
    return at / SIM_PAGE / CHUNK_PAGES < disk->chunk_count ? min_u64(at, end) : end;
}

/* Part of the current change: zeroes, and holes where a page is whole. */
static void disk_punch(struct sim_disk *disk, uint64_t offset, uint64_t end)
{
    for (uint64_t at = disk_skip_hole(disk, offset, end); at < end; at = disk_skip_hole(disk, at, end)) {
        uint64_t within = at % SIM_PAGE, step = min_u64(SIM_PAGE - within, end - at);
        struct sim_page *page = page_find(disk, at / SIM_PAGE);

        if (page->allocated) {
            page_keep(disk, page, within, within + step);
            memset(page->data + within, 0, step);
            page_set_allocated(disk, page, step < SIM_PAGE);
        }
        at += step;
    }
}

/* Part of the current change. */
static void disk_fill(struct sim_disk *disk, uint64_t offset, uint64_t end, bool zero)
{
    for (uint64_t at = offset; at < end;) {
        uint64_t within = at % SIM_PAGE, step = min_u64(SIM_PAGE - within, end - at);
        struct sim_page *page = page_get(disk, at / SIM_PAGE);

        if (zero || !page->allocated) {
            page_keep(disk, page, within, within + step);
            memset(page->data + within, 0, step);
            page_set_allocated(disk, page, true);
        }
        at += step;
    }
}

void disk_allocate(struct sim_disk *disk, enum file_allocate_mode mode, uint64_t offset, uint64_t bytes)
{
    disk->change++;
    if (mode == FILE_PUNCH) {
        disk_record(disk, SIM_RECORD_ZERO, disk->change, offset,
                    min_u64(bytes, disk->size - min_u64(offset, disk->size)), NULL);
        if (offset < disk->size) {
            disk_punch(disk, offset, min_u64(offset + bytes, align_up(disk->size, SIM_PAGE)));
        }
        return;
    }
    g_assert(offset + bytes <= SIM_DISK_MAX);
    if (mode == FILE_ZERO) {
        disk_record(disk, SIM_RECORD_ZERO, disk->change, offset, bytes, NULL);
    } else {
        disk_record(disk, SIM_RECORD_RESIZE, disk->change, max_u64(disk->size, offset + bytes), 0, NULL);
    }
    disk_fill(disk, offset, offset + bytes, mode == FILE_ZERO);
    disk_set_size(disk, max_u64(disk->size, offset + bytes));
}

void disk_resize(struct sim_disk *disk, uint64_t size)
{
    disk->change++;
    disk_record(disk, SIM_RECORD_RESIZE, disk->change, size, 0, NULL);
    if (size < disk->size) {
        disk_punch(disk, size, align_up(disk->size, SIM_PAGE));
    }
    disk_set_size(disk, size);
}

int disk_extent(struct sim_disk *disk, uint64_t offset, bool *ret_data, uint64_t *ret_end)
{
    uint64_t at = offset;
    bool data;

    if (offset >= disk->size) {
        return -ENXIO;
    }
    struct sim_page *page = page_find(disk, at / SIM_PAGE);

    data = page && page->allocated;
    while (at < disk->size) {
        if (!data) {
            at = disk_skip_hole(disk, at, disk->size);
        }
        page = at < disk->size ? page_find(disk, at / SIM_PAGE) : NULL;
        if (at >= disk->size || (page && page->allocated) != data) {
            break;
        }
        at = align_down(at, SIM_PAGE) + SIM_PAGE;
    }
    *ret_data = data;
    *ret_end = min_u64(at, disk->size);
    return 0;
}

/* ---- settling ---- */

static void sector_settle(struct sim_page *page, uint64_t sector, uint64_t change)
{
    struct sim_version **version = &page->older[sector];

    while (*version && (*version)->until > change) {
        version = &(*version)->older;
    }
    versions_free(*version);
    *version = NULL;
}

static void disk_settle_sectors(struct sim_disk *disk, uint64_t offset, uint64_t end, uint64_t change)
{
    list_for_each_safe (link, &disk->dirty) {
        struct sim_page *page = container_of(link, struct sim_page, link);
        uint64_t first = page->index * SIM_PAGE;

        for (uint64_t s = 0; s < PAGE_SECTORS; s++) {
            uint64_t at = first + s * SIM_SECTOR;

            if (at < end && at + SIM_SECTOR > offset) {
                sector_settle(page, s, change);
            }
        }
        page_tidy(disk, page);
    }
}

void disk_settle(struct sim_disk *disk, uint64_t offset, uint64_t bytes, uint64_t change)
{
    disk_record(disk, SIM_RECORD_SETTLE, change, offset, bytes, NULL);
    disk_settle_sectors(disk, offset, offset + bytes, change);
    /* The oldest first. */
    while (!list_is_empty(&disk->sizes)) {
        struct sim_size *size = container_of(disk->sizes.prev, struct sim_size, link);

        if (size->until > change) {
            break;
        }
        list_remove(&size->link);
        if (size->shrunk) {
            disk_settle_sectors(disk, size->next_size, UINT64_MAX, size->until);
        }
        g_free(size);
    }
}

/* ---- the power cut ---- */

/* How a cut chooses. */
enum cut_mode {
    CUT_ALL,    /* nothing is lost: only the process died */
    CUT_NONE,   /* all is lost that was not settled */
    CUT_MOMENT, /* as it was at one moment */
    CUT_MIXED,  /* each sector for itself */
    CUT_MODES
};
struct cut {
    struct sim *sim;
    enum cut_mode mode;
    uint64_t moment;   /* CUT_MOMENT: everything as after this change */
    unsigned newest;   /* CUT_MIXED: percent of sectors that are as they were last */
    uint64_t size;     /* the chosen one */
    uint64_t size_for; /* and what it is of: the change after which it was so */
};

/* Of `count` versions (0: as it is now, 1: the newest older one, ...). `until_of` tells when each ended. */
static unsigned cut_choose(struct cut *cut, const uint64_t *until, unsigned count)
{
    unsigned chosen = 0;

    switch (cut->mode) {
    case CUT_NONE:
        return count - 1;
    case CUT_MOMENT:
        while (chosen + 1 < count && until[chosen + 1] > cut->moment) {
            chosen++;
        }
        return chosen;
    case CUT_MIXED:
        return sim_chance(cut->sim, cut->newest) ? 0 : (unsigned)sim_below(cut->sim, count);
    default:
        return 0;
    }
}

static void cut_size(struct cut *cut, const struct sim_disk *disk)
{
    g_autoptr(GArray) until = g_array_new(FALSE, TRUE, sizeof(uint64_t));
    uint64_t now = UINT64_MAX;

    g_array_append_val(until, now);
    list_for_each (link, &disk->sizes) {
        g_array_append_val(until, container_of(link, struct sim_size, link)->until);
    }
    unsigned chosen = cut_choose(cut, (uint64_t *)(void *)until->data, until->len);

    cut->size = disk->size;
    cut->size_for = disk->change;
    list_for_each (link, &disk->sizes) {
        const struct sim_size *size = container_of(link, struct sim_size, link);

        if (!chosen--) {
            break;
        }
        cut->size = size->size;
        cut->size_for = size->until - 1;
    }
}

/* The sector at `at` is not left as it was before this change. */
static uint64_t cut_floor(const struct cut *cut, const struct sim_disk *disk, uint64_t at)
{
    list_for_each (link, &disk->sizes) {
        const struct sim_size *size = container_of(link, struct sim_size, link);

        if (size->shrunk && size->until <= cut->size_for && at + SIM_SECTOR > size->next_size) {
            return size->until;
        }
    }
    return 0;
}

static void cut_sector(struct cut *cut, const struct sim_disk *disk, const struct sim_page *page, uint64_t sector,
                       struct sim_disk *left)
{
    uint64_t at = page->index * SIM_PAGE + sector * SIM_SECTOR, floor = cut_floor(cut, disk, at);
    g_autoptr(GArray) until = g_array_new(FALSE, TRUE, sizeof(uint64_t));
    uint64_t now = UINT64_MAX;
    const uint8_t *data = page->data + sector * SIM_SECTOR;
    bool hole = !page->allocated;

    if (at >= cut->size) {
        return;
    }
    g_array_append_val(until, now);
    for (struct sim_version *version = page->older[sector]; version && version->until > floor;
         version = version->older) {
        g_array_append_val(until, version->until);
    }
    unsigned chosen = cut_choose(cut, (uint64_t *)(void *)until->data, until->len);

    for (struct sim_version *version = page->older[sector]; chosen; version = version->older, chosen--) {
        data = version->data;
        hole = version->hole;
    }
    if (!hole) {
        disk_write(left, at, data, min_u64(SIM_SECTOR, cut->size - at));
    }
}

struct sim_disk *disk_cut(struct sim_disk *disk, struct sim *sim)
{
    struct sim_disk *left = disk_create(disk->path, disk->inode);
    struct cut cut = {.sim = sim, .mode = (enum cut_mode)sim_below(sim, CUT_MODES)};

    cut.moment = sim_below(sim, disk->change + 1);
    cut.newest = (unsigned)sim_below(sim, 101);
    cut_size(&cut, disk);
    for (uint64_t i = 0; i < disk->chunk_count * CHUNK_PAGES; i++) {
        struct sim_page *page = page_find(disk, i);

        for (uint64_t s = 0; page && s < PAGE_SECTORS; s++) {
            cut_sector(&cut, disk, page, s, left);
        }
    }
    disk_resize(left, cut.size);
    disk_settle(left, 0, UINT64_MAX, left->change);
    return left;
}
