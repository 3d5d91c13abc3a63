/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Records what reaches the disks, and plays it again. Invariants:
 *
 * 1. The records of one disk are in the order of their change numbers; settlements stand between them.
 * 2. A change is settled at a point when a settlement before that point covers all of its range and is of its number or
 *    a later one. Changes of size are settled by settlements of the whole disk only.
 * 3. What a crash leaves is made by doing the changes in order and leaving parts of unsettled ones out, sector by
 * sector: so a sector is as it was after any one of its changes since it was settled, and never older.
 *
 * A moved record (recording_move_early()) is done at its new place and left out at its own.
 */
#include "test/crash/recording.h"
#include "base/seeded.h"
#include "test/crash/promise.h"
#include <string.h>

#define DISKS_MAX 8
#define NOT_MOVED UINT64_MAX

struct record {
    enum sim_record_kind kind;
    unsigned disk;
    uint64_t change, offset, bytes;
    uint8_t data[];
};

struct disk {
    char *path;
    uint8_t *initial;
    uint64_t initial_size;
    uint64_t first_change; /* the number of the first recorded one; 0: none yet */
};

struct recording {
    struct sim *sim;
    struct disk disks[DISKS_MAX];
    unsigned disk_count;
    GPtrArray *records;
    uint64_t moved, moved_to; /* the record of index `moved` is done before the one of index `moved_to` */
};

static void add(const struct sim_record *from, void *argument)
{
    struct recording *recording = argument;
    for (unsigned i = 0; i < recording->disk_count; i++) {
        if (g_str_equal(recording->disks[i].path, from->path)) {
            uint64_t bytes = from->data ? from->bytes : 0;
            struct record *record = g_malloc(sizeof(*record) + bytes);
            *record = (struct record){from->kind, i, from->change, from->offset, from->bytes};
            if (bytes) {
                memcpy(record->data, from->data, bytes);
            }
            g_ptr_array_add(recording->records, record);
            return;
        }
    }
    g_error("nobody told of the disk %s", from->path);
}

struct recording *recording_begin(struct sim *sim, const char *const *paths, unsigned count)
{
    struct recording *recording = g_new0(struct recording, 1);
    g_assert(count <= DISKS_MAX);
    recording->sim = sim;
    recording->disk_count = count;
    recording->moved = NOT_MOVED;
    recording->records = g_ptr_array_new_with_free_func(g_free);
    for (unsigned i = 0; i < count; i++) {
        struct disk *disk = &recording->disks[i];
        disk->path = g_strdup(paths[i]);
        disk->initial = sim_disk_get(sim, paths[i], &disk->initial_size);
        g_assert_nonnull(disk->initial);
    }
    sim_set_recorder(sim, add, recording);
    return recording;
}

void recording_end(struct recording *recording)
{
    sim_set_recorder(recording->sim, NULL, NULL);
    recording->sim = NULL;
}

void recording_destroy(struct recording *recording)
{
    for (unsigned i = 0; i < recording->disk_count; i++) {
        g_free(recording->disks[i].path);
        g_free(recording->disks[i].initial);
    }
    g_ptr_array_unref(recording->records);
    g_free(recording);
}

unsigned recording_disks(const struct recording *recording)
{
    return recording->disk_count;
}

const char *recording_path(const struct recording *recording, unsigned disk)
{
    return recording->disks[disk].path;
}

uint64_t recording_points(const struct recording *recording)
{
    return recording->records->len;
}

static const struct record *record_before(const struct recording *recording, uint64_t point)
{
    g_assert(point > 0 && point <= recording->records->len);
    return recording->records->pdata[point - 1];
}

bool recording_is_settlement(const struct recording *recording, uint64_t point)
{
    return record_before(recording, point)->kind == SIM_RECORD_SETTLE;
}

bool recording_is_metadata(const struct recording *recording, uint64_t point)
{
    const struct record *record = record_before(recording, point);
    return record->kind == SIM_RECORD_WRITE && record->bytes >= 8 && !sector_is_of_guest(record->data, record->bytes);
}

bool recording_move_early(struct recording *recording, uint64_t point, uint64_t *ret_from)
{
    const struct record *record = record_before(recording, point);
    for (uint64_t i = point - 1; i-- > 0;) {
        const struct record *other = recording->records->pdata[i];
        if (other->kind == SIM_RECORD_SETTLE && other->disk == record->disk) {
            recording->moved = point - 1;
            recording->moved_to = i;
            *ret_from = i;
            return true;
        }
    }
    return false;
}

void recording_move_back(struct recording *recording)
{
    recording->moved = NOT_MOVED;
}

/* --- what a crash leaves --- */

/* Per sector of a change: is it settled at the point? Settlements behind the change, of its number or later. */
static bool is_settled(const struct recording *recording, uint64_t index, uint64_t point, uint64_t offset,
                       uint64_t bytes)
{
    const struct record *record = recording->records->pdata[index];
    if (index == recording->moved) {
        return true;
    }
    for (uint64_t i = index + 1; i < point; i++) {
        const struct record *other = recording->records->pdata[i];
        if (other->kind == SIM_RECORD_SETTLE && other->disk == record->disk && other->change >= record->change &&
            other->offset <= offset && other->bytes >= offset + bytes - other->offset) {
            return true;
        }
    }
    return false;
}

struct play {
    const struct recording *recording;
    uint64_t point, last; /* last: the index of the disk's last change before the point */
    enum loss loss;
    uint64_t random;
    unsigned keep; /* LOSS_MIXED: of four sectors */
};

static bool is_kept(struct play *play, uint64_t index)
{
    switch (play->loss) {
    case LOSS_NOTHING:
        return true;
    case LOSS_ALL:
        return false;
    case LOSS_OLDER:
        return index == play->last;
    case LOSS_LAST:
        return index != play->last;
    case LOSS_MIXED:
        return seeded_next(&play->random) % 4 < play->keep;
    }
    return true;
}

static void play_sectors(struct play *play, uint64_t index, GByteArray *disk)
{
    const struct record *record = play->recording->records->pdata[index];
    uint64_t end = record->offset + record->bytes;
    bool settled = is_settled(play->recording, index, play->point, record->offset, record->bytes);
    for (uint64_t at = record->offset; at < end;) {
        uint64_t next = MIN((at | (SIM_SECTOR - 1)) + 1, end);
        if (settled || is_kept(play, index)) {
            if (next > disk->len && record->kind == SIM_RECORD_WRITE) {
                uint64_t old = disk->len;
                g_byte_array_set_size(disk, next);
                memset(disk->data + old, 0, next - old);
            }
            if (record->kind == SIM_RECORD_WRITE) {
                memcpy(disk->data + at, record->data + (at - record->offset), next - at);
            } else if (at < disk->len) {
                memset(disk->data + at, 0, MIN(next, disk->len) - at);
            }
        }
        at = next;
    }
}

static void play_record(struct play *play, uint64_t index, GByteArray *disk)
{
    const struct record *record = play->recording->records->pdata[index];
    if (record->kind == SIM_RECORD_RESIZE) {
        if (is_settled(play->recording, index, play->point, 0, UINT64_MAX / 2) || is_kept(play, index)) {
            uint64_t old = disk->len;
            g_byte_array_set_size(disk, record->offset);
            if (record->offset > old) {
                memset(disk->data + old, 0, record->offset - old);
            }
        }
    } else if (record->kind != SIM_RECORD_SETTLE) {
        play_sectors(play, index, disk);
    }
}

GByteArray *recording_crash(const struct recording *recording, unsigned disk, uint64_t point, enum loss loss,
                            uint64_t seed)
{
    const struct disk *from = &recording->disks[disk];
    GByteArray *left = g_byte_array_new();
    struct play play = {.recording = recording, .point = point, .last = NOT_MOVED, .loss = loss, .random = seed};
    play.keep = seeded_next(&play.random) % 5;
    g_byte_array_append(left, from->initial, from->initial_size);
    for (uint64_t i = 0; i < point; i++) {
        const struct record *record = recording->records->pdata[i];
        if (record->disk == disk && record->kind != SIM_RECORD_SETTLE) {
            play.last = i;
        }
    }
    for (uint64_t i = 0; i <= point; i++) {
        if (recording->moved != NOT_MOVED && i == recording->moved_to) {
            const struct record *moved = recording->records->pdata[recording->moved];
            if (moved->disk == disk) {
                play_record(&play, recording->moved, left);
            }
        }
        if (i < point && i != recording->moved && ((struct record *)recording->records->pdata[i])->disk == disk) {
            play_record(&play, i, left);
        }
    }
    return left;
}
